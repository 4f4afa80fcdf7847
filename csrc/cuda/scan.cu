// Lays out a scan of tensors of RNNKERN_ELEMENT on the GPU and queues its kernels. With
// RNNKERN_SIMT this is plain C++, for the stand-in.
#include <algorithm>
#include <array>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

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

template <typename T, typename Cell>
T* take_zeros(const Sizes& z, Queue& queue) {
  return queue.take<T>(std::max({z.I, z.H, z.O, Cell::kShape.planes() * z.H}));
}

// The rows of x as a matrix [total, I]. It has no data if the rows are not equally far apart in
// memory, or if some of them must count as zero: they have to be gathered then.
template <typename T>
cuda::Matrix input_matrix(const Rows<const T>& x, const Sizes& z, const Steps& s,
                          bool zero_inactive) {
  const bool whole = s.is_packed() || !s.active || !zero_inactive;
  const bool dense = s.is_packed() || s.T == 1 || s.N == 1 || x.step == s.N * x.row;
  const int64_t row = s.total == 1 ? z.I : !s.is_packed() && s.N == 1 ? x.step : x.row;
  return {dense && whole && row >= z.I ? x.data : nullptr, row};
}

template <typename T>
cuda::Plan plan_of(const Forward<T>& f, const Queue& queue) {
  const cuda::Problem problem = {.sizes = f.sizes,
                                 .T = f.steps.T,
                                 .N = f.steps.N,
                                 .numbers = cuda::numbers_of<T>(queue.tf32()),
                                 .deterministic = queue.deterministic(),
                                 .has_library = queue.has_library,
                                 .inputs_are_saved = cuda::kSavesInputs<T> && f.slots,
                                 .gathers_input = !input_matrix(f.x, f.sizes, f.steps, false).data};
  return cuda::plan_for(problem, queue.device);
}
template <typename T>
cuda::Plan plan_of(const Backward<T>& b, const Queue& queue) {
  const cuda::Problem problem = {.sizes = b.sizes,
                                 .T = b.steps.T,
                                 .N = b.steps.N,
                                 .numbers = cuda::numbers_of<T>(queue.tf32()),
                                 .backward = true,
                                 .deterministic = queue.deterministic(),
                                 .has_library = queue.has_library};
  return cuda::plan_for(problem, queue.device);
}

// The steps that a scan visits as numbers `visits`.
Range times_of(const Steps& s, int direction, const Range& visits) {
  if (direction == 0) return visits;
  return {s.T - visits.end, s.T - visits.begin};
}
// The rows of storage that belong to some steps.
Range rows_of(const Steps& s, const Range& times) {
  const auto row = [&](int64_t t) {
    return !s.is_packed() ? t * s.N : t == s.T ? s.total : s.host_start[t];
  };
  return {row(times.begin), row(times.end)};
}
// The address that row 0 would have in memory that begins with row `first`.
template <typename U>
U* origin(U* data, int64_t first, int64_t width) {
  return reinterpret_cast<U*>(reinterpret_cast<uintptr_t>(data) -
                              uintptr_t(first * width) * sizeof(U));
}
// The largest number of rows in a window of so many steps.
int64_t most_rows(const Steps& s, int64_t window) { return std::min(s.total, window * s.N); }

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
template <typename T, typename Cell>
Residency take_residency(const cuda::Plan& plan, const char* kernel, const Sizes& z,
                         const T** zeros, Queue& queue) {
  Residency r = {plan};
  if (queue.runs()) r.gave_up = cuda::place_to_give_up(queue.name_of(kernel));
  const int64_t parts = int64_t(plan.row_teams) * plan.passes;
  r.flags = queue.take<int>(z.D * parts * plan.unit_blocks);
  r.exchange = queue.take<Quad>(cuda::kExchangeBuffers * z.D * parts * plan.columns() *
                                plan.chunks * kQuadsOfRow);
  *zeros = take_zeros<T, Cell>(z, queue);
  queue.clear_taken();
  if (r.held_chunks + r.shared_chunks < r.warp_chunks) {
    r.scratch = queue.take<Quad>(r.blocks(z.D) * r.groups * r.chunks * r.rows() * kQuadsOfRow);
  }
  return r;
}

// Row r of the result begins at `to` + r * width.
template <typename T>
void gather(const char* name, const Steps& s, const Rows<const T>& rows,
            const State<const T>& initial, bool is_state, int direction, int64_t width,
            const T* zeros, const Range& times, T* to, Queue& queue) {
  start_kernel<GatherRows<T>>(
      queue, name, {kRowBlocks * queue.device.multiprocessors, kRowThreads, 0},
      {s, rows, initial, zeros, is_state, direction, width, times.begin, times.end, to});
}
template <typename T>
void gather_input(const Steps& s, const Rows<const T>& x, int64_t I, const T* zeros,
                  const Range& times, T* to, Queue& queue) {
  gather("gathering the input", s, x, {}, false, 0, I, zeros, times, to, queue);
}

// Computes x W_ih^T, a window of steps at a time, in the order of the scan.
template <typename T, typename Cell>
class InputProducts {
  using A = Compute<T>;
  static constexpr CellShape kShape = Cell::kShape;

 public:
  // Holds the results of the last `buffers` windows.
  InputProducts(const Forward<T>& f, int64_t window, int buffers, const T* zeros, Queue& queue)
      : f_(f),
        zeros_(zeros),
        queue_(queue),
        window_(window),
        rows_(most_rows(f.steps, window)),
        x_(input_matrix(f.x, f.sizes, f.steps, false)),
        width_(kShape.gates * f.sizes.H) {
    // If the slots are saved in the type in which they are computed, the input products are stored
    // in their memory.
    if constexpr (cuda::kSavesInputs<T>) {
      if (f.slots) {
        width_ = kShape.stored() * f.sizes.H;
        to_.push_back(f.slots + kShape.input_slot * f.sizes.H);
      }
    }
    while (to_.empty() || int(to_.size()) < std::min<int64_t>(buffers, count())) {
      to_.push_back(queue.take<A>(f.sizes.D * rows_ * width_));
    }
    if (!x_.data) gathered_ = queue.take<T>(rows_ * f.sizes.I);
  }

  int64_t count() const { return window_ ? cuda::quotient_up(f_.steps.T, window_) : 0; }
  Range visits(int64_t index) const {
    return {index * window_, std::min(f_.steps.T, (index + 1) * window_)};
  }

  // Queues the products of a window.
  Inputs<A> make(int64_t index) const {
    const Sizes& z = f_.sizes;
    const Steps& s = f_.steps;
    Inputs<A> inputs = {{}, width_};
    for (int d = 0; d < z.D; ++d) {
      const Weights<T>& w = f_.weights[d];
      const Range times = times_of(s, d, visits(index)), rows = rows_of(s, times);
      A* const to = to_[size_t(index) % to_.size()] + d * rows_ * width_;
      cuda::Matrix x = x_;
      if (x.data) {
        x.data = f_.x.data + rows.begin * x.row;
      } else {
        if (d == 0 || count() > 1) {
          gather_input(s, f_.x, z.I, zeros_, times, origin(gathered_, rows.begin, z.I), queue_);
        }
        x = {gathered_, z.I};
      }
      multiply<T>({rows.end - rows.begin,
                   kShape.gates * z.H,
                   z.I,
                   x,
                   {w.w_ih, w.w_ih_row, true},
                   cuda::kNumber<T>,
                   to,
                   width_,
                   cuda::kNumber<A>},
                  queue_.deterministic(), queue_);
      inputs.rows[d] = origin(to, rows.begin, width_);
    }
    return inputs;
  }

 private:
  const Forward<T>& f_;
  const T* const zeros_;
  Queue& queue_;
  const int64_t window_, rows_;  // steps, and rows of storage that a buffer has for them
  const cuda::Matrix x_;
  int64_t width_;
  std::vector<A*> to_;
  T* gathered_ = nullptr;
};

template <typename T, typename Cell>
bool resident(const Forward<T>& f, const cuda::Plan& plan, Queue& queue) {
  const Sizes& z = f.sizes;
  const T* zeros = nullptr;
  constexpr char kName[] = "resident forward";
  const Residency r = take_residency<T, Cell>(plan, kName, z, &zeros, queue);
  const InputProducts<T, Cell> products(f, plan.window, 2, zeros, queue);
  const int64_t count = products.count();
  Compute<T>* kept = nullptr;
  if (count > 1) kept = queue.take<Compute<T>>(plan.blocks(z.D) * cuda::kept_count(plan, 0));
  const auto scan = [&](const Range& visits, const Inputs<Compute<T>>& inputs) {
    return with_operand<T>(queue, [&](auto operand) {
      using E = decltype(operand);
      return with_tile_of<E, Cell, false>(plan, [&](auto tile) {
        using Kernel = ResidentForward<T, E, Cell, decltype(tile)::kTile>;
        return start_kernel<Kernel>(queue, kName,
                                    {plan.blocks(z.D), cuda::kResidentThreads, plan.shared_bytes},
                                    {f, r, inputs, visits.begin, visits.end, kept});
      });
    });
  };
  if (count == 1) return scan(products.visits(0), products.make(0));
  // While the scan goes through a window, the product of the next one is computed beside it. That
  // product waits for the scan of the window before, which reads the same buffer.
  Inputs<Compute<T>> next;
  queue.beside([&] { next = products.make(0); });
  for (int64_t i = 0; i < count; ++i) {
    const Inputs<Compute<T>> inputs = next;
    queue.join();
    if (i + 1 < count) queue.beside([&] { next = products.make(i + 1); });
    if (!scan(products.visits(i), inputs)) return false;
  }
  return true;
}

template <typename T, typename Cell>
bool resident(const Backward<T>& b, const cuda::Plan& plan, const T** zeros, Queue& queue) {
  const Sizes& z = b.sizes;
  constexpr char kName[] = "resident backward";
  const Residency r = take_residency<T, Cell>(plan, kName, z, zeros, queue);
  return with_operand<T>(queue, [&](auto operand) {
    using E = decltype(operand);
    return with_tile_of<E, Cell, true>(plan, [&](auto tile) {
      using Kernel = ResidentBackward<T, E, Cell, decltype(tile)::kTile>;
      return start_kernel<Kernel>(queue, kName,
                                  {plan.blocks(z.D), cuda::kResidentThreads, plan.shared_bytes},
                                  {b, r, *zeros});
    });
  });
}

// A product for each direction: rows [count, k] times its weights are written to [count, n], or
// added if `adds`. In memory the directions are `apart` rows apart.
template <typename T>
struct RowProducts {
  int64_t count, apart, k, n;
  const T* rows;
  Compute<T>* to;
  bool adds = false;
};
template <typename T>
void multiply_rows(const Sizes& z, const RowProducts<T>& p,
                   const std::array<cuda::Matrix, kMaxDirections>& weights, bool fixed_order,
                   Queue& queue) {
  for (int d = 0; d < z.D; ++d) {
    if (!weights[size_t(d)].data) continue;
    multiply<T>({p.count,
                 p.n,
                 p.k,
                 {p.rows + d * p.apart * p.k, p.k},
                 weights[size_t(d)],
                 cuda::kNumber<T>,
                 p.to + d * p.apart * p.n,
                 p.n,
                 cuda::kNumber<Compute<T>>,
                 p.adds},
                fixed_order, queue);
  }
}
template <typename T, typename F>
std::array<cuda::Matrix, kMaxDirections> matrices(const Weights<T> (&weights)[kMaxDirections],
                                                  F matrix) {
  return {matrix(weights[0]), matrix(weights[1])};
}

// W_hh and W_hr of each direction, transposed in the forward pass. A matrix that does not exist has
// no data.
template <typename T>
std::array<cuda::Matrix, kMaxDirections> recurrent_matrices(
    const Weights<T> (&weights)[kMaxDirections], bool transposed) {
  return matrices(weights,
                  [&](const auto& w) { return cuda::Matrix{w.w_hh, w.w_hh_row, transposed}; });
}
template <typename T>
std::array<cuda::Matrix, kMaxDirections> projection_matrices(
    const Weights<T> (&weights)[kMaxDirections], bool transposed) {
  return matrices(weights,
                  [&](const auto& w) { return cuda::Matrix{w.w_hr, w.w_hr_row, transposed}; });
}

template <typename Kernel>
void start_elements(const char* name, const Sizes& z, const Steps& s, int64_t columns,
                    const typename Kernel::Arguments& arguments, Queue& queue) {
  start_kernel<Kernel>(queue, name, {element_blocks(z, s, columns), kStepThreads, 0}, arguments);
}

template <typename T, typename Cell>
bool stepwise(const Forward<T>& f, const cuda::Plan& plan, Queue& queue) {
  using Kernel = StepwiseForward<T, Cell>;
  using A = Compute<T>;
  const Sizes& z = f.sizes;
  const Steps& s = f.steps;
  const int64_t rows = z.D * s.N, gates = Cell::kShape.gates * z.H;
  const T* const zeros = take_zeros<T, Cell>(z, queue);
  queue.clear_taken();
  const InputProducts<T, Cell> products(f, plan.window, 1, zeros, queue);
  typename Kernel::Arguments a = {
      .f = f, .inputs = {}, .sums = queue.take<A>(rows * gates), .h = queue.take<T>(rows * z.O)};
  if (Cell::kShape.cell_state) a.c = queue.take<A>(rows * Cell::kShape.planes() * z.H);
  if (z.projected) a.m = queue.take<T>(rows * z.H), a.y = queue.take<A>(rows * z.O);
  const bool fixed_order = queue.deterministic();
  const auto recurrent = recurrent_matrices(f.weights, true);
  const auto projection = projection_matrices(f.weights, true);

  start_elements<typename Kernel::Begin>("stepwise forward's begin", z, s, z.H, a, queue);
  for (; a.i < s.T; ++a.i) {
    if (a.i % plan.window == 0) a.inputs = products.make(a.i / plan.window);
    multiply_rows<T>(z, {s.N, s.N, z.O, gates, a.h, a.sums}, recurrent, fixed_order, queue);
    start_elements<Kernel>("stepwise forward", z, s, z.H, a, queue);
    if (!z.projected) continue;
    multiply_rows<T>(z, {s.N, s.N, z.H, z.O, a.m, a.y}, projection, fixed_order, queue);
    start_elements<typename Kernel::Projected>("stepwise forward's projection", z, s, z.O, a,
                                               queue);
  }
  return true;
}

// A matrix of gradients that is the sum of products over windows of steps. If there are several
// windows, it is summed in the type that is computed with, and rounded once.
template <typename T>
class SumOfProducts {
  using A = Compute<T>;

 public:
  // If `to` is null, the matrix is not wanted.
  SumOfProducts(T* to, int64_t rows, int64_t columns, int64_t windows, Queue& queue)
      : to_(to), rows_(rows), columns_(columns), queue_(queue) {
    if (kNarrow<T> && to && windows > 1) sums_ = queue.take<A>(rows * columns);
  }

  // Adds a^T b over k to the rows from `first` on.
  void add(int64_t first, int64_t rows, int64_t k, const cuda::Matrix& a, const cuda::Matrix& b,
           bool is_first_window) {
    if (!to_) return;
    void* const to = sums_ ? static_cast<void*>(sums_ + first * columns_) : to_ + first * columns_;
    multiply<T>({rows, columns_, k, a, b, cuda::kNumber<T>, to, columns_,
                 sums_ ? cuda::kNumber<A> : cuda::kNumber<T>, !is_first_window},
                false, queue_);
  }
  void finish() {
    if constexpr (kNarrow<T>) {
      if (!sums_) return;
      start_kernel<RoundNumbers<T>>(
          queue_, "rounding of gradients",
          {cuda::quotient_up(rows_ * columns_, kRowThreads), kRowThreads, 0},
          {sums_, rows_ * columns_, to_});
    }
  }

 private:
  T* const to_;
  A* sums_ = nullptr;
  const int64_t rows_, columns_;
  Queue& queue_;
};

// The operands of a pass by order: those of backward alone, or values and their tangents, whose
// gradients are wanted (SecondOrder of scan.h).
template <typename T, int kOrders>
using ByOrder = std::array<const Backward<T>*, kOrders>;

// Calls f(order of the gradients of slots, order of the other factor, whether it is the first
// product) for the products whose sum is a gradient: two if there are tangents, by the product
// rule.
template <int kOrders, typename F>
void for_each_product(F f) {
  if constexpr (kOrders == 1) {
    f(0, 0, true);
  } else {
    f(1, 0, true);
    f(0, 1, false);
  }
}

// The gradients of projections, a window of steps at a time. The backward pass leaves their left
// factors in memory.
template <typename T, int kOrders>
class ProjectionGradients {
 public:
  ProjectionGradients(const ByOrder<T, kOrders>& by, Queue& queue)
      : by_(by),
        z_(by[0]->sizes),
        s_(by[0]->steps),
        window_(cuda::window_steps(s_.T, kOrders * z_.D * s_.N * z_.O * int64_t(sizeof(T)), 1)),
        rows_(most_rows(s_, window_)) {
    for (int d = 0; d < z_.D; ++d) {
      T* const to = by.back()->gradients[d].w_hr;
      sums_.emplace_back(to, z_.O, z_.H, cuda::quotient_up(s_.T, window_), queue);
      for (int k = 0; k < kOrders; ++k) {
        dprojected_[k][d] = to ? queue.take<T>(rows_ * z_.O) : nullptr;
      }
    }
  }

  // Called before step number i, counted as the backward pass visits them.
  void begin_step(int64_t i, T* (&dprojected)[kOrders][kMaxDirections]) const {
    if (i % window_) return;
    for (int k = 0; k < kOrders; ++k) {
      for (int d = 0; d < z_.D; ++d) {
        T* const own = dprojected_[k][d];
        dprojected[k][d] = own ? origin(own, rows(d, i).begin, z_.O) : nullptr;
      }
    }
  }
  void end_step(int64_t i) {
    if ((i + 1) % window_ && i + 1 < s_.T) return;
    const int64_t first = i / window_ * window_;
    for (int d = 0; d < z_.D; ++d) {
      const Range own = rows(d, first);
      for_each_product<kOrders>([&](int k, int other, bool is_first) {
        const T* const unprojected =
            by_[size_t(other)]->unprojected + (d * s_.total + own.begin) * z_.H;
        sums_[size_t(d)].add(0, z_.O, own.end - own.begin, {dprojected_[k][d], z_.O, true},
                             {unprojected, z_.H}, first == 0 && is_first);
      });
    }
  }
  void finish() {
    for (SumOfProducts<T>& sum : sums_) sum.finish();
  }

 private:
  // The rows of the window that begins with step number `first`. The backward pass goes the other
  // way through time.
  Range rows(int d, int64_t first) const {
    return rows_of(s_, times_of(s_, 1 - d, {first, std::min(s_.T, first + window_)}));
  }

  const ByOrder<T, kOrders> by_;
  const Sizes& z_;
  const Steps& s_;
  const int64_t window_, rows_;
  std::vector<SumOfProducts<T>> sums_;
  T* dprojected_[kOrders][kMaxDirections] = {};
};

template <typename T, typename Cell, int kOrders>
void stepwise(const ByOrder<T, kOrders>& by, const T* zeros, Queue& queue) {
  using Kernel = StepwiseBackward<T, Cell, kOrders>;
  using A = Compute<T>;
  const Sizes& z = by[0]->sizes;
  const Steps& s = by[0]->steps;
  const int64_t rows = kOrders * s.N, gates = Cell::kShape.gates * z.H;
  typename Kernel::Arguments a = {.by = {},
                                  .zeros = zeros,
                                  .dh = queue.take<A>(z.D * rows * z.O),
                                  .dgates = queue.take<T>(z.D * rows * gates)};
  for (int k = 0; k < kOrders; ++k) a.by[k] = *by[size_t(k)];
  if (Cell::kShape.reads_h) a.dh_direct = queue.take<A>(z.D * rows * z.H);
  if (Cell::kShape.cell_state) {
    a.dc = queue.take<A>(z.D * rows * Cell::kShape.planes() * z.H);
  }
  if (z.projected) {
    a.dy = queue.take<T>(z.D * rows * z.O), a.dm = queue.take<A>(z.D * rows * z.H);
  }
  // Multiplies all orders by a matrix, and adds the values times its tangent to the tangents.
  const auto multiply_all = [&](auto matrices_of, int64_t k, int64_t n, const T* from, A* to) {
    multiply_rows<T>(z, {rows, rows, k, n, from, to}, matrices_of(by[0]->weights, false), false,
                     queue);
    if constexpr (kOrders == 2) {
      multiply_rows<T>(z, {s.N, rows, k, n, from, to + s.N * n, true},
                       matrices_of(by[1]->weights, false), false, queue);
    }
  };
  const bool wants_dh0 = by.back()->dh0.data;

  std::optional<ProjectionGradients<T, kOrders>> projections;
  if (z.projected) projections.emplace(by, queue);
  for (a.i = 0; a.i < s.T + (wants_dh0 ? 1 : 0); ++a.i) {
    if (projections && a.i < s.T) projections->begin_step(a.i, a.dprojected);
    if (a.i > 0) multiply_all(recurrent_matrices<T>, gates, z.O, a.dgates, a.dh);
    if (z.projected) {
      start_elements<typename Kernel::Projected>("stepwise backward's projection", z, s, z.O, a,
                                                 queue);
      if (a.i == s.T) break;
      multiply_all(projection_matrices<T>, z.O, z.H, a.dy, a.dm);
    }
    start_elements<Kernel>("stepwise backward", z, s, z.H, a, queue);
    if (projections) projections->end_step(a.i);
  }
  if (projections) projections->finish();
}

// Calls f(first slot, first gate, count) for neighbouring slots of the recurrent product whose
// gates are neighbours in the weights, too.
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
  const int64_t width = Cell::kShape.stored() * H;
  const int64_t column_blocks = cuda::quotient_up(width, Sums::kColumns);
  const int64_t most = kRowBlocks * queue.device.multiprocessors / column_blocks + 1;
  const int64_t row_blocks = std::min(most, cuda::quotient_up(rows, kFewestRows));
  auto* const sums = queue.take<Compute<T>>(row_blocks * width);
  start_kernel<Sums>(queue, "sums of gradients",
                     {column_blocks * row_blocks, kRowThreads, Sums::kSharedBytes},
                     {dslots, rows, width, column_blocks, row_blocks, sums});
  start_kernel<BiasGradients<T, Cell>>(queue, "gradients of biases",
                                       {cuda::quotient_up(width, kRowThreads), kRowThreads, 0},
                                       {sums, row_blocks, H, g});
}

// After the loop come products over all rows: dW_ih, dW_hh, biases and dx. Operands that have to be
// gathered are gathered and multiplied a window of steps at a time.
template <typename T, typename Cell, int kOrders>
void gradients(const ByOrder<T, kOrders>& by, const T* zeros, Queue& queue) {
  constexpr CellShape kShape = Cell::kShape;
  constexpr cuda::Number kT = cuda::kNumber<T>;
  const Backward<T>& wanted = *by.back();
  const Sizes& z = wanted.sizes;
  const Steps& s = wanted.steps;
  const int64_t H = z.H, gates = kShape.gates * H, width = kShape.stored() * H;
  bool wants_w_ih = false, wants_w_hh = false;
  for (int d = 0; d < z.D; ++d) {
    wants_w_ih = wants_w_ih || wanted.gradients[d].w_ih;
    wants_w_hh = wants_w_hh || wanted.gradients[d].w_hh;
  }
  cuda::Matrix x[kOrders];
  bool gathers_x = false;
  for (int k = 0; k < kOrders; ++k) {
    const Backward<T>& b = *by[size_t(k)];
    if (b.x.data) x[k] = input_matrix(b.x, z, s, true);
    gathers_x = gathers_x || (wants_w_ih && b.x.data && !x[k].data);
  }
  const int64_t gathered = (gathers_x ? z.I : 0) + (wants_w_hh ? z.O : 0);
  const int64_t window = cuda::window_steps(s.T, s.N * gathered * int64_t(sizeof(T)), 1);
  T* const own_x = gathers_x ? queue.take<T>(most_rows(s, window) * z.I) : nullptr;
  T* const previous = wants_w_hh ? queue.take<T>(most_rows(s, window) * z.O) : nullptr;
  const int64_t windows = window ? cuda::quotient_up(s.T, window) : 1;
  const int64_t windows_of_x = gathers_x ? windows : 1;
  std::vector<SumOfProducts<T>> w_ih, w_hh;
  for (int d = 0; d < z.D; ++d) {
    w_ih.emplace_back(wanted.gradients[d].w_ih, gates, z.I, windows_of_x, queue);
    w_hh.emplace_back(wanted.gradients[d].w_hh, gates, z.O, windows, queue);
  }
  // Some rows of dslots, from a slot on, as the columns of a matrix.
  const auto columns_of = [&](int order, int d, int64_t row, int slot) {
    const T* const dslots = by[size_t(order)]->dslots;
    return cuda::Matrix{dslots + (d * s.total + row) * width + slot * H, width, true};
  };
  const auto times_in = [&](int64_t index, int64_t count) -> Range {
    return count == 1 ? Range{0, s.T} : Range{index * window, std::min(s.T, (index + 1) * window)};
  };
  for_each_product<kOrders>([&](int order, int other, bool is_first) {
    const Backward<T>& b = *by[size_t(other)];
    for (int64_t i = 0; wants_w_ih && b.x.data && i < windows_of_x; ++i) {
      const Range times = times_in(i, windows_of_x), rows = rows_of(s, times);
      cuda::Matrix own = {own_x, z.I};
      if (x[other].data) {
        own = {b.x.data + rows.begin * x[other].row, x[other].row};
      } else {
        gather_input(s, b.x, z.I, zeros, times, origin(own_x, rows.begin, z.I), queue);
      }
      for (int d = 0; d < z.D; ++d) {
        w_ih[size_t(d)].add(0, gates, rows.end - rows.begin,
                            columns_of(order, d, rows.begin, kShape.input_slot), own,
                            is_first && i == 0);
      }
    }
    for (int64_t i = 0; wants_w_hh && i < windows; ++i) {
      const Range times = times_in(i, windows), rows = rows_of(s, times);
      for (int d = 0; d < z.D; ++d) {
        if (!wanted.gradients[d].w_hh) continue;
        gather("gathering states", s, columns(b.y, d * z.O), b.h0, true, d, z.O, zeros, times,
               origin(previous, rows.begin, z.O), queue);
        for_each_run<Cell>([&](int slot, int gate, int count) {
          w_hh[size_t(d)].add(gate * H, count * H, rows.end - rows.begin,
                              columns_of(order, d, rows.begin, slot), {previous, z.O},
                              is_first && i == 0);
        });
      }
    }
  });
  for (int d = 0; d < z.D; ++d) {
    const WeightGradients<T>& g = wanted.gradients[d];
    w_ih[size_t(d)].finish();
    w_hh[size_t(d)].finish();
    const auto is_wanted = [](const T* parameter) { return parameter != nullptr; };
    if (g.b_ih || g.b_hh ||
        std::any_of(std::begin(g.parameters), std::end(g.parameters), is_wanted)) {
      bias_gradients<T, Cell>(wanted.dslots + d * s.total * width, s.total, H, g, queue);
    }
    if (!wanted.dx.data) continue;
    for_each_product<kOrders>([&](int order, int other, bool is_first) {
      const Weights<T>& w = by[size_t(other)]->weights[d];
      if (!w.w_ih) return;
      const T* const dslots = by[size_t(order)]->dslots + d * s.total * width;
      // The result is dense, with time first, as it was allocated for the call.
      multiply<T>({s.total,
                   z.I,
                   gates,
                   {dslots + kShape.input_slot * H, width},
                   {w.w_ih, w.w_ih_row},
                   kT,
                   wanted.dx.data,
                   z.I,
                   kT,
                   d > 0 || !is_first},
                  false, queue);
    });
  }
}

// Computes the tangents of a pass that has run, as the stepwise tier computes a pass. Its memory
// grows with T.
template <typename T, typename Cell>
void second_order(const SecondOrder<T>& s, Queue& queue) {
  using Kernel = StepwiseTangent<T, Cell>;
  using Forward = StepwiseForward<T, Cell>;
  constexpr CellShape kShape = Cell::kShape;
  static_assert(std::is_same_v<T, Compute<T>>, "tangents are not rounded from step to step");
  const Sizes& z = s.sizes;
  const Steps& steps = s.steps;
  const int64_t rows = z.D * steps.N, all = z.D * steps.total;
  const int64_t gates = kShape.gates * z.H, width = kShape.stored() * z.H;
  const T* const zeros = take_zeros<T, Cell>(z, queue);
  queue.clear_taken();
  if (queue.runs()) {
    cuda::clear(reinterpret_cast<char*>(s.tangent.dslots), size_t(all * width) * sizeof(T),
                queue.stream());
  }

  Backward<T> value = s, tangent = s.tangent;
  value.dh0 = value.dc0 = {};
  tangent.sizes = z;
  tangent.steps = steps;
  tangent.y = constant(s.tangent_y);
  tangent.slots = tangent.dslots;
  typename Kernel::Arguments a = {
      .of = {}, .values = value, .zeros = zeros, .tangent_sums = s.tangent_sums};
  rnnkern::Forward<T>& f = a.of.f;
  f.sizes = z;
  f.steps = steps;
  f.h0 = tangent.h0;
  f.c0 = tangent.c0;
  for (int d = 0; d < z.D; ++d) f.weights[d] = tangent.weights[d];
  f.y = s.tangent_y;
  f.hn = s.tangent_hn;
  f.cn = s.tangent_cn;
  f.slots = tangent.dslots;
  if (kShape.cell_state) tangent.cells = f.cells = queue.take<T>(all * kShape.planes() * z.H);
  if (z.projected) tangent.unprojected = f.unprojected = queue.take<T>(all * z.H);
  a.of.sums = queue.take<T>(rows * gates);
  a.of.h = queue.take<T>(rows * z.O);
  if (kShape.cell_state) a.of.c = queue.take<T>(rows * kShape.planes() * z.H);
  if (z.projected) {
    a.of.m = queue.take<T>(rows * z.H), a.of.y = queue.take<T>(rows * z.O);
    a.m = queue.take<T>(rows * z.H);
  }

  // Adds a product of all rows to the slots, from one slot on.
  const auto add = [&](int d, const cuda::Matrix& left, const T* w, int64_t w_row, int slot,
                       int count, int64_t k) {
    multiply<T>({steps.total,
                 count * z.H,
                 k,
                 left,
                 {w, w_row, true},
                 cuda::kNumber<T>,
                 f.slots + d * steps.total * width + slot * z.H,
                 width,
                 cuda::kNumber<T>,
                 true},
                false, queue);
  };
  const auto add_inputs = [&](const Rows<const T>& x, const Weights<T>(&weights)[kMaxDirections]) {
    if (!x.data || (!weights[0].w_ih && !weights[1].w_ih)) return;
    cuda::Matrix matrix = input_matrix(x, z, steps, false);
    if (!matrix.data) {
      T* const to = queue.take<T>(steps.total * z.I);
      gather_input(steps, x, z.I, zeros, {0, steps.T}, to, queue);
      matrix = {to, z.I};
    }
    for (int d = 0; d < z.D; ++d) {
      const Weights<T>& w = weights[d];
      if (w.w_ih) add(d, matrix, w.w_ih, w.w_ih_row, kShape.input_slot, kShape.gates, z.I);
    }
  };
  add_inputs(tangent.x, value.weights);
  add_inputs(value.x, tangent.weights);
  T* previous = nullptr;
  for (int d = 0; d < z.D; ++d) {
    const Weights<T>& w = tangent.weights[d];
    if (!w.w_hh) continue;
    if (!previous) previous = queue.take<T>(steps.total * z.O);
    gather("gathering states", steps, columns(value.y, d * z.O), value.h0, true, d, z.O, zeros,
           {0, steps.T}, previous, queue);
    for_each_run<Cell>([&](int slot, int gate, int count) {
      add(d, {previous, z.O}, w.w_hh + gate * z.H * w.w_hh_row, w.w_hh_row, slot, count, z.O);
    });
  }

  const auto recurrent = recurrent_matrices(value.weights, true);
  const auto projection = projection_matrices(value.weights, true);
  const auto tangent_projection = projection_matrices(tangent.weights, true);
  start_elements<typename Forward::Begin>("the beginning of tangents", z, steps, z.H, a.of, queue);
  for (a.of.i = 0; a.of.i < steps.T; ++a.of.i) {
    multiply_rows<T>(z, {steps.N, steps.N, z.O, gates, a.of.h, a.of.sums}, recurrent, false, queue);
    start_elements<Kernel>("tangents of forward", z, steps, z.H, a, queue);
    if (!z.projected) continue;
    multiply_rows<T>(z, {steps.N, steps.N, z.H, z.O, a.of.m, a.of.y}, projection, false, queue);
    multiply_rows<T>(z, {steps.N, steps.N, z.H, z.O, a.m, a.of.y, true}, tangent_projection, false,
                     queue);
    start_elements<typename Forward::Projected>("tangents of a projection", z, steps, z.O, a.of,
                                                queue);
  }
  const ByOrder<T, 2> by = {&value, &tangent};
  stepwise<T, Cell, 2>(by, zeros, queue);
  gradients<T, Cell, 2>(by, zeros, queue);
}

}  // namespace

template <>
bool start<RNNKERN_CELL>(const Forward<RNNKERN_ELEMENT>& f, Queue& queue) {
  using T = RNNKERN_ELEMENT;
  using Cell = RNNKERN_CELL;
  const cuda::Plan plan = plan_of(f, queue);
  if constexpr (Cell::kShape.fits_resident()) {
    if (plan.resident) return resident<T, Cell>(f, plan, queue);
  }
  return stepwise<T, Cell>(f, plan, queue);
}

template <>
bool start<RNNKERN_CELL>(const Backward<RNNKERN_ELEMENT>& b, Queue& queue) {
  using T = RNNKERN_ELEMENT;
  using Cell = RNNKERN_CELL;
  const cuda::Plan plan = plan_of(b, queue);
  const ByOrder<T, 1> by = {&b};
  const T* zeros = nullptr;
  if constexpr (Cell::kShape.fits_resident()) {
    if (plan.resident && !resident<T, Cell>(b, plan, &zeros, queue)) return false;
  }
  if (!plan.resident) {
    zeros = take_zeros<T, Cell>(b.sizes, queue);
    queue.clear_taken();
    stepwise<T, Cell, 1>(by, zeros, queue);
  }
  gradients<T, Cell, 1>(by, zeros, queue);
  return true;
}

template <>
bool start<RNNKERN_CELL>(const SecondOrder<RNNKERN_ELEMENT>& s, Queue& queue) {
  if constexpr (kNarrow<RNNKERN_ELEMENT>) {
    throw std::logic_error("second derivatives of narrow numbers");
  } else {
    second_order<RNNKERN_ELEMENT, RNNKERN_CELL>(s, queue);
  }
  return true;
}

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
