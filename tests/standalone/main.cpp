// Runs every cell, pass and type of the CPU kernels against reference.h, without Python: so it runs
// without torch, under an emulator of another processor. `make test-aarch64`.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <iterator>
#include <string>
#include <type_traits>
#include <utility>

#include "functions.h"
#include "kernel_run.h"
#include "reference.h"
#include "tolerance.h"

namespace rnnkern {
namespace {

using reference::Dual;
using reference::Problem;
using Vector = std::vector<double>;
using Layer = reference::Layer<double>;
using Outputs = reference::Outputs<double>;

// The arithmetic of a plain loop in T.
template <typename T>
struct Loop {
  using Number = Compute<T>;
  static Number stored(Number x) {
    if constexpr (kNarrow<T>) return Number(round_to<T>(x));
    return x;
  }
  static std::vector<float> factor(const float* row, int64_t count)
    requires kRoundsFactors<T>
  {
    std::vector<float> rounded(row, row + count);
    float most = 0;
    for (float x : rounded) most = std::max(most, std::abs(x));
    const float scale = most / 127;
    for (float& x : rounded) {
      if constexpr (std::is_same_v<T, F32ByBf16>) {
        x = float(round_to<Bf16>(x));
      } else if (most > 0) {
        x = std::nearbyint(x / scale) * scale;
      }
    }
    return rounded;
  }
};

struct CellCase {
  const char* name;
  CellId cell;
  bool projected;
};
constexpr CellCase kCells[] = {{"RNN tanh", reference::kRnnTanh, false},
                               {"RNN relu", reference::kRnnRelu, false},
                               {"LSTM", reference::kLstm, false},
                               {"LSTM, projected", reference::kLstm, true},
                               {"GRU", reference::kGru, false}};
static_assert(
    [] {
      for (size_t id = 0; id < kCellInfos.size(); ++id) {
        const auto is_it = [id](const CellCase& c) { return size_t(c.cell) == id; };
        if (std::none_of(std::begin(kCells), std::end(kCells), is_it)) return false;
      }
      return true;
    }(),
    "every cell of csrc/cells/list.h needs a row in kCells, and its equations in reference.h");

// The same numbers on every machine.
class Random {
 public:
  explicit Random(int bits) : bits_(bits) {}

  uint64_t below(uint64_t limit) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return (state_ >> 33) % limit;
  }
  // Multiples of 2^-bits in (-scale, scale), scale a power of two.
  Vector numbers(int64_t count, double scale = 1) {
    Vector made(count);
    const int64_t steps = int64_t(1) << bits_;
    for (double& x : made) x = double(int64_t(below(2 * steps - 1)) + 1 - steps) / steps * scale;
    return made;
  }

 private:
  int bits_;
  uint64_t state_ = 2;  // with it no relu is at its kink, see kLargestLimit
};

Problem problem_of(const Case& c, const CellCase& cell, Random& random) {
  Problem p = {cell.cell, c.T, c.N, c.I, c.H, c.H, c.D, cell.projected, {}, {}};
  if (cell.projected) p.O = (2 * c.H + 2) / 3;
  const bool is_ragged = c.options.form == kRagged || c.options.form == kPacked;
  for (int64_t n = 0; n < c.N; ++n) {
    const int64_t least = c.options.form == kPacked;  // a packed sequence has no empty rows
    p.lengths.push_back(is_ragged ? least + random.below(c.T + 1 - least) : c.T);
  }
  if (c.options.form == kPacked) p.lengths[c.N / 2] = c.T;
  if (c.options.form == kRagged) p.lengths[0] = 0;
  for (int64_t i = 0; c.options.resets && i < c.T * c.N; ++i) {
    p.reset.push_back(random.below(3) == 0);
  }
  return p;
}

Layer layer_of(const Case& c, const Problem& p, Random& random) {
  const int64_t rows = p.gates() * p.H;
  // About 1 / sqrt(columns), a power of two.
  const auto weights = [&](int64_t of, int64_t columns) {
    return random.numbers(of * columns, std::exp2(std::round(-std::log2(double(columns)) / 2)));
  };
  Layer layer;
  layer.x = random.numbers(p.T * p.N * p.I);
  if (c.options.has_states) layer.h0 = random.numbers(p.D * p.N * p.O);
  if (c.options.has_states && p.has_cell_state()) layer.c0 = random.numbers(p.D * p.N * p.H);
  for (int d = 0; d < p.D; ++d) {
    auto& w = layer.weights[d];
    w.w_ih = weights(rows, p.I);
    w.w_hh = weights(rows, p.O);
    if (c.options.has_bias) w.b_ih = random.numbers(rows), w.b_hh = random.numbers(rows);
    if (p.projected) w.w_hr = weights(p.O, p.H);
  }
  if (c.options.is_closed_loop) {
    layer.readout = weights(p.I, p.O);
    layer.readout_bias = random.numbers(p.I);
  }
  if (c.options.is_special) {
    layer.x[0] = NAN;
    layer.x[(2 * p.N + 1) * p.I + 1] = INFINITY;
    layer.x[(1 * p.N + 3) * p.I + 2] = -INFINITY;
  }
  return layer;
}

Outputs incoming_of(const Case& c, const Problem& p, Random& random) {
  const int64_t rows = p.T * p.N, features = p.D * p.O;
  Outputs incoming;
  if (c.options.dy == kRows) incoming.y = random.numbers(rows * features);
  if (c.options.dy == kUniform) {
    for (double x : random.numbers(rows)) incoming.y.insert(incoming.y.end(), features, x);
  }
  if (c.options.has_states) incoming.hn = random.numbers(p.D * p.N * p.O);
  if (c.options.has_states && p.has_cell_state()) incoming.cn = random.numbers(p.D * p.N * p.H);
  return incoming;
}

// A direction to take derivatives in.
std::pair<Layer, Outputs> direction_of(const Case& c, const Problem& p, Random& random) {
  Layer layer = layer_of(c, p, random);
  layer.sums = random.numbers(p.D * p.T * p.N * p.slots() * p.H);
  Outputs incoming = incoming_of(c, p, random);
  if (!c.options.has_tangents) {
    layer.x.clear();
    layer.h0.clear();
    layer.sums.clear();
    layer.weights[0].w_hh.clear();
    layer.weights[p.D - 1].w_ih.clear();
    layer.weights[0].w_hr.clear();
    incoming.hn.clear();
  }
  return {layer, incoming};
}

// Calls f(name, tensor of each layer) for all its tensors.
template <typename F, typename... Layers>
void each_tensor(F f, Layers&... layers)
  requires(requires { (layers.weights, ...); })
{
  f("x", layers.x...);
  f("h_0", layers.h0...);
  f("c_0", layers.c0...);
  f("slots", layers.sums...);
  for (int d = 0; d < kMaxDirections; ++d) {
    f("W_ih", layers.weights[d].w_ih...);
    f("W_hh", layers.weights[d].w_hh...);
    f("b_ih", layers.weights[d].b_ih...);
    f("b_hh", layers.weights[d].b_hh...);
    f("W_hr", layers.weights[d].w_hr...);
  }
  f("readout", layers.readout...);
  f("bias of the readout", layers.readout_bias...);
}
template <typename F, typename... All>
void each_tensor(F f, All&... outputs)
  requires(requires { (outputs.hn, ...); })
{
  f("y", outputs.y...);
  f("h_n", outputs.hn...);
  f("c_n", outputs.cn...);
}

// Tensors of N with these values, and with tangents if N is a dual number.
template <template <typename> typename Tensors, typename N>
Tensors<N> made_of(const Tensors<double>& values, const Tensors<double>& tangents) {
  Tensors<N> made;
  each_tensor(
      [](const char*, auto& to, const Vector& value, const Vector& tangent) {
        for (size_t i = 0; i < std::max(value.size(), tangent.size()); ++i) {
          const double v = value.empty() ? 0 : value[i], t = tangent.empty() ? 0 : tangent[i];
          if constexpr (requires(N n) { n.tangent; }) {
            to.push_back({decltype(N().value)(v), decltype(N().value)(t)});
          } else {
            to.push_back(N(v));
          }
        }
      },
      made, values, tangents);
  return made;
}

// What the passes give; of dual numbers, its tangents.
struct Results {
  Outputs outputs;
  Layer gradients;
  Vector x;
};

struct Operands {
  Layer layer, tangents;
  Outputs incoming, incoming_tangents;
};

template <typename A>
Results evaluate(const Problem& p, const Operands& o) {
  using N = typename A::Number;
  const reference::Reference<A> reference(p, made_of<reference::Layer, N>(o.layer, o.tangents));
  const auto gradients =
      reference.backward(made_of<reference::Outputs, N>(o.incoming, o.incoming_tangents));
  const auto number = [](N x) {
    if constexpr (requires { x.tangent; }) {
      return double(x.tangent);
    } else {
      return double(A::stored(x));
    }
  };
  const auto get = [&](const char*, Vector& to, const std::vector<N>& from) {
    for (N x : from) to.push_back(number(x));
  };
  Results results;
  each_tensor(get, results.outputs, reference.outputs);
  each_tensor(get, results.gradients, gradients);
  get("x", results.x, reference.x());
  return results;
}

enum Pass { kForward, kBackward, kSecondOrder, kPasses };
constexpr const char* kPassNames[kPasses] = {"forward", "backward", "second order"};

// What has been found of one cell and type.
class Tally {
 public:
  Tally(const CellCase& cell, const char* type) : cell_(cell.name), type_(type) {}

  int passed = 0, failed = 0;

  void add(bool ok, const std::string& what) {
    ++(ok ? passed : failed);
    if (!ok) std::printf("FAILED %s %s, %s\n", cell_, type_, what.c_str());
  }
  // One check: all tensors of one pass.
  template <typename T, typename U, typename Tensors>
  void check(const Case& c, Pass pass, const Tensors& ours, const Tensors& plain,
             const Tensors& exact) {
    std::string wrong;
    each_tensor(
        [&](const char* name, const Vector& a, const Vector& b, const Vector& r) {
          if (a.empty()) return;
          const Verdict v = judge<T, U>(a, b, r);
          Verdict& worst = worst_[pass];
          if (worst.limit == 0 || v.error / v.limit > worst.error / worst.limit) worst = v;
          if (v.ok) return;
          char text[99];
          std::snprintf(text, sizeof(text), " %s %.3g eps (limit %.3g)", name, v.error, v.limit);
          wrong += text;
        },
        ours, plain, exact);
    add(wrong.empty(), std::string(c.name) + ", " + kPassNames[pass] + ":" + wrong);
  }
  void print() const {
    std::printf("%-16s %-28s", cell_, type_);
    for (int pass = 0; pass < kPasses; ++pass) {
      const Verdict& v = worst_[pass];
      if (v.limit > 0) std::printf("  %s %.1f of %.1f eps", kPassNames[pass], v.error, v.limit);
    }
    std::printf("  %s\n", failed ? "FAILED" : "passed");
  }

 private:
  const char *cell_, *type_;
  Verdict worst_[kPasses] = {};  // the nearest to its limit
};

bool has_second_order(const Case& c) {
  const Options& o = c.options;
  return !o.is_special && !o.is_closed_loop && !o.in_place;  // which overwrites what it reads
}

// Types for frozen weights alone: inference with weights that are packed before.
template <typename T>
  requires kRoundsFactors<T>
void check(const Case& c, const Problem& p, const Operands& o, const Results& exact,
           const Results& /*exact_tangents*/, Tally* tally) {
  if (c.options.is_closed_loop) return;
  // A NaN in a row of integers makes the whole result NaN.
  if (std::is_same_v<T, F32ByI8> && c.options.is_special) return;
  KernelRun<T> frozen(c, p, o.layer);
  const Results plain = evaluate<Loop<T>>(p, o);
  tally->check<T, T>(c, kForward, frozen.frozen(), plain.outputs, exact.outputs);
  tally->add(frozen.is_guarded(), std::string(c.name) + ": wrote behind an output");
}

template <typename T>
void check(const Case& c, const Problem& p, const Operands& o, const Results& exact,
           const Results& exact_tangents, Tally* tally) {
  using U = std::conditional_t<kNarrow<T>, T, float>;  // of the plain loop
  const Results plain = evaluate<Loop<U>>(p, o);
  {
    KernelRun<T> inference(c, p, o.layer);
    tally->check<T, U>(c, kForward, inference.forward(false), plain.outputs, exact.outputs);
    if (c.options.is_closed_loop) {
      const Verdict v = judge<T, U>(inference.inputs(), plain.x, exact.x);
      tally->add(v.ok && inference.is_guarded(), std::string(c.name) + ", inputs made");
      return;
    }
    KernelRun<T> frozen(c, p, o.layer);
    tally->check<T, U>(c, kForward, frozen.frozen(), plain.outputs, exact.outputs);
    tally->add(inference.is_guarded() && frozen.is_guarded(),
               std::string(c.name) + ": wrote behind an output");
  }
  KernelRun<T> run(c, p, o.layer);
  tally->check<T, U>(c, kForward, run.forward(true), plain.outputs, exact.outputs);
  tally->check<T, U>(c, kBackward, run.backward(o.incoming), plain.gradients, exact.gradients);
  if constexpr (!kNarrow<T>) {
    if (has_second_order(c)) {
      const Results plain_tangents = evaluate<reference::Plain<Dual<float>>>(p, o);
      const auto [outputs, gradients] =
          run.second_order(o.incoming, o.tangents, o.incoming_tangents);
      tally->check<T, U>(c, kSecondOrder, outputs, plain_tangents.outputs, exact_tangents.outputs);
      tally->check<T, U>(c, kSecondOrder, gradients, plain_tangents.gradients,
                         exact_tangents.gradients);
    }
  }
  tally->add(run.is_guarded(), std::string(c.name) + ": wrote behind a result");
}

// Of one cell, all cases and those types that hold numbers of so many bits.
template <typename... T>
void check_cell(const CellCase& cell, int bits, int* passed, int* failed) {
  Tally tallies[] = {Tally(cell, Format<T>::kName)...};
  for (const Case& c : kCases) {
    Random random(bits);
    const Problem p = problem_of(c, cell, random);
    Operands o;
    o.layer = layer_of(c, p, random);
    o.incoming = incoming_of(c, p, random);
    std::tie(o.tangents, o.incoming_tangents) = direction_of(c, p, random);
    const Results exact = evaluate<reference::Plain<double>>(p, o);
    Results tangents;
    if (((!kNarrow<T> && !kRoundsFactors<T>) || ...) && has_second_order(c)) {
      tangents = evaluate<reference::Plain<Dual<double>>>(p, o);
    }
    Tally* tally = tallies;
    (check<T>(c, p, o, exact, tangents, tally++), ...);
  }
  for (const Tally& tally : tallies) {
    tally.print();
    *passed += tally.passed;
    *failed += tally.failed;
  }
}

}  // namespace
}  // namespace rnnkern

// With the argument --sets it prints the instruction sets that both it and this CPU have.
int main(int count, char** arguments) {
  using namespace rnnkern;
  if (count == 2 && arguments[1] == std::string("--sets")) {
    for (const InstructionSet& set : instruction_sets()) {
      if (set.supported()) std::puts(set.name);
    }
    return 0;
  }
  const auto start = std::chrono::steady_clock::now();
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  int passed = 0, failed = 0;
  check_functions(&passed, &failed);
  for (const CellCase& cell : kCells) {
    check_cell<float, double>(cell, Format<float>::kDigits - 1, &passed, &failed);
    check_cell<Bf16, F16, F32ByBf16, F32ByI8>(cell, Format<Bf16>::kDigits - 1, &passed, &failed);
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  std::printf("==== %d passed, %d failed in %.2fs ====\n", passed, failed, took.count());
  return failed ? 1 : 0;
}
