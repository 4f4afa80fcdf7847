// Lays out a scan of tensors of RNNKERN_ELEMENT on the GPU and queues its kernels. With
// RNNKERN_SIMT plain C++, for the stand-in.
#include <algorithm>
#include <array>
#include <iterator>
#include <stdexcept>
#include <utility>

#include "cuda/gradients.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/product.h"
#include "cuda/resident_backward.cuh"
#include "cuda/resident_forward.cuh"
#include "cuda/start.h"
#include "cuda/stepwise.cuh"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {
namespace {

template <typename T>
T* take_zeros(const Sizes& z, Queue& queue) {
  return queue.take<T>(std::max({z.I, z.H, z.O}));
}

template <typename T>
cuda::Plan plan_of(const Sizes& z, const Steps& s, bool backward, const Queue& queue) {
  return cuda::plan_for({z, s.T, s.N, cuda::numbers_of<T>(queue.tf32()), backward,
                         queue.deterministic(), queue.has_library},
                        queue.device);
}

template <typename Cell>
constexpr auto kForwardTiles = cuda::forward_tiles(Cell::kShape.gates);

// Calls f with the register tile of the plan, as a type.
template <cuda::TileShape kShape>
struct TileOf {
  static constexpr cuda::TileShape kTile = kShape;
};
template <const auto& kShapes, typename F>
bool with_tile(const cuda::Plan& plan, F f) {
  const auto pick = [&]<size_t... i>(std::index_sequence<i...>) {
    bool result = false;
    if (!((plan.tile == kShapes[i] && (result = f(TileOf<kShapes[i]>{}), true)) || ...)) {
      throw std::logic_error("no kernel has the tile that was planned");
    }
    return result;
  };
  return pick(std::make_index_sequence<std::size(kShapes)>{});
}
template <typename E, typename Cell, bool kBackward, typename F>
bool with_tile_of(const cuda::Plan& plan, F f) {
  if constexpr (kOnTensorCores<E>) {
    if constexpr (kBackward) {
      return with_tile<cuda::kBackwardTiles>(plan, f);
    } else {
      return with_tile<kForwardTiles<Cell>>(plan, f);
    }
  } else if constexpr (kBackward) {
    return with_tile<cuda::kOneByOneBackwardTiles>(plan, f);
  } else {
    return with_tile<cuda::kOneByOneForwardTiles>(plan, f);
  }
}

// The memory that a plan asks for, and zeros.
template <typename T>
Residency take_residency(const cuda::Plan& plan, const Sizes& z, const T** zeros, Queue& queue) {
  Residency r = {plan};
  const int64_t parts = int64_t(plan.row_teams) * plan.passes;
  r.flags = queue.take<int>(z.D * parts * plan.unit_blocks);
  r.exchange = queue.take<Quad>(2 * z.D * parts * plan.columns() * plan.chunks * kQuadsOfRow);
  *zeros = take_zeros<T>(z, queue);
  queue.clear_taken();
  if (r.shared_chunks < r.warp_chunks) {
    r.scratch = queue.take<Quad>(r.blocks(z.D) * r.groups * r.chunks * r.rows() * kQuadsOfRow);
  }
  return r;
}

// The rows of x as a matrix [total, I]; gathered where they do not stand so, or where some take no
// part and are wanted as zero.
template <typename T>
cuda::Matrix input_matrix(const Rows<const T>& x, const Sizes& z, const Steps& s, const T* zeros,
                          bool zero_inactive, Queue& queue) {
  const bool whole = s.start || !s.active || !zero_inactive;
  const bool dense = s.start || s.T == 1 || s.N == 1 || x.step == s.N * x.row;
  const int64_t row = s.total == 1 ? z.I : !s.start && s.N == 1 ? x.step : x.row;
  if (dense && whole && row >= z.I) return {x.data, row};
  using Kernel = GatherRows<T>;
  T* const to = queue.take<T>(s.total * z.I);
  start_kernel<Kernel>(queue, "gathering the input",
                       {kRowBlocks * queue.device.multiprocessors, kRowThreads, 0},
                       {s, x, {}, zeros, false, 0, z.I, to});
  return {to, z.I};
}

// x W_ih^T of all steps: [D, total, width], from column `first` on.
template <typename T>
struct Inputs {
  Compute<T>* data = nullptr;
  int64_t width = 0, first = 0;
};
template <typename T, typename Cell>
Inputs<T> make_inputs(const Forward<T>& f, const T* zeros, Queue& queue) {
  using A = Compute<T>;
  constexpr CellShape kShape = Cell::kShape;
  const Sizes& z = f.sizes;
  const Steps& s = f.steps;
  const int64_t gates = kShape.gates * z.H;
  Inputs<T> inputs = {nullptr, gates, 0};
  // Where what is saved is what is computed with, they are made where the slots will stand.
  if constexpr (!kNarrow<T>) {
    if (f.slots) inputs = {f.slots, kShape.slots * z.H, kShape.input_slot * z.H};
  }
  if (!inputs.data) inputs.data = queue.take<A>(z.D * s.total * inputs.width);
  const cuda::Matrix x = input_matrix(f.x, z, s, zeros, false, queue);
  for (int d = 0; d < z.D; ++d) {
    const Weights<T>& w = f.weights[d];
    multiply<T>({s.total,
                 gates,
                 z.I,
                 x,
                 {w.w_ih, w.w_ih_row, true},
                 cuda::kNumber<T>,
                 inputs.data + d * s.total * inputs.width + inputs.first,
                 inputs.width,
                 cuda::kNumber<A>},
                queue.deterministic(), queue);
  }
  return inputs;
}

template <typename T, typename Cell>
bool resident(const Forward<T>& f, const cuda::Plan& plan, Queue& queue) {
  const Sizes& z = f.sizes;
  const T* zeros = nullptr;
  const Residency r = take_residency(plan, z, &zeros, queue);
  const Inputs<T> inputs = make_inputs<T, Cell>(f, zeros, queue);
  return with_operand<T>(queue, [&](auto operand) {
    using E = decltype(operand);
    return with_tile_of<E, Cell, false>(plan, [&](auto tile) {
      using Kernel = ResidentForward<T, E, Cell, decltype(tile)::kTile>;
      return start_kernel<Kernel>(queue, "resident forward",
                                  {plan.blocks(z.D), cuda::kResidentThreads, plan.shared_bytes},
                                  {f, r, inputs.data, inputs.width, inputs.first});
    });
  });
}

template <typename T, typename Cell>
bool resident(const Backward<T>& b, const cuda::Plan& plan, const T** zeros, Queue& queue) {
  const Sizes& z = b.sizes;
  const Residency r = take_residency(plan, z, zeros, queue);
  return with_operand<T>(queue, [&](auto operand) {
    using E = decltype(operand);
    return with_tile_of<E, Cell, true>(plan, [&](auto tile) {
      using Kernel = ResidentBackward<T, E, Cell, decltype(tile)::kTile>;
      return start_kernel<Kernel>(queue, "resident backward",
                                  {plan.blocks(z.D), cuda::kResidentThreads, plan.shared_bytes},
                                  {b, r, *zeros});
    });
  });
}

// A product of each direction: of rows of [D, N, k] with its weights, to [D, N, n].
template <typename T>
void multiply_rows(const Sizes& z, const Steps& s, int64_t k, int64_t n, const T* rows,
                   const std::array<cuda::Matrix, kMaxDirections>& weights, Compute<T>* to,
                   bool fixed_order, Queue& queue) {
  for (int d = 0; d < z.D; ++d) {
    multiply<T>({s.N,
                 n,
                 k,
                 {rows + d * s.N * k, k},
                 weights[size_t(d)],
                 cuda::kNumber<T>,
                 to + d * s.N * n,
                 n,
                 cuda::kNumber<Compute<T>>},
                fixed_order, queue);
  }
}
template <typename T, typename F>
std::array<cuda::Matrix, kMaxDirections> matrices(const Weights<T> (&weights)[kMaxDirections],
                                                  F matrix) {
  return {matrix(weights[0]), matrix(weights[1])};
}

template <typename Kernel>
void start_elements(const char* name, const Sizes& z, const Steps& s, int64_t columns,
                    const typename Kernel::Arguments& arguments, Queue& queue) {
  start_kernel<Kernel>(queue, name, {element_blocks(z, s, columns), kStepThreads, 0}, arguments);
}

template <typename T, typename Cell>
bool stepwise(const Forward<T>& f, Queue& queue) {
  using Kernel = StepwiseForward<T, Cell>;
  using A = Compute<T>;
  const Sizes& z = f.sizes;
  const Steps& s = f.steps;
  const int64_t rows = z.D * s.N, gates = Cell::kShape.gates * z.H;
  const T* const zeros = take_zeros<T>(z, queue);
  queue.clear_taken();
  const Inputs<T> inputs = make_inputs<T, Cell>(f, zeros, queue);
  typename Kernel::Arguments a = {.f = f,
                                  .inputs = inputs.data,
                                  .width = inputs.width,
                                  .first_input = inputs.first,
                                  .sums = queue.take<A>(rows * gates),
                                  .h = queue.take<T>(rows * z.O)};
  if (Cell::kShape.cell_state) a.c = queue.take<A>(rows * z.H);
  if (z.projected) a.m = queue.take<T>(rows * z.H), a.y = queue.take<A>(rows * z.O);
  const bool fixed_order = queue.deterministic();
  const auto recurrent =
      matrices(f.weights, [](const auto& w) { return cuda::Matrix{w.w_hh, w.w_hh_row, true}; });
  const auto projection =
      matrices(f.weights, [](const auto& w) { return cuda::Matrix{w.w_hr, w.w_hr_row, true}; });

  start_elements<typename Kernel::Begin>("stepwise forward's begin", z, s, z.H, a, queue);
  for (a.i = 0; a.i < s.T; ++a.i) {
    multiply_rows<T>(z, s, z.O, gates, a.h, recurrent, a.sums, fixed_order, queue);
    start_elements<Kernel>("stepwise forward", z, s, z.H, a, queue);
    if (!z.projected) continue;
    multiply_rows<T>(z, s, z.H, z.O, a.m, projection, a.y, fixed_order, queue);
    start_elements<typename Kernel::Projected>("stepwise forward's projection", z, s, z.O, a,
                                               queue);
  }
  return true;
}

template <typename T, typename Cell>
bool stepwise(const Backward<T>& b, const T** zeros, Queue& queue) {
  using Kernel = StepwiseBackward<T, Cell>;
  using A = Compute<T>;
  const Sizes& z = b.sizes;
  const Steps& s = b.steps;
  const int64_t rows = z.D * s.N, gates = Cell::kShape.gates * z.H;
  *zeros = take_zeros<T>(z, queue);
  queue.clear_taken();
  typename Kernel::Arguments a = {.b = b,
                                  .zeros = *zeros,
                                  .dh = queue.take<A>(rows * z.O),
                                  .dgates = queue.take<T>(rows * gates)};
  if (Cell::kShape.reads_h) a.dh_direct = queue.take<A>(rows * z.H);
  if (Cell::kShape.cell_state) a.dc = queue.take<A>(rows * z.H);
  if (z.projected) a.dy = queue.take<T>(rows * z.O), a.dm = queue.take<A>(rows * z.H);
  const auto recurrent =
      matrices(b.weights, [](const auto& w) { return cuda::Matrix{w.w_hh, w.w_hh_row}; });
  const auto projection =
      matrices(b.weights, [](const auto& w) { return cuda::Matrix{w.w_hr, w.w_hr_row}; });

  for (a.i = 0; a.i < s.T + (b.dh0.data ? 1 : 0); ++a.i) {
    if (a.i > 0) multiply_rows<T>(z, s, gates, z.O, a.dgates, recurrent, a.dh, false, queue);
    if (z.projected) {
      start_elements<typename Kernel::Projected>("stepwise backward's projection", z, s, z.O, a,
                                                 queue);
      if (a.i == s.T) break;
      multiply_rows<T>(z, s, z.O, z.H, a.dy, projection, a.dm, false, queue);
    }
    start_elements<Kernel>("stepwise backward", z, s, z.H, a, queue);
  }
  return true;
}

// f(first slot, first gate, count) for runs of slots that the recurrent product owns and whose
// gates stand side by side in the weights.
template <typename Cell, typename F>
void for_each_run(F f) {
  constexpr CellShape kShape = Cell::kShape;
  for (int slot = 0, count; slot < kShape.gates; slot += count) {
    const int gate = kShape.recurrent_gate(slot);
    count = std::min(kShape.gates - slot, kShape.gates - gate);
    f(slot, gate, count);
  }
}

template <typename T, typename Cell>
void bias_gradients(const T* dslots, int64_t rows, int64_t H, const WeightGradients<T>& g,
                    Queue& queue) {
  using Sums = SlotSums<T>;
  constexpr int64_t kFewestRows = 256;  // of a block
  const int64_t width = Cell::kShape.slots * H;
  const int64_t column_blocks = cuda::quotient_up(width, Sums::kColumns);
  const int64_t most = kRowBlocks * queue.device.multiprocessors / column_blocks + 1;
  const int64_t row_blocks = std::min(most, cuda::quotient_up(rows, kFewestRows));
  auto* const sums = queue.take<Compute<T>>(row_blocks * width);
  start_kernel<Sums>(queue, "sums of gradients",
                     {column_blocks * row_blocks, kRowThreads, Sums::kSharedBytes},
                     {dslots, rows, width, column_blocks, row_blocks, sums});
  start_kernel<BiasGradients<T, Cell>>(queue, "gradients of biases",
                                       {cuda::quotient_up(width, kRowThreads), kRowThreads, 0},
                                       {sums, row_blocks, H, g.b_ih, g.b_hh});
}

// After the loop, one product each over all rows: dW_ih, dW_hh, dW_hr, biases and dx.
template <typename T, typename Cell>
void gradients(const Backward<T>& b, const T* zeros, Queue& queue) {
  constexpr CellShape kShape = Cell::kShape;
  constexpr cuda::Number kT = cuda::kNumber<T>;
  const Sizes& z = b.sizes;
  const Steps& s = b.steps;
  const int64_t H = z.H, gates = kShape.gates * H, width = kShape.slots * H;
  bool wants_w_ih = false;
  for (int d = 0; d < z.D; ++d) wants_w_ih = wants_w_ih || b.gradients[d].w_ih;
  cuda::Matrix x = {};
  if (wants_w_ih) x = input_matrix(b.x, z, s, zeros, true, queue);
  T* previous = nullptr;
  for (int d = 0; d < z.D; ++d) {
    const WeightGradients<T>& g = b.gradients[d];
    const Weights<T>& w = b.weights[d];
    const T* const dslots = b.dslots + d * s.total * width;
    const T* const dinputs = dslots + kShape.input_slot * H;
    if (g.w_ih) {
      multiply<T>({gates, z.I, s.total, {dinputs, width, true}, x, kT, g.w_ih, z.I, kT}, false,
                  queue);
    }
    if (g.w_hh) {
      using Kernel = GatherRows<T>;
      if (!previous) previous = queue.take<T>(s.total * z.O);
      start_kernel<Kernel>(queue, "gathering states",
                           {kRowBlocks * queue.device.multiprocessors, kRowThreads, 0},
                           {s, columns(b.y, d * z.O), b.h0, zeros, true, d, z.O, previous});
      for_each_run<Cell>([&](int slot, int gate, int count) {
        multiply<T>({count * H,
                     z.O,
                     s.total,
                     {dslots + slot * H, width, true},
                     {previous, z.O},
                     kT,
                     g.w_hh + gate * H * z.O,
                     z.O,
                     kT},
                    false, queue);
      });
    }
    if (g.w_hr) {
      multiply<T>({z.O,
                   H,
                   s.total,
                   {b.dprojected + d * s.total * z.O, z.O, true},
                   {b.unprojected + d * s.total * H, H},
                   kT,
                   g.w_hr,
                   H,
                   kT},
                  false, queue);
    }
    if (g.b_ih || g.b_hh) bias_gradients<T, Cell>(dslots, s.total, H, g, queue);
    if (b.dx.data) {
      // Dense, time first: as made for the call.
      multiply<T>({s.total,
                   z.I,
                   gates,
                   {dinputs, width},
                   {w.w_ih, w.w_ih_row},
                   kT,
                   b.dx.data,
                   z.I,
                   kT,
                   d > 0},
                  false, queue);
    }
  }
}

}  // namespace

template <>
bool start<RNNKERN_CELL>(const Forward<RNNKERN_ELEMENT>& f, Queue& queue) {
  using T = RNNKERN_ELEMENT;
  using Cell = RNNKERN_CELL;
  const cuda::Plan plan = plan_of<T>(f.sizes, f.steps, false, queue);
  return plan.resident ? resident<T, Cell>(f, plan, queue) : stepwise<T, Cell>(f, queue);
}

template <>
bool start<RNNKERN_CELL>(const Backward<RNNKERN_ELEMENT>& b, Queue& queue) {
  using T = RNNKERN_ELEMENT;
  using Cell = RNNKERN_CELL;
  const cuda::Plan plan = plan_of<T>(b.sizes, b.steps, true, queue);
  const T* zeros = nullptr;
  if (!(plan.resident ? resident<T, Cell>(b, plan, &zeros, queue)
                      : stepwise<T, Cell>(b, &zeros, queue))) {
    return false;
  }
  gradients<T, Cell>(b, zeros, queue);
  return true;
}

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
