// The stepwise tier: in each step a product of the whole batch (product.h), then a kernel with one
// thread for each cell, forward
//
//   sums = h(t-1) W_hh^T        slots(t) = inputs(t) + sums + biases,  (h, c)(t) = cell(slots, ...)
//
// with inputs = x W_ih^T made before for all steps, and backward, in reverse scan order,
//
//   dh = dslots(t+1) x W_hh     dslots(t), dc, dh' = cell_backward(slots(t), ..., dh + dh' + dy(t))
//
// With a projection there is a second product a step, and a kernel that takes what it made:
// y = m W_hr^T of what the cells made, and before them dm = (dh + dy) x W_hr.
//
// What passes between steps lies by direction and slot; rows that take no part are multiplied with
// the others, and what comes out is not used. The product of a step of backward is that of the step
// before, so step T, of which there are no cells, ends the rows of the last one.
#pragma once

#include "cuda/stores.cuh"
#include "cuda/tile.cuh"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

constexpr int kStepThreads = cuda::kBlockThreads;

// Kernels with a thread for each of so many columns of each slot and direction.
struct ElementKernel {
  static constexpr bool kBlocksWait = false;
  static constexpr int kMostThreads = kStepThreads;
};
struct Element {
  int direction;
  int64_t slot, column;
  int64_t place;  // of the column, where they lie by direction and slot
};
// Of numbers that are not negative: in 32 bits where they fit, which is several times as fast.
RNNKERN_DEVICE int64_t quotient(int64_t a, int64_t b) {
  if ((a | b) >> 32) return a / b;
  return uint32_t(a) / uint32_t(b);
}
template <typename F>
RNNKERN_DEVICE void for_own_element(const Sizes& z, const Steps& s, int64_t columns, F f) {
  const int64_t place = int64_t(block_index()) * kStepThreads + thread_index();
  if (place >= z.D * s.N * columns) return;
  const int64_t row = quotient(place, columns), direction = quotient(row, s.N);
  f(Element{int(direction), row - direction * s.N, place - row * columns, place});
}
inline int64_t element_blocks(const Sizes& z, const Steps& s, int64_t columns) {
  return cuda::quotient_up(z.D * s.N * columns, kStepThreads);
}

// Step number `step` of the scan as a row sees it.
RNNKERN_DEVICE Visit visit_of(const Steps& s, bool ascending, int64_t step) {
  return visit(s, ascending, step, 0, s.N);
}

template <typename T, typename Cell>
struct StepwiseForward : ElementKernel {
  using A = Compute<T>;
  static constexpr CellShape kShape = Cell::kShape;

  struct Arguments {
    Forward<T> f;
    const A* inputs;  // [D, total, width], from column first_input on
    int64_t width, first_input;
    A* sums;         // [D, N, G*H]
    T* h;            // [D, N, O]: of the step before, zero where an episode begins
    A* c = nullptr;  // [D, N, H], likewise
    T* m = nullptr;  // [D, N, H] where there is a projection: what it takes
    A* y = nullptr;  // [D, N, O] and what it makes
    int64_t i = 0;   // number of the step
  };

  // Whether an episode begins after this step, for a row that goes on.
  RNNKERN_DEVICE static bool is_cut_after(const Steps& s, int direction, const Visit& v,
                                          int64_t slot) {
    return slot < v.leaving && cut(s, direction, direction == 0 ? v.t + 1 : v.t - 1, slot);
  }

  // The initial states, where each row finds them in its first step; rows that never take part end
  // with them.
  struct Begin : ElementKernel {
    using Arguments = StepwiseForward::Arguments;

    RNNKERN_DEVICE static void run(const Arguments& a) {
      const Sizes& z = a.f.sizes;
      const Steps& s = a.f.steps;
      for_own_element(z, s, z.H, [&](const Element& e) {  // O is at most H
        const bool is_cut = e.direction == 0 && cut(s, 0, 0, e.slot);
        const bool is_idle = e.slot >= active_rows(s, 0);
        if (e.column < z.O) {
          T* const h = a.h + (e.direction * s.N + e.slot) * z.O + e.column;
          put(h, is_cut ? A(0) : element_of(s, a.f.h0, e.direction, e.slot, e.column));
          if (is_idle) pass_element(s, a.f.h0, a.f.hn, e.direction, e.slot, e.column);
        }
        if constexpr (kShape.cell_state) {
          a.c[e.place] = is_cut ? A(0) : element_of(s, a.f.c0, e.direction, e.slot, e.column);
          if (is_idle) pass_element(s, a.f.c0, a.f.cn, e.direction, e.slot, e.column);
        }
      });
    }
  };

  RNNKERN_DEVICE static void run(const Arguments& a) {
    for_own_element(a.f.sizes, a.f.steps, a.f.sizes.H, [&](const Element& e) { cell(a, e); });
  }

  RNNKERN_DEVICE static void cell(const Arguments& a, const Element& e) {
    const Sizes& z = a.f.sizes;
    const Steps& s = a.f.steps;
    const int64_t H = z.H;
    const Visit v = visit_of(s, e.direction == 0, a.i);
    const bool is_active = e.slot < v.active_end;
    // Where h of this step stands; before a projection, where backward wants it.
    const Rows<T> made = z.projected ? saved_rows(s, a.f.unprojected, e.direction, H)
                                     : columns(a.f.y, e.direction * H);
    T* const h_to =
        made.data && (is_active || !s.start) ? row_at(s, made, v.t, e.slot) + e.column : nullptr;
    if (!is_active) {
      if (h_to) *h_to = T{};  // a padded row past its end
      return;
    }
    const A* const inputs = row_at(s, saved_rows(s, a.inputs, e.direction, a.width), v.t, e.slot) +
                            a.first_input + e.column;
    const A* const sums = a.sums + (e.direction * s.N + e.slot) * kShape.gates * H + e.column;
    Step<A> step;
    assemble<Cell>(
        step, [&](int slot) { return bias_of<Cell>(a.f.weights[e.direction], H, slot, e.column); },
        [&](int gate) { return inputs[gate * H]; },
        [&](int slot) { return sums[recurrent_gate<Cell>(slot) * H]; });
    if constexpr (kShape.reads_h) step.h_prev = value(a.h[e.place]);
    if constexpr (kShape.cell_state) step.c_prev = a.c[e.place];
    Cell::forward(step);
    if (kCarriesCells<T, Cell> && a.f.rounds_cells) step.c = rounded<T>(step.c);
    const bool is_cut = is_cut_after(s, e.direction, v, e.slot);
    if (z.projected) {
      put(a.m + e.place, step.h);
    } else {
      put(a.h + e.place, is_cut ? A(0) : step.h);
    }
    if constexpr (kShape.cell_state) a.c[e.place] = is_cut ? A(0) : step.c;
    if (h_to) put(h_to, step.h);
    ForwardStores<T, Cell>(a.f, e.direction).put_step(v, e.slot, e.column, step);
  }

  // After the projection of a step.
  struct Projected : ElementKernel {
    using Arguments = StepwiseForward::Arguments;

    RNNKERN_DEVICE static void run(const Arguments& a) {
      const Sizes& z = a.f.sizes;
      const Steps& s = a.f.steps;
      for_own_element(z, s, z.O, [&](const Element& e) {
        const Visit v = visit_of(s, e.direction == 0, a.i);
        const Rows<T> y = columns(a.f.y, e.direction * z.O);
        if (e.slot >= v.active_end) {
          if (!s.start) row_at(s, y, v.t, e.slot)[e.column] = T{};
          return;
        }
        const A made = a.y[e.place];
        put(row_at(s, y, v.t, e.slot) + e.column, made);
        put(a.h + e.place, is_cut_after(s, e.direction, v, e.slot) ? A(0) : made);
        if (e.slot >= v.leaving) {
          put(state_at(s, a.f.hn, e.direction, e.slot) + e.column, made);
        }
      });
    }
  };
};

template <typename T, typename Cell>
struct StepwiseBackward : ElementKernel {
  using A = Compute<T>;
  static constexpr CellShape kShape = Cell::kShape;

  struct Arguments {
    Backward<T> b;
    const T* zeros;          // [max(H, O)]
    A* dh;                   // [D, N, O]: the product of the step before
    A* dh_direct = nullptr;  // [D, N, H] where the cell itself reads h
    A* dc = nullptr;         // [D, N, H]
    T* dgates = nullptr;     // [D, N, G*H]: what the product takes, zero where an episode began
    T* dy = nullptr;         // [D, N, O] where there is a projection: what it takes
    A* dm = nullptr;         // [D, N, H] and what it makes
    int64_t i = 0;           // number of the step
  };

  // The gradient of h as the step before has left it, which is that of h_0 where a row has ended.
  RNNKERN_DEVICE static A dh_before(const Arguments& a, const Element& e) {
    const Steps& s = a.b.steps;
    const Visit before = visit_of(s, e.direction == 1, a.i - 1);
    if (e.slot >= before.active_end) return 0;
    A dh = a.dh[e.place];
    if (kShape.reads_h) dh += a.dh_direct[e.place];
    if (e.slot >= before.leaving && a.b.dh0.data) {
      put(state_at(s, a.b.dh0, e.direction, e.slot) + e.column, dh);
    }
    return dh;
  }

  // The gradient of the output of a row at a step that it takes part in.
  RNNKERN_DEVICE static A dy_of(const Arguments& a, const Element& e, const Visit& v, A dh) {
    if (e.slot >= v.entering) {
      dh = element_of(a.b.steps, a.b.dhn, e.direction, e.slot, e.column);
    }
    return BackwardLoads<T, Cell>(a.b, a.zeros, e.direction).dy(v.t, e.slot, e.column) + dh;
  }

  // Rows that never take part hand on what they have got.
  template <typename State, typename Gradient>
  RNNKERN_DEVICE static void pass_if_idle(const Arguments& a, const Element& e, const State& from,
                                          const Gradient& to) {
    const Steps& s = a.b.steps;
    if (a.i > 0 || e.slot < active_rows(s, 0)) return;
    pass_element(s, from, to, e.direction, e.slot, e.column);
  }

  // Before the product with W_hr.
  struct Projected : ElementKernel {
    using Arguments = StepwiseBackward::Arguments;

    RNNKERN_DEVICE static void run(const Arguments& a) {
      const Sizes& z = a.b.sizes;
      const Steps& s = a.b.steps;
      for_own_element(z, s, z.O, [&](const Element& e) {
        pass_if_idle(a, e, a.b.dhn, a.b.dh0);
        const A dh = dh_before(a, e);
        if (a.i == s.T) return;
        const Visit v = visit_of(s, e.direction == 1, a.i);
        const bool is_active = e.slot < v.active_end;
        if (!is_active && s.start) return;
        const A dy = is_active ? dy_of(a, e, v, dh) : A(0);
        const Rows<T> saved = saved_rows(s, a.b.dprojected, e.direction, z.O);
        put(row_at(s, saved, v.t, e.slot) + e.column, dy);
        put(a.dy + e.place, dy);
      });
    }
  };

  RNNKERN_DEVICE static void run(const Arguments& a) {
    for_own_element(a.b.sizes, a.b.steps, a.b.sizes.H, [&](const Element& e) { cell(a, e); });
  }

  RNNKERN_DEVICE static void cell(const Arguments& a, const Element& e) {
    const Sizes& z = a.b.sizes;
    const Steps& s = a.b.steps;
    const int64_t H = z.H;
    if (!z.projected) pass_if_idle(a, e, a.b.dhn, a.b.dh0);
    if (kShape.cell_state) pass_if_idle(a, e, a.b.dcn, a.b.dc0);
    const A dh = z.projected ? A(0) : dh_before(a, e);
    if (a.i == s.T) return;
    const Visit v = visit_of(s, e.direction == 1, a.i);
    const bool is_active = e.slot < v.active_end;
    if (!is_active && s.start) return;
    T* const dslots =
        row_at(s, saved_rows(s, a.b.dslots, e.direction, kShape.slots * H), v.t, e.slot) + e.column;
    if (!is_active) {  // the products after the loop take all rows
#pragma unroll
      for (int g = 0; g < kShape.slots; ++g) dslots[g * H] = T{};
      return;
    }
    Step<A> step;
    BackwardLoads<T, Cell>(a.b, a.zeros, e.direction).get_step(v.t, e.slot, e.column, &step);
    step.dh = z.projected ? a.dm[e.place] : dy_of(a, e, v, dh);
    if constexpr (kShape.cell_state) {
      step.dc = e.slot >= v.entering ? element_of(s, a.b.dcn, e.direction, e.slot, e.column)
                                     : a.dc[e.place];
    }
    Cell::backward(step);
    const bool is_cut = cut(s, e.direction, v.t, e.slot);
    T* const dgates = a.dgates + (e.direction * s.N + e.slot) * kShape.gates * H + e.column;
#pragma unroll
    for (int g = 0; g < kShape.slots; ++g) put(dslots + g * H, step.slot[g]);
#pragma unroll
    for (int g = 0; g < kShape.gates; ++g) {
      put(dgates + recurrent_gate<Cell>(g) * H, is_cut ? A(0) : step.slot[g]);
    }
    if (kShape.reads_h) a.dh_direct[e.place] = is_cut ? A(0) : step.dh_direct;
    if constexpr (kShape.cell_state) {
      const A dc = is_cut ? A(0) : step.dc;
      a.dc[e.place] = dc;
      if (e.slot >= v.leaving && a.b.dc0.data) {
        put(state_at(s, a.b.dc0, e.direction, e.slot) + e.column, dc);
      }
    }
  }
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
