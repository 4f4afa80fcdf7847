// Lays out a scan of tensors of RNNKERN_ELEMENT on the GPU and queues its kernels. With
// RNNKERN_SIMT plain C++, for the stand-in.
#include <algorithm>
#include <iterator>
#include <string>
#include <utility>

#include "cuda/gradients.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/plain_backward.cuh"
#include "cuda/plain_forward.cuh"
#include "cuda/resident_backward.cuh"
#include "cuda/resident_forward.cuh"
#include "cuda/start.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {
namespace {

#ifdef RNNKERN_SIMT
constexpr int kThreads = 64;  // fibers are dear
#else
constexpr int kThreads = kPlainThreads;
#endif

// The plain tier. Batch rows first, for their teams need not wait for each other; then units, as
// many blocks as run at once, one a multiprocessor.
Teams teams_for(const Sizes& z, int64_t N, const cuda::Device& device) {
  const int64_t most = device.multiprocessors / z.D > 1 ? device.multiprocessors / z.D : 1;
  const int64_t tiles = (N + kRowTile - 1) / kRowTile;
  const int64_t groups = (z.H + kThreads / kWarp - 1) / (kThreads / kWarp);
  Teams teams;
  teams.row_blocks = int(tiles < most ? (tiles > 1 ? tiles : 1) : most);
  const int64_t left = most / teams.row_blocks;
  teams.unit_blocks = int(groups < left ? groups : left);
  return teams;
}

int blocks_of(const Sizes& z, const Teams& teams) {
  return z.D * teams.row_blocks * teams.unit_blocks;
}

template <typename T>
T* take_zeros(const Sizes& z, Queue& queue) {
  return queue.take<T>(std::max({z.I, z.H, z.O}));
}

template <typename T, typename Cell>
bool plain(const Forward<T>& f, Queue& queue) {
  using Kernel = PlainForward<T, Cell>;
  const Sizes& z = f.sizes;
  Teams teams = teams_for(z, f.steps.N, queue.device);
  teams.flags = queue.take<int>(blocks_of(z, teams));
  typename Kernel::Arguments arguments = {f, teams, take_zeros<T>(z, queue), nullptr, nullptr};
  queue.clear_taken();
  const int64_t rows = z.D * f.steps.N;
  if (z.projected && !f.unprojected) arguments.unprojected = queue.take<T>(rows * z.H);
  if (kCarriesCells<T, Cell>) arguments.carried = queue.take<Compute<T>>(rows * z.H);
  return start_kernel<Kernel>(queue, "plain forward",
                              {blocks_of(z, teams), kThreads, Kernel::kSharedBytes}, arguments);
}

template <typename T, typename Cell>
bool plain(const Backward<T>& b, const T** zeros, Queue& queue) {
  using Kernel = PlainBackward<T, Cell>;
  using A = Compute<T>;
  const Sizes& z = b.sizes;
  Teams teams = teams_for(z, b.steps.N, queue.device);
  teams.flags = queue.take<int>(blocks_of(z, teams));
  *zeros = take_zeros<T>(z, queue);
  typename Kernel::Arguments arguments = {b, teams, *zeros, nullptr, nullptr, nullptr};
  queue.clear_taken();
  const int64_t rows = z.D * b.steps.N;
  arguments.dh = queue.take<A>(rows * z.O);
  if (Cell::kShape.cell_state) arguments.dc = queue.take<A>(rows * z.H);
  if (z.projected) arguments.dm = queue.take<A>(rows * z.H);
  return start_kernel<Kernel>(queue, "plain backward",
                              {blocks_of(z, teams), kThreads, Kernel::kSharedBytes}, arguments);
}

// As which float32 is multiplied, and all else as it is.
template <typename T, typename F>
bool with_operand(const Queue& queue, F f) {
  if constexpr (std::is_same_v<T, float>) {
    if (queue.tf32()) return f(Tf32{});
  }
  return f(T{});
}

// The library takes the products of whole matrices; not those of nothing.
bool has_products(const Sizes& z, const Steps& s) {
  return cuda::has_library() && s.total > 0 && z.I > 0;
}

template <typename T>
cuda::Plan plan_of(const Sizes& z, const Steps& s, bool backward, const Queue& queue) {
  if (!has_products(z, s)) return {};
  return cuda::plan_for(
      {z, s.T, s.N, cuda::numbers_of<T>(queue.tf32()), backward, queue.deterministic()},
      queue.device);
}

// Calls f with the register tile of the plan, as a type.
template <int kRowTiles, int kColumnTiles>
struct TileOf {
  static constexpr int kRow = kRowTiles, kColumn = kColumnTiles;
};
template <const auto& kShapes, typename F>
bool with_tile(const cuda::Plan& plan, F f) {
  const auto pick = [&]<size_t... i>(std::index_sequence<i...>) {
    bool result = false;
    ((plan.row_tiles == kShapes[i].row_tiles && plan.column_tiles == kShapes[i].column_tiles &&
      (result = f(TileOf<kShapes[i].row_tiles, kShapes[i].column_tiles>{}), true)) ||
     ...);
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
      return with_tile<cuda::kForwardTiles<Cell::kShape.gates>>(plan, f);
    }
  } else if constexpr (kBackward) {
    return with_tile<cuda::kPlainBackwardTiles>(plan, f);
  } else {
    return with_tile<cuda::kPlainForwardTiles>(plan, f);
  }
}

// The memory that a plan asks for, and zeros.
template <typename T>
Residency take_residency(const cuda::Plan& plan, const Sizes& z, const T** zeros, Queue& queue) {
  constexpr int kQuads = cuda::kChunkBytes / int(sizeof(Quad));
  Residency r = {plan};
  const int64_t parts = int64_t(plan.row_teams) * plan.passes;
  r.flags = queue.take<int>(z.D * parts * plan.unit_blocks);
  r.exchange = queue.take<Quad>(2 * z.D * parts * plan.columns() * plan.chunks * kQuads);
  *zeros = take_zeros<T>(z, queue);
  queue.clear_taken();
  r.streamed = queue.take<Quad>(r.blocks(z.D) * r.groups * (r.chunks - r.resident_chunks) *
                                r.rows() * kQuads);
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

template <typename T, typename Cell>
bool resident(const Forward<T>& f, const cuda::Plan& plan, Queue& queue) {
  using A = Compute<T>;
  constexpr CellShape kShape = Cell::kShape;
  const Sizes& z = f.sizes;
  const Steps& s = f.steps;
  const T* zeros = nullptr;
  const Residency r = take_residency(plan, z, &zeros, queue);

  // Where what is saved is what is computed with, the products are made where the slots will stand.
  const int64_t gates = kShape.gates * z.H;
  A* inputs = nullptr;
  int64_t width = gates, first = 0;
  if constexpr (!kNarrow<T>) {
    inputs = f.slots;
    if (inputs) width = kShape.slots * z.H, first = kShape.input_slot * z.H;
  }
  if (!inputs) inputs = queue.take<A>(z.D * s.total * width);
  const cuda::Matrix x = input_matrix(f.x, z, s, zeros, false, queue);
  for (int d = 0; d < z.D; ++d) {
    const Weights<T>& w = f.weights[d];
    queue.multiply({s.total,
                    gates,
                    z.I,
                    x,
                    {w.w_ih, w.w_ih_row, true},
                    cuda::kNumber<T>,
                    inputs + d * s.total * width + first,
                    width,
                    cuda::kNumber<A>});
  }
  return with_operand<T>(queue, [&](auto operand) {
    using E = decltype(operand);
    return with_tile_of<E, Cell, false>(plan, [&](auto tile) {
      using Kernel = ResidentForward<T, E, Cell, decltype(tile)::kRow, decltype(tile)::kColumn>;
      return start_kernel<Kernel>(
          queue, "resident forward",
          {int(plan.blocks(z.D)), cuda::kResidentThreads, plan.shared_bytes},
          {f, r, inputs, width, first});
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
      using Kernel = ResidentBackward<T, E, Cell, decltype(tile)::kRow, decltype(tile)::kColumn>;
      return start_kernel<Kernel>(
          queue, "resident backward",
          {int(plan.blocks(z.D)), cuda::kResidentThreads, plan.shared_bytes}, {b, r, *zeros});
    });
  });
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
  const int64_t column_blocks = (width + Sums::kColumns - 1) / Sums::kColumns;
  const int64_t most = kRowBlocks * queue.device.multiprocessors / column_blocks + 1;
  const int64_t row_blocks = std::min(most, (rows + kFewestRows - 1) / kFewestRows);
  auto* const sums = queue.take<Compute<T>>(row_blocks * width);
  start_kernel<Sums>(queue, "sums of gradients",
                     {int(column_blocks * row_blocks), kRowThreads, Sums::kSharedBytes},
                     {dslots, rows, width, column_blocks, row_blocks, sums});
  start_kernel<BiasGradients<T, Cell>>(
      queue, "gradients of biases", {int((width + kRowThreads - 1) / kRowThreads), kRowThreads, 0},
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
      queue.multiply({gates, z.I, s.total, {dinputs, width, true}, x, kT, g.w_ih, z.I, kT});
    }
    if (g.w_hh) {
      using Kernel = GatherRows<T>;
      if (!previous) previous = queue.take<T>(s.total * z.O);
      start_kernel<Kernel>(queue, "gathering states",
                           {kRowBlocks * queue.device.multiprocessors, kRowThreads, 0},
                           {s, columns(b.y, d * z.O), b.h0, zeros, true, d, z.O, previous});
      for_each_run<Cell>([&](int slot, int gate, int count) {
        queue.multiply({count * H,
                        z.O,
                        s.total,
                        {dslots + slot * H, width, true},
                        {previous, z.O},
                        kT,
                        g.w_hh + gate * H * z.O,
                        z.O,
                        kT});
      });
    }
    if (g.w_hr) {
      queue.multiply({z.O,
                      H,
                      s.total,
                      {b.dprojected + d * s.total * z.O, z.O, true},
                      {b.unprojected + d * s.total * H, H},
                      kT,
                      g.w_hr,
                      H,
                      kT});
    }
    if (g.b_ih || g.b_hh) bias_gradients<T, Cell>(dslots, s.total, H, g, queue);
    if (b.dx.data) {
      // Dense, time first: as made for the call.
      queue.multiply({s.total,
                      z.I,
                      gates,
                      {dinputs, width},
                      {w.w_ih, w.w_ih_row},
                      kT,
                      b.dx.data,
                      z.I,
                      kT,
                      d > 0});
    }
  }
}

}  // namespace

template <>
bool start<RNNKERN_CELL>(const Forward<RNNKERN_ELEMENT>& f, Queue& queue) {
  using T = RNNKERN_ELEMENT;
  using Cell = RNNKERN_CELL;
  const cuda::Plan plan = plan_of<T>(f.sizes, f.steps, false, queue);
  return plan.resident ? resident<T, Cell>(f, plan, queue) : plain<T, Cell>(f, queue);
}

template <>
bool start<RNNKERN_CELL>(const Backward<RNNKERN_ELEMENT>& b, Queue& queue) {
  using T = RNNKERN_ELEMENT;
  using Cell = RNNKERN_CELL;
  const cuda::Plan plan = plan_of<T>(b.sizes, b.steps, true, queue);
  const T* zeros = nullptr;
  const bool started =
      plan.resident ? resident<T, Cell>(b, plan, &zeros, queue) : plain<T, Cell>(b, &zeros, queue);
  if (!started) return false;
  if (has_products(b.sizes, b.steps)) {
    gradients<T, Cell>(b, zeros, queue);
  } else {
    start_kernel<PlainGradients<T, Cell>>(queue, "plain gradients",
                                          {queue.device.multiprocessors, kThreads, 0}, {b, zeros});
  }
  return true;
}

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
