// The stepwise tier. Each step is a product of the whole batch (product.h), then a kernel with one
// thread for each cell. Forward:
//
//   sums = h(t-1) W_hh^T        slots(t) = inputs(t) + sums + biases,  (h, c)(t) = cell(slots, ...)
//
// Here inputs = x W_ih^T is computed before, for a window of steps. Backward, in reverse scan
// order:
//
//   dh = dslots(t+1) x W_hh     dslots(t), dc, dh' = cell_backward(slots(t), ..., dh + dh' + dy(t))
//
// With a projection each step has a second product, and a kernel that reads its result: y = m
// W_hr^T after the cells of the forward pass, and dm = (dh + dy) x W_hr before those of the
// backward pass.
//
// What passes between steps is in memory by direction and rank. Rows that take no part are
// multiplied with the others, and their results are not used. A backward step computes the product
// of the step before it. So there is a step T without cells, which ends the rows of the last step.
//
// Second derivatives use the same two passes: the tangents of the forward pass, and the backward
// pass on dual numbers.
#pragma once

#include "cuda/stores.cuh"
#include "cuda/tile.cuh"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

constexpr int kStepThreads = cuda::kBlockThreads;

// A kernel with a thread for each column of each rank and direction.
struct ElementKernel {
  static constexpr bool kBlocksWait = false;
  static constexpr int kMostThreads = kStepThreads;
};
struct Element {
  int direction;
  int64_t rank, column;
  int64_t place;  // of the column in memory by direction and rank
};
// a / b for numbers that are not negative. In 32 bits, if both fit, it is several times as fast.
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

// The place of a plane of an element in rows with so many planes.
RNNKERN_DEVICE int64_t place_of_plane(const Element& e, const Sizes& z, int plane, int planes) {
  return (e.place - e.column) * planes + plane * z.H + e.column;
}

// Step number `step` of the scan as a row sees it.
RNNKERN_DEVICE Visit visit_of(const Steps& s, bool ascending, int64_t step) {
  return visit(s, ascending, step, 0, s.N);
}

template <typename T, typename Cell>
struct StepwiseForward : ElementKernel {
  using A = Compute<T>;
  static constexpr CellShape kShape = Cell::kShape;
  static constexpr int kPlanes = kShape.planes();

  struct Arguments {
    Forward<T> f;
    Inputs<A> inputs;
    A* sums;         // [D, N, G*H]
    T* h;            // [D, N, O]: of the step before; zero if an episode begins
    A* c = nullptr;  // [D, N, planes*H], likewise
    T* m = nullptr;  // [D, N, H] if there is a projection: its input
    A* y = nullptr;  // [D, N, O] and its result
    int64_t i = 0;   // number of the step
  };

  // Whether an episode begins after this step, for a row that goes on.
  RNNKERN_DEVICE static bool is_cut_after(const Steps& s, int direction, const Visit& v,
                                          int64_t rank) {
    return rank < v.leaving && cut(s, direction, direction == 0 ? v.t + 1 : v.t - 1, rank);
  }

  // Puts the initial states where each row reads them in its first step. Rows that never take part
  // end with them.
  struct Begin : ElementKernel {
    using Arguments = StepwiseForward::Arguments;

    RNNKERN_DEVICE static void run(const Arguments& a) {
      const Sizes& z = a.f.sizes;
      const Steps& s = a.f.steps;
      for_own_element(z, s, z.H, [&](const Element& e) {  // O is at most H
        const bool is_cut = e.direction == 0 && cut(s, 0, 0, e.rank);
        const bool is_empty = e.rank >= active_rows(s, 0);
        if (e.column < z.O) {
          T* const h = a.h + (e.direction * s.N + e.rank) * z.O + e.column;
          put(h, is_cut ? A(0) : element_of(s, a.f.h0, e.direction, e.rank, e.column));
          if (is_empty) pass_element(s, a.f.h0, a.f.hn, e.direction, e.rank, e.column);
        }
#pragma unroll
        for (int j = 0; j < kPlanes; ++j) {
          const int64_t column = j * z.H + e.column;
          a.c[place_of_plane(e, z, j, kPlanes)] =
              is_cut ? A(0) : element_of(s, a.f.c0, e.direction, e.rank, column);
          if (is_empty) pass_element(s, a.f.c0, a.f.cn, e.direction, e.rank, column);
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
    const bool is_active = e.rank < v.active_end;
    // The place for h of this step; before a projection, that in the saved buffer.
    const Rows<T> made = z.projected ? saved_rows(s, a.f.unprojected, e.direction, H)
                                     : columns(a.f.y, e.direction * H);
    T* const h_to = made.data && (is_active || !s.is_packed())
                        ? row_at(s, made, v.t, e.rank) + e.column
                        : nullptr;
    if (!is_active) {
      if (h_to) *h_to = T{};  // a padded row past its end
      return;
    }
    const A* const inputs = row_at(s, a.inputs.of(s, e.direction), v.t, e.rank) + e.column;
    const A* const sums = a.sums + (e.direction * s.N + e.rank) * kShape.gates * H + e.column;
    Step<A> step;
    add_inputs<Cell>(
        step, [&](int slot) { return bias_of<Cell>(a.f.weights[e.direction], H, slot, e.column); },
        [&](int gate) { return inputs[gate * H]; });
    if constexpr (kShape.recurrent) {
      add_products<Cell>(step, [&](int slot) { return sums[recurrent_gate<Cell>(slot) * H]; });
    }
    if constexpr (kShape.reads_h) step.h_prev = value(a.h[e.place]);
#pragma unroll
    for (int j = 0; j < kPlanes; ++j) {
      c_prev_of(step, j) = a.c[place_of_plane(e, z, j, kPlanes)];
    }
    load_parameters<Cell>(a.f.weights[e.direction], e.column,
                          [&](int i) -> A& { return step.parameter[i]; });
    Cell::forward(step);
#pragma unroll
    for (int j = 0; j < kPlanes; ++j) {
      if (kCarriesCells<T, Cell> && a.f.rounds_cells) c_of(step, j) = rounded<T>(c_of(step, j));
    }
    const bool is_cut = is_cut_after(s, e.direction, v, e.rank);
    if (z.projected) {
      put(a.m + e.place, step.h);
    } else {
      put(a.h + e.place, is_cut ? A(0) : step.h);
    }
#pragma unroll
    for (int j = 0; j < kPlanes; ++j) {
      a.c[place_of_plane(e, z, j, kPlanes)] = is_cut ? A(0) : c_of(step, j);
    }
    if (h_to) put(h_to, step.h);
    ForwardStores<T, Cell>(a.f, e.direction).put_step(v, e.rank, e.column, step);
  }

  // Runs after the projection of a step.
  struct Projected : ElementKernel {
    using Arguments = StepwiseForward::Arguments;

    RNNKERN_DEVICE static void run(const Arguments& a) {
      const Sizes& z = a.f.sizes;
      const Steps& s = a.f.steps;
      for_own_element(z, s, z.O, [&](const Element& e) {
        const Visit v = visit_of(s, e.direction == 0, a.i);
        const Rows<T> y = columns(a.f.y, e.direction * z.O);
        if (e.rank >= v.active_end) {
          if (!s.is_packed()) row_at(s, y, v.t, e.rank)[e.column] = T{};
          return;
        }
        const A made = a.y[e.place];
        put(row_at(s, y, v.t, e.rank) + e.column, made);
        put(a.h + e.place, is_cut_after(s, e.direction, v, e.rank) ? A(0) : made);
        if (e.rank >= v.leaving) {
          put(state_at(s, a.f.hn, e.direction, e.rank) + e.column, made);
        }
      });
    }
  };
};

// The tangents of a forward pass that has run (SecondOrder of scan.h), with the sums of tangents:
//
//   sums = h'(t-1) W_hh^T      slots'(t) = fixed(t) + sums + biases',  (h, c)'(t) = tangent of cell
//
// fixed(t) are the products that no tangent of a state enters, computed before for all steps. They
// are in the memory that slots' will have. The states are carried, and projected, as in a forward
// pass.
template <typename T, typename Cell>
struct StepwiseTangent : ElementKernel {
  using A = Compute<T>;
  using Forward = StepwiseForward<T, Cell>;
  static constexpr CellShape kShape = Cell::kShape;
  static constexpr int kPlanes = kShape.planes();

  struct Arguments {
    typename Forward::Arguments of;  // tangents: f.slots holds fixed(t), and then slots'
    Backward<T> values;
    const T* zeros;         // [max(H, O, planes H)]
    const T* tangent_sums;  // [D, total, S*H] or null: further parts of slots'
    T* m = nullptr;         // [D, N, H] if there is a projection: h before it, a value
  };

  RNNKERN_DEVICE static void run(const Arguments& a) {
    const Sizes& z = a.values.sizes;
    for_own_element(z, a.values.steps, z.H, [&](const Element& e) { cell(a, e); });
  }

  RNNKERN_DEVICE static void cell(const Arguments& a, const Element& e) {
    const typename Forward::Arguments& of = a.of;
    const Sizes& z = a.values.sizes;
    const Steps& s = a.values.steps;
    const int64_t H = z.H;
    const Visit v = visit_of(s, e.direction == 0, of.i);
    const bool is_active = e.rank < v.active_end;
    const Rows<T> made = z.projected ? saved_rows(s, of.f.unprojected, e.direction, H)
                                     : columns(of.f.y, e.direction * H);
    T* const h_to = is_active || !s.is_packed() ? row_at(s, made, v.t, e.rank) + e.column : nullptr;
    if (!is_active) {
      if (h_to) *h_to = T{};  // a padded row past its end
      return;
    }
    Step<A> values;
    BackwardLoads<T, Cell>(a.values, a.zeros, e.direction).get_step(v.t, e.rank, e.column, &values);
    const auto slots_at = [&](auto* data) {
      return row_at(s, saved_rows(s, data, e.direction, kShape.stored() * H), v.t, e.rank) +
             e.column;
    };
    const T* const fixed = slots_at(of.f.slots);
    const T* const given = a.tangent_sums ? slots_at(a.tangent_sums) : nullptr;
    const A* const sums = of.sums + (e.direction * s.N + e.rank) * kShape.gates * H + e.column;
    Step<Dual<A>> step;
#pragma unroll
    for (int i = 0; i < kShape.stored(); ++i) {
      A tangent = 0;
      if (i < kShape.slots) {
        tangent = bias_of<Cell>(of.f.weights[e.direction], H, i, e.column) + fixed[i * H];
        if (given) tangent += given[i * H];
        if (kShape.recurrent && i < kShape.gates) tangent += sums[recurrent_gate<Cell>(i) * H];
      }
      step.slot[i] = {kShape.saves_slots ? values.slot[i] : A(0), tangent};
    }
    if constexpr (!kShape.saves_slots) step.h.value = values.h;
    if constexpr (kShape.reads_h) step.h_prev = {values.h_prev, of.h[e.place]};
#pragma unroll
    for (int j = 0; j < kPlanes; ++j) {
      c_of(step, j).value = c_of(values, j);
      c_prev_of(step, j) = {c_prev_of(values, j), of.c[place_of_plane(e, z, j, kPlanes)]};
    }
    load_parameters<Cell>(a.values.weights[e.direction], e.column,
                          [&](int i) -> A& { return step.parameter[i].value; });
    load_parameters<Cell>(of.f.weights[e.direction], e.column,
                          [&](int i) -> A& { return step.parameter[i].tangent; });
    Cell::tangent(step);
    Step<A> tangents;
#pragma unroll
    for (int i = 0; i < kShape.stored(); ++i) tangents.slot[i] = step.slot[i].tangent;
    tangents.h = step.h.tangent;
    const bool is_cut = Forward::is_cut_after(s, e.direction, v, e.rank);
    if (z.projected) {
      of.m[e.place] = tangents.h;
      a.m[e.place] =
          row_at(s, saved_rows(s, a.values.unprojected, e.direction, H), v.t, e.rank)[e.column];
    } else {
      of.h[e.place] = is_cut ? A(0) : tangents.h;
    }
#pragma unroll
    for (int j = 0; j < kPlanes; ++j) {
      c_of(tangents, j) = c_of(step, j).tangent;
      of.c[place_of_plane(e, z, j, kPlanes)] = is_cut ? A(0) : c_of(tangents, j);
    }
    *h_to = tangents.h;
    ForwardStores<T, Cell>(of.f, e.direction).put_step(v, e.rank, e.column, tangents);
  }
};

// The backward pass on values (kOrders = 1) or on dual numbers (kOrders = 2). On dual numbers by[0]
// has the values, whose gradients are recomputed because they were not kept, and by[1] the
// tangents, which are the results.
template <typename T, typename Cell, int kOrders = 1>
struct StepwiseBackward : ElementKernel {
  using A = Compute<T>;
  using V = std::conditional_t<kOrders == 1, A, Dual<A>>;
  static constexpr CellShape kShape = Cell::kShape;
  static constexpr int kPlanes = kShape.planes();
  static constexpr int kLast = kOrders - 1;

  struct Arguments {
    Backward<T> by[kOrders];
    const T* zeros;          // [max(H, O, planes H)]
    A* dh;                   // [D, orders, N, O]: the product of the step before
    A* dh_direct = nullptr;  // [D, orders, N, H] if the cell itself reads h
    A* dc = nullptr;         // [D, orders, N, planes*H]
    T* dgates = nullptr;     // [D, orders, N, G*H]: operand of the product, zero if an episode
                             // began
    T* dy = nullptr;         // [D, orders, N, O] if there is a projection: its operand,
    // and the same for each step, if it is wanted: row r of a direction begins at + r O.
    T* dprojected[kOrders][kMaxDirections] = {};
    A* dm = nullptr;  // [D, orders, N, H] and its result
    int64_t i = 0;    // number of the step
  };

  // The place of an element of an order, in rows of `width` numbers.
  RNNKERN_DEVICE static int64_t place(const Arguments& a, const Element& e, int order,
                                      int64_t width) {
    return ((e.direction * kOrders + order) * a.by[0].steps.N + e.rank) * width + e.column;
  }
  RNNKERN_DEVICE static int64_t place_of_dc(const Arguments& a, const Element& e, int order,
                                            int plane) {
    const int64_t H = a.by[0].sizes.H;
    return place(a, e, order, kPlanes * H) + plane * H;
  }
  // A value, or a dual number, of f(order).
  template <typename F>
  RNNKERN_DEVICE static V by_order(F f) {
    if constexpr (kOrders == 1) {
      return f(0);
    } else {
      return {f(0), f(1)};
    }
  }
  RNNKERN_DEVICE static A of_order(const V& x, int order) {
    if constexpr (kOrders == 1) {
      return x;
    } else {
      return order == 0 ? x.value : x.tangent;
    }
  }

  // The gradient of h as the step before has left it. If the row has ended, it is that of h_0.
  RNNKERN_DEVICE static A dh_before(const Arguments& a, const Element& e, int order) {
    const Backward<T>& b = a.by[order];
    const Steps& s = b.steps;
    const Visit before = visit_of(s, e.direction == 1, a.i - 1);
    if (e.rank >= before.active_end) return 0;
    A dh = kShape.recurrent ? a.dh[place(a, e, order, b.sizes.O)] : A(0);
    if (kShape.reads_h) dh += a.dh_direct[place(a, e, order, b.sizes.H)];
    if (e.rank >= before.leaving && b.dh0.data) {
      put(state_at(s, b.dh0, e.direction, e.rank) + e.column, dh);
    }
    return dh;
  }

  // The gradient of the output of a row at a step in which it takes part.
  RNNKERN_DEVICE static A dy_of(const Arguments& a, const Element& e, const Visit& v, int order,
                                A dh) {
    const Backward<T>& b = a.by[order];
    if (e.rank >= v.entering) dh = element_of(b.steps, b.dhn, e.direction, e.rank, e.column);
    return BackwardLoads<T, Cell>(b, a.zeros, e.direction).dy(v.t, e.rank, e.column) + dh;
  }

  // Rows that never take part pass on the gradients of their final states.
  template <typename State, typename Gradient>
  RNNKERN_DEVICE static void pass_if_empty(const Arguments& a, const Element& e, const State& from,
                                           const Gradient& to, int plane = 0) {
    const Steps& s = a.by[0].steps;
    if (a.i > 0 || e.rank < active_rows(s, 0)) return;
    pass_element(s, from, to, e.direction, e.rank, plane * a.by[0].sizes.H + e.column);
  }

  // Runs before the product with W_hr.
  struct Projected : ElementKernel {
    using Arguments = StepwiseBackward::Arguments;

    RNNKERN_DEVICE static void run(const Arguments& a) {
      const Sizes& z = a.by[0].sizes;
      const Steps& s = a.by[0].steps;
      for_own_element(z, s, z.O, [&](const Element& e) {
        pass_if_empty(a, e, a.by[kLast].dhn, a.by[kLast].dh0);
        const V dh = by_order([&](int k) { return dh_before(a, e, k); });
        if (a.i == s.T) return;
        const Visit v = visit_of(s, e.direction == 1, a.i);
        const bool is_active = e.rank < v.active_end;
        if (!is_active && s.is_packed()) return;
#pragma unroll
        for (int k = 0; k < kOrders; ++k) {
          const A dy = is_active ? dy_of(a, e, v, k, of_order(dh, k)) : A(0);
          const Rows<T> saved = {a.dprojected[k][e.direction], s.N * z.O, z.O};
          if (saved.data) put(row_at(s, saved, v.t, e.rank) + e.column, dy);
          put(a.dy + place(a, e, k, z.O), dy);
        }
      });
    }
  };

  RNNKERN_DEVICE static void run(const Arguments& a) {
    const Sizes& z = a.by[0].sizes;
    for_own_element(z, a.by[0].steps, z.H, [&](const Element& e) { cell(a, e); });
  }

  RNNKERN_DEVICE static void cell(const Arguments& a, const Element& e) {
    const Backward<T>& last = a.by[kLast];
    const Sizes& z = last.sizes;
    const Steps& s = last.steps;
    const int64_t H = z.H;
    if (!z.projected) pass_if_empty(a, e, last.dhn, last.dh0);
#pragma unroll
    for (int j = 0; j < kPlanes; ++j) pass_if_empty(a, e, last.dcn, last.dc0, j);
    V dh = {};
    if (!z.projected) dh = by_order([&](int k) { return dh_before(a, e, k); });
    if (a.i == s.T) return;
    const Visit v = visit_of(s, e.direction == 1, a.i);
    const bool is_active = e.rank < v.active_end;
    if (!is_active && s.is_packed()) return;
    T* const dslots =
        row_at(s, saved_rows(s, last.dslots, e.direction, kShape.stored() * H), v.t, e.rank) +
        e.column;
    if (!is_active) {  // the products after the loop take all rows
#pragma unroll
      for (int g = 0; g < kShape.stored(); ++g) dslots[g * H] = T{};
      return;
    }
    Step<V> step;
    load_step(a, e, v, &step);
    step.dh = by_order([&](int k) {
      return z.projected ? a.dm[place(a, e, k, H)] : dy_of(a, e, v, k, of_order(dh, k));
    });
#pragma unroll
    for (int j = 0; j < kPlanes; ++j) {
      dc_of(step, j) = by_order([&](int k) {
        return e.rank >= v.entering
                   ? element_of(s, a.by[k].dcn, e.direction, e.rank, j * H + e.column)
                   : a.dc[place_of_dc(a, e, k, j)];
      });
    }
    Cell::backward(step);
    const bool is_cut = cut(s, e.direction, v.t, e.rank);
#pragma unroll
    for (int g = 0; g < kShape.stored(); ++g) put(dslots + g * H, of_order(step.slot[g], kLast));
#pragma unroll
    for (int k = 0; k < kOrders; ++k) {
      T* const dgates = a.dgates + place(a, e, k, kShape.gates * H);
#pragma unroll
      for (int g = 0; g < kShape.gates; ++g) {
        put(dgates + recurrent_gate<Cell>(g) * H, is_cut ? A(0) : of_order(step.slot[g], k));
      }
      if constexpr (kShape.reads_h) {
        a.dh_direct[place(a, e, k, H)] = is_cut ? A(0) : of_order(step.dh_direct, k);
      }
#pragma unroll
      for (int j = 0; j < kPlanes; ++j) {
        const A dc = is_cut ? A(0) : of_order(dc_of(step, j), k);
        a.dc[place_of_dc(a, e, k, j)] = dc;
        if (e.rank >= v.leaving && a.by[k].dc0.data) {
          put(state_at(s, a.by[k].dc0, e.direction, e.rank) + j * H + e.column, dc);
        }
      }
    }
  }

  // Loads what the forward pass and its tangent have left.
  RNNKERN_DEVICE static void load_step(const Arguments& a, const Element& e, const Visit& v,
                                       Step<V>* to) {
    const auto load = [&](int order, Step<A>* step) {
      BackwardLoads<T, Cell>(a.by[order], a.zeros, e.direction)
          .get_step(v.t, e.rank, e.column, step);
    };
    const auto load_own = [&](int order, auto parameter) {
      load_parameters<Cell>(a.by[order].weights[e.direction], e.column, parameter);
    };
    if constexpr (kOrders == 1) {
      load(0, to);
      load_own(0, [&](int i) -> A& { return to->parameter[i]; });
    } else {
      load_own(0, [&](int i) -> A& { return to->parameter[i].value; });
      load_own(1, [&](int i) -> A& { return to->parameter[i].tangent; });
      Step<A> of[kOrders];
#pragma unroll
      for (int k = 0; k < kOrders; ++k) load(k, &of[k]);
#pragma unroll
      for (int i = 0; kShape.saves_slots && i < kShape.stored(); ++i) {
        to->slot[i] = {of[0].slot[i], of[1].slot[i]};
      }
      if constexpr (!kShape.saves_slots) to->h = {of[0].h, of[1].h};
      if constexpr (kShape.reads_h) to->h_prev = {of[0].h_prev, of[1].h_prev};
#pragma unroll
      for (int j = 0; j < kPlanes; ++j) {
        c_of(*to, j) = {c_of(of[0], j), c_of(of[1], j)};
        c_prev_of(*to, j) = {c_prev_of(of[0], j), c_prev_of(of[1], j)};
      }
    }
  }
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
