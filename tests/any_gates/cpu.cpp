// Cells of any number of gates on the CPU's kernels, in each way to read weights.
#include <cstdlib>
#include <memory>

#include "check.h"
#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/second_order.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {
namespace {

template <typename T>
struct OnTheCpu {
  Reading forward_reading, backward_reading;

  void forward(const Forward<T>& f) const {
    with_cell(f.sizes.cell, [&](auto cell) {
      run<ForwardScan<T, decltype(cell)>>(f, plan(forward_reading, f.steps));
    });
  }
  void backward(const Backward<T>& b) const {
    with_cell(b.sizes.cell, [&](auto cell) {
      run<BackwardScan<T, decltype(cell)>>(b, plan(backward_reading, b.steps));
    });
  }
  void second_order(const SecondOrder<T>& s) const {
    with_cell(s.sizes.cell, [&](auto cell) {
      run<SecondOrderScan<T, decltype(cell)>>(s, plan(forward_reading, s.steps),
                                              plan(backward_reading, s.steps));
    });
  }

 private:
  static Plan plan(Reading reading, const Steps& steps) {
    Plan p;
    p.threads = p.unit_blocks = 2;
    // Second derivatives know no batch across.
    p.input = p.recurrent = reading;
    p.block_steps = steps.T > 2 ? 2 : 1;
    return p;
  }

  template <typename Scan, typename... Arguments>
  static void run(const Arguments&... arguments) {
    Carver counts(nullptr);
    Scan(arguments..., counts);
    const std::unique_ptr<char, decltype(&std::free)> memory(
        static_cast<char*>(std::aligned_alloc(Carver::kAlignment, counts.used())), &std::free);
    Carver carver(memory.get());
    Scan(arguments..., carver).run();
  }
};

}  // namespace
}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern

int main() {
  using namespace rnnkern;
  using namespace RNNKERN_NAMESPACE;
  const Case cases[] = {{3, 5, 3, 1}, {2, 7, 5, 37}, {3, 18, 4, 64}};
  using Kernels = OnTheCpu<double>;
  int wrong = 0;
  wrong += check_all<double>("packed", cases, Kernels{Reading::kPacked, Reading::kPacked});
  wrong += check_all<double>("as they lie", cases, Kernels{Reading::kDots, Reading::kInPlace});
  wrong += check_all<double>("broadcast", cases, Kernels{Reading::kBroadcast, Reading::kPacked});
  return wrong != 0;
}
