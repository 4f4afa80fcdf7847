// Cells of any number of gates on the CUDA kernels, on the stand-in of tests/simt: in both tiers,
// with the tiles of tensor cores and without.
#define RNNKERN_ELEMENT float
#ifndef RNNKERN_CELL
#define RNNKERN_CELL WeightedSum<1, 1>
#endif

#include <cstdlib>
#include <cstring>
#include <memory>

#include "check.h"
#include "cuda/product.cu"
#include "cuda/scan.cu"
#include "device.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {
namespace {

class OnTheStandIn {
 public:
  OnTheStandIn(bool tf32, int multiprocessors, int shared_kib)
      : call_{.device = 0, .stream = nullptr, .tf32 = tf32, .deterministic = false} {
    device_.multiprocessors = device_.blocks_at_once = multiprocessors;
    device_.shared_bytes = shared_kib << 10;
  }

  void forward(const Forward<float>& f) const {
    with_cell(f.sizes.cell, [&](auto cell) {
      using Cell = decltype(cell);
      run([&](Queue& queue) {
        const cuda::Plan plan = plan_of(f, queue);
        if (plan.resident) {
          resident<float, Cell>(f, plan, queue);
        } else {
          stepwise<float, Cell>(f, plan, queue);
        }
      });
    });
  }
  void backward(const Backward<float>& b) const {
    with_cell(b.sizes.cell, [&](auto cell) {
      using Cell = decltype(cell);
      run([&](Queue& queue) {
        const cuda::Plan plan = plan_of(b, queue);
        const ByOrder<float, 1> by = {&b};
        const float* zeros = nullptr;
        if (plan.resident) {
          resident<float, Cell>(b, plan, &zeros, queue);
        } else {
          zeros = take_zeros<float, Cell>(b.sizes, queue);
          queue.clear_taken();
          stepwise<float, Cell, 1>(by, zeros, queue);
        }
        gradients<float, Cell, 1>(by, zeros, queue);
      });
    });
  }

 private:
  template <typename Start>
  void run(Start start) const {
    constexpr size_t kAlignment = 256;
    Queue counts(call_, device_, nullptr, "");
    start(counts);
    const size_t bytes = (counts.bytes() + kAlignment - 1) / kAlignment * kAlignment;
    const std::unique_ptr<char, decltype(&std::free)> memory(
        static_cast<char*>(std::aligned_alloc(kAlignment, bytes)), &std::free);
    std::memset(memory.get(), 0xff, bytes);  // NaN
    Queue runs(call_, device_, memory.get(), "a layer");
    start(runs);
    simt::streams().finish();
  }

  const cuda::Call call_;
  cuda::Device device_;
};

}  // namespace
}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern

int main() {
  using namespace rnnkern;
  using namespace RNNKERN_NAMESPACE;
  // One tile of rows, two, and as many as there are gates.
  const Case small[] = {{2, 3, 2, 33}}, rows[] = {{2, 12, 2, 9}}, large[] = {{2, 31, 2, 40}};
  int wrong = 0;
  for (const char* tier : {"stepwise", "resident"}) {
    setenv("RNNKERN_CUDA_TIER", tier, 1);
    for (bool tf32 : {true, false}) {
      wrong += check_all<float>(tier, small, OnTheStandIn(tf32, 5, 40));
      wrong += check_all<float>(tier, rows, OnTheStandIn(tf32, 1, 60));
      wrong += check_all<float>(tier, large, OnTheStandIn(tf32, 4, 90));
    }
  }
  return wrong != 0;
}
