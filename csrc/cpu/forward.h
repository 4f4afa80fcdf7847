// Forward pass of one layer:
//
//   slots(t) = W_ih x(t) + W_hh h(t-1) + biases
//   (h, c)(t) = cell(slots(t), c(t-1), h(t-1))
//
//   x [T, N, I]   y [T, N, D*O]   saved: slots [D, total, S*H], cells [D, total, H]
//
// Tasks and teams are those of pass.h. The whole team reads h(t), so there is one barrier in each
// step. Nothing is copied for a product: h(t-1) is read from y through row pointers, and c is in
// the saved states or in c_n.
//
// The input products of block_steps steps are computed at once, into the accumulators to which the
// recurrent product of each step then adds. So the weights of the input are read once for each
// block and not once for each step. In a closed loop (Readout of scan.h) each step computes the
// input of the next, with one more barrier behind it. With recurrent dropout the product reads a
// masked copy of h(t-1), and each step has one barrier more. Zoneout mixes the states of a step
// with those of the step before, after the cells (noise.h). Layer normalisation (normalised.h)
// comes between the products and the cells, and again between c and h. For one row in one step the
// products cost 2 G H (I + O) operations and, for each block of rows, G H O weights from the cache.
#pragma once

#include "cells/cells.h"
#include "cpu/noisy_rows.h"
#include "cpu/normalised.h"
#include "cpu/pass.h"

// Lets GCC mix the operations of two rows, which it does not do by itself on x86. The other flags
// of the command line stay. Without -ffp-contract=fast, tests/test_isa.py would see other bits.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define RNNKERN_MIXED __attribute__((optimize("schedule-insns", "sched-pressure")))
#else
#define RNNKERN_MIXED
#endif

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

template <typename T, typename Cell>
class ForwardScan : public Pass<ForwardScan<T, Cell>, T> {
  using Base = Pass<ForwardScan, T>;
  using Panels = UnitPanels<T, Cell>;
  using A = Compute<T>;
  using Base::plan_, Base::steps_, Base::sizes_;
  friend Base;
  static constexpr CellShape kShape = Cell::kShape;
  static constexpr int kStored = kShape.stored();
  static constexpr int64_t kAccWidth = Panels::kAccWidth;
  // Cell states of 16 bits are carried from step to step in the type that is computed with, others
  // as they are stored. With zoneout, all are carried.
  static constexpr bool kCarriesCells = kShape.cell_state && kNarrow<T>;
  using CellState = std::conditional_t<kCarriesCells, A, T>;

 public:
  static constexpr int kPlanes = kShape.planes();

  ForwardScan(const Forward<T>& f, const Plan& plan, Carver& carver)
      : Base(f.sizes, f.steps, plan, f.sizes.normalised ? kPanelWidth<T> : Panels::kUnits, carver),
        f_(f),
        panels_{f.sizes.H},
        capacity_(plan.block_steps * Base::block_rows()),
        has_zoneout_(f.noise.zoneout > 0),
        frozen_(const_cast<char*>(f.packed)),  // it is only read
        directions_{direction(0, carver), direction(1, carver)},
        masks_(DropoutMasks<T>::take(f.noise, f.sizes, steps_, carver)),
        norms_(f.sizes, steps_, carver) {
    const Sizes& z = f.sizes;
    if (f.readout.w) {
      readout_ = {.K = z.O,
                  .width = z.I,
                  .w = f.readout.w,
                  .row_stride = f.readout.row,
                  .transposed = true};
      readout_.take_room(carver);
    }
    if (masks_) masked_ = CarriedRows<T>::take(z, steps_, z.O, carver);
    const auto take_cells = [&] {
      return CarriedRows<CellState>::take(z, steps_, kPlanes * z.H, carver);
    };
    if (kCarriesCells || (kShape.cell_state && has_zoneout_)) carried_ = take_cells();
    if (kShape.cell_state && has_zoneout_) candidates_ = take_cells();
    Base::take_scratch(carver);
  }

 private:
  struct Direction {
    Rows<T> y, slots, cells, candidates, unprojected, normalised;
    DirectionWeights<T, Cell> weights;
  };
  // The pointers of one row in one step. h and c are the results of the cell, before a projection
  // and zoneout.
  struct RowPointers {
    const T* h_prev;
    const CellState* c_prev;
    T* h;
    CellState* c;
    T *y, *slots, *saved_c, *candidate;  // the last two only if c is carried elsewhere
  };
  struct Scratch {
    A* acc;         // [panels, or 1 if fused][capacity_][kAccWidth]
    A* recurrent;   // [panels][block_rows][kAccWidth] of W_hh h alone, if it is normalised
    LeftRows<T> x;  // [capacity_][I]
    LeftRows<T> h;  // [block_rows][O]
    // The rows of one panel, if its matrix is broadcast.
    LeftRows<T> rows_of_w_ih;  // [kAccWidth][I]
    LeftRows<T> rows_of_w_hh;  // [kAccWidth][O]
    LeftRows<T> projected;     // [kRowsAtOnce][H]
    LeftRows<T> output;        // [kRowsAtOnce][O], if there is a readout
    A* kept;                   // [max(H, O)], with zoneout
    RowPointers* pointers;     // [block_rows]
  };
  using Part = rnnkern::RNNKERN_NAMESPACE::Part<Scratch>;

  Direction direction(int d, Carver& carver) {
    const Sizes& z = sizes_;
    if (d >= z.D) return {};
    Direction of = {
        .y = columns(f_.y, d * z.O),
        .slots = saved_rows(steps_, f_.slots, d, kStored * z.H),
        .cells = saved_rows(steps_, f_.cells, d, kPlanes * z.H),
        .candidates = saved_rows(steps_, f_.candidates, d, kPlanes * z.H),
        .unprojected = saved_rows(steps_, f_.unprojected, d, z.H),
        .normalised = saved_rows(steps_, f_.normalised, d, normalised_width<T>(kShape, z.H)),
        .weights = {z, f_.weights[d], plan_, f_.packed ? frozen_ : carver}};
    // Nothing but the step itself needs what the cell makes if it is not saved.
    if ((z.projected || has_zoneout_) && !f_.unprojected) {
      of.unprojected = {carver.take<T>(steps_.N * z.H), 0, z.H};
    }
    return of;
  }

  Scratch scratch(Carver& carver) const {
    const int64_t rows = Base::block_rows(), I = sizes_.I, H = sizes_.H, O = sizes_.O;
    const bool input = plan_.input == Reading::kBroadcast,
               recurrent = plan_.recurrent == Reading::kBroadcast;
    return {.acc = carver.take<A>((fused() ? 1 : panels_.count()) * capacity_ * kAccWidth),
            .recurrent = carver.take<A>(sizes_.normalised ? panels_.count() * rows * kAccWidth : 0),
            .x = LeftRows<T>(capacity_, I, carver, input),
            .h = LeftRows<T>(rows, O, carver, recurrent),
            .rows_of_w_ih = LeftRows<T>(input ? kAccWidth : 0, I, carver),
            .rows_of_w_hh = LeftRows<T>(recurrent ? kAccWidth : 0, O, carver),
            .projected = LeftRows<T>(sizes_.projected ? kRowsAtOnce : 0, H, carver),
            .output = LeftRows<T>(f_.readout.w ? kRowsAtOnce : 0, O, carver),
            .kept = carver.take<A>(has_zoneout_ ? Base::widest() : 0),
            .pointers = carver.take<RowPointers>(rows)};
  }

  void pack(int thread, int threads) const {
    for (int d = 0; !f_.packed && d < sizes_.D; ++d) {
      directions_[d].weights.pack(f_.weights[d], thread, threads);
    }
    pack_share(readout_, thread, threads);
    masks_.draw(f_.noise, sizes_, steps_, thread, threads);
  }

  void run_task(const Part& part) const {
    const Range panels = Panels::panels_of(part.units);
    BatchRows<T> x = {};
    Base::for_blocks(
        part, plan_.block_steps,
        [&](int64_t k, int64_t t, int64_t rank) {
          part.scratch.x[k] = row_at(steps_, f_.x, t, rank);
        },
        [&](int64_t count) {
          x = part.scratch.x.batch(count, rows_by_dots(part, count, plan_.input_by_dots));
          for (int64_t p = panels.begin; !fused() && p < panels.end; ++p) {
            input_product(part, p, x, count);
          }
        },
        [&](const Visit& v, int64_t first) { step(part, v, x, first); });
    Base::finish_empty_rows(part, f_.hn, f_.h0, f_.cn, f_.c0);
  }

  // A block of one step is finished panel by panel: its accumulators never leave the first-level
  // cache.
  bool fused() const { return plan_.block_steps == 1 && !sizes_.normalised; }
  A* accumulators(const Part& part, int64_t p) const {
    return part.scratch.acc + (fused() ? 0 : p * capacity_ * kAccWidth);
  }

  // acc = biases + W_ih x for the units of panel p and `count` rows.
  void input_product(const Part& part, int64_t p, const BatchRows<T>& x, int64_t count) const {
    const DirectionWeights<T, Cell>& weights = directions_[part.direction].weights;
    A* acc = accumulators(part, p);
    const A* bias = weights.bias + p * kAccWidth;
    for (int64_t m = 0; m < count; ++m) copy_vectors(acc + m * kAccWidth, bias);
    add(weights.input, p, count, x, part.scratch.rows_of_w_ih, acc);
  }

  // How many of the `count` active rows of a part are among the last `rows` of the batch. If there
  // are such rows, the scan has one step.
  int64_t rows_by_dots(const Part& part, int64_t count, int64_t rows) const {
    return rows ? min_of(count, max_of(0, part.rows.begin + count - (steps_.N - rows))) : 0;
  }

  template <Role role>
  static void add(const StepWeights<T, Cell, role>& w, int64_t p, int64_t count,
                  const BatchRows<T>& batch, const LeftRows<T>& rows_of_w, A* acc) {
    if constexpr (!kRoundedForProducts<T>) {
      if (batch.across) {
        const int64_t across = batch.rows_across;
        w.add_broadcast(p, across, batch.across, rows_of_w, acc, kAccWidth);
        if (across < count)
          w.add(p, count - across, batch.rows + across, acc + across * kAccWidth, kAccWidth);
        return;
      }
    }
    w.add(p, count, batch.rows, acc, kAccWidth);
  }

  static void copy_vectors(A* to, const A* from) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kAccWidth; i += kLanes<T>) store(to + i, load(from + i));
  }

  // `x` has the input rows of this step, if it is fused. `first` is the number of its first row in
  // the accumulators.
  void step(const Part& part, const Visit& v, const BatchRows<T>& x, int64_t first) const {
    const Direction& of = directions_[part.direction];
    const RowPointers* rows = part.scratch.pointers;
    const int64_t count = part.active(v);
    bool from_zeros = true;  // then the recurrent product is zero
    for (int64_t k = 0; k < count; ++k) {
      part.scratch.pointers[k] = pointers(part, v.t, part.rows.begin + k);
      part.scratch.h[k] = rows[k].h_prev;
      from_zeros = from_zeros && rows[k].h_prev == Base::zeros();
    }
    if (masks_) drop(part, count);
    const BatchRows<T> h =
        part.scratch.h.batch(count, rows_by_dots(part, count, plan_.recurrent_by_dots));
    // Every other step goes from the last panel to the first. It begins with the weights that the
    // step before has read last, which are still in the cache.
    const Range panels = Panels::panels_of(part.units);
    const auto for_panels = [&](auto f) __attribute__((always_inline)) {
      for (int64_t i = panels.begin; i < panels.end; ++i) {
        f(v.t % 2 ? panels.begin + panels.end - 1 - i : i);
      }
    };
    if (sizes_.normalised) {
      for_panels([&](int64_t p) {
        A* sums = recurrent_sums(part, p, 0);
        zero_row(sums, 0, count * kAccWidth);
        if (kShape.recurrent && !from_zeros)
          add(of.weights.recurrent, p, count, h, part.scratch.rows_of_w_hh, sums);
      });
      normalised_cells(part, v.t, count, first);
    } else {
      for_panels([&](int64_t p) {
        if (fused()) input_product(part, p, x, count);
        A* acc = accumulators(part, p) + first * kAccWidth;
        if constexpr (kShape.recurrent) {
          if (!from_zeros) add(of.weights.recurrent, p, count, h, part.scratch.rows_of_w_hh, acc);
        }
        cells(f_.weights[part.direction], p, rows, count, acc);
      });
    }
    const auto y = [&](int64_t k) { return rows[k].y; };
    if (sizes_.projected) {
      part.wait_for_team();  // it has written h
      of.weights.projection.multiply_rows(
          part.columns, count, part.scratch.projected, [&](int64_t k) { return rows[k].h; }, y,
          false);
    }
    if (has_zoneout_) zone_out(part, v.t, count);
    Base::zero_padding(part, v, of.y);
    for (int64_t rank = v.leaving; rank < v.active_end; ++rank) finish_row(part, v.t, rank);
    part.wait_for_team();
    if (f_.readout.w) {
      feed(part, v, count);
      part.wait_for_team();
    }
  }

  // The sums of W_hh h of row m of a step.
  A* recurrent_sums(const Part& part, int64_t p, int64_t m) const {
    return part.scratch.recurrent + (p * Base::block_rows() + m) * kAccWidth;
  }

  // The cells of the thread's units, with the sums of both products normalised in between, and c.
  __attribute__((noinline)) void normalised_cells(const Part& part, int64_t t, int64_t count,
                                                  int64_t first) const {
    const Weights<T>& w = f_.weights[part.direction];
    const RowPointers* rows = part.scratch.pointers;
    const auto of_row = [&](int64_t m) {
      return typename SumNorms<T, Cell>::Row{
          .direction = part.direction,
          .rank = part.rows.begin + m,
          .input = accumulators(part, 0) + (first + m) * kAccWidth,
          .recurrent = recurrent_sums(part, 0, m),
          .input_panel = capacity_ * kAccWidth,
          .recurrent_panel = Base::block_rows() * kAccWidth,
          .saved =
              row_or_null(steps_, directions_[part.direction].normalised, t, part.rows.begin + m)};
    };
    for (int64_t m = 0; m < count; ++m) norms_.publish(of_row(m), part.units);
    part.wait_for_team();
    for (int64_t m = 0; m < count; ++m) norms_.apply(w, of_row(m), part.units, part.member == 0);
    const Range panels = Panels::panels_of(part.units);
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      cells<kShape.normalises_c>(w, p, rows, count, accumulators(part, p) + first * kAccWidth);
    }
    if constexpr (kShape.normalises_c) {
      part.wait_for_team();  // it has written c
      for (int64_t m = 0; m < count; ++m) {
        norms_.apply_to_c(w, of_row(m), rows[m].c, part.units, part.member == 0, rows[m].h);
      }
    }
  }

  // Lets the product read h(t-1) after recurrent dropout.
  void drop(const Part& part, int64_t count) const {
    for (int64_t k = 0; k < count; ++k) {
      const int64_t rank = part.rows.begin + k;
      T* const to = masked_.at(part.direction, rank);
      masks_.apply(part.direction, rank, part.scratch.pointers[k].h_prev, part.columns, to);
      part.scratch.h[k] = to;
    }
    part.wait_for_team();  // it reads all columns
  }

  // Mixes the new states, after a projection, with the states of the step before, in the thread's
  // columns and units.
  void zone_out(const Part& part, int64_t t, int64_t count) const {
    const int d = part.direction;
    const Range columns = part.columns;
    A* const kept = part.scratch.kept;
    for (int64_t k = 0; k < count; ++k) {
      const RowPointers& row = part.scratch.pointers[k];
      const int64_t rank = part.rows.begin + k, batch = batch_row(steps_, rank);
      const T* const made = sizes_.projected ? row.y : row.h;
      draw_kept(f_.noise, Purpose::kHidden, d, t, batch, columns, kept);
      for (int64_t i = columns.begin; i < columns.end; i += kLanes<T>) {
        const int64_t n = columns.end - i;
        const Vec<T> h =
            mixed(load_up_to(kept + i, n), load_up_to(row.h_prev + i, n), load_up_to(made + i, n));
        store_up_to(row.y + i, h, n);
      }
      for_planes<kPlanes>(part.units, sizes_.H, [&](Range units) {
        draw_kept(f_.noise, Purpose::kCell, d, t, batch, units, kept);
        CellState* const carried = carried_.at(d, rank);
        for (int64_t u = units.begin; u < units.end; u += kLanes<T>) {
          const int64_t n = units.end - u;
          const Vec<T> candidate = load_up_to(row.c + u, n);
          Vec<T> c = mixed(load_up_to(kept + u, n), load_up_to(row.c_prev + u, n), candidate);
          if constexpr (kCarriesCells) {
            if (f_.rounds_cells) c = rounded<T>(c);
          }
          store_up_to(carried + u, c, n);
          if (row.candidate) store_up_to(row.candidate + u, candidate, n);
          if (row.saved_c) store_up_to(row.saved_c + u, c, n);
        }
      });
    }
  }

  RowPointers pointers(const Part& part, int64_t t, int64_t rank) const {
    const int d = part.direction;
    const Direction& of = directions_[d];
    RowPointers r = {};
    r.y = row_at(steps_, of.y, t, rank);
    r.h_prev = Base::entering_state(d, t, rank, constant(of.y), f_.h0, f_.reset_h);
    r.h = r.y;
    if (of.unprojected.data) r.h = row_at(steps_, of.unprojected, f_.unprojected ? t : 0, rank);
    r.slots = row_or_null(steps_, of.slots, t, rank);
    if constexpr (kCarriesCells) {
      point_to_carried(part, t, rank, &r);
    } else if constexpr (kShape.cell_state) {
      if (has_zoneout_) {
        point_to_carried(part, t, rank, &r);
      } else if (of.cells.data) {
        r.c_prev = Base::entering_state(d, t, rank, constant(of.cells), f_.c0, f_.reset_c);
        r.c = row_at(steps_, of.cells, t, rank);
      } else {  // in c_n
        r.c = state_at(steps_, f_.cn, d, rank);
        r.c_prev = r.c;
        const T* from = nullptr;
        if (begins_anew(steps_, d, t, rank, f_.c0, f_.reset_c, &from)) {
          r.c_prev = from ? from : Base::zeros();
        }
      }
    }
    return r;
  }

  void point_to_carried(const Part& part, int64_t t, int64_t rank, RowPointers* r) const {
    const int d = part.direction;
    const Direction& of = directions_[d];
    CellState* const carried = carried_.at(d, rank);
    r->c_prev = r->c = carried;
    r->saved_c = row_or_null(steps_, of.cells, t, rank);
    const T* from = nullptr;
    if (begins_anew(steps_, d, t, rank, f_.c0, f_.reset_c, &from)) {
      for_planes<kPlanes>(part.units, sizes_.H,
                          [&](Range own) { copy_or_zero_row(carried, from, own); });
    }
    if (!has_zoneout_) return;
    r->c = candidates_.at(d, rank);
    r->candidate = row_or_null(steps_, of.candidates, t, rank);
  }

  // The cell on all units of a panel of `count` rows: two rows at once if vectors are whole,
  // because a single row is a chain of operations that wait for each other. Which rows are paired
  // depends on the split into threads, but their bits must not (a test compares them): the compiler
  // has to contract the sums of both in the same way. With kWithoutOutput the slots are stored in
  // acc, and h is not computed.
  template <bool kWithoutOutput = false>
  RNNKERN_MIXED void cells(const Weights<T>& w, int64_t p, const RowPointers* rows, int64_t count,
                           A* acc) const {
    const int64_t width = panels_.width(p);
    for (int64_t v = 0; v < width; v += kLanes<T>) {
      const int64_t u = panels_.first_unit(p) + v, n = sizes_.H - u;
      int64_t k = 0;
      if (n >= kLanes<T>) {
        for (; k + 2 <= count; k += 2)
          cell<2, kWithoutOutput>(w, rows + k, u, kLanes<T>, acc + k * kAccWidth + v, width);
        if (k < count)
          cell<1, kWithoutOutput>(w, rows + k, u, kLanes<T>, acc + k * kAccWidth + v, width);
      } else {
        for (; k < count; ++k)
          cell<1, kWithoutOutput>(w, rows + k, u, n, acc + k * kAccWidth + v, width);
      }
    }
  }

  // The cell on n units from u on, of kRows rows.
  template <int kRows, bool kWithoutOutput>
  RNNKERN_INLINE void cell(const Weights<T>& w, const RowPointers* rows, int64_t u, int64_t n,
                           A* acc, int64_t width) const {
    Step<Vec<T>> steps[kRows];
#pragma GCC unroll 2
    for (int k = 0; k < kRows; ++k) {
      Step<Vec<T>>& s = steps[k];
#pragma GCC unroll 8
      for (int i = 0; i < kShape.slots; ++i) {
        s.slot[i] = load(acc + k * kAccWidth + Panels::slot_at(i, width));
      }
      load_parameters<kShape>(w, u, n, [&](int i) -> auto& { return s.parameter[i]; });
      if constexpr (kShape.reads_h) s.h_prev = load_up_to(rows[k].h_prev + u, n);
      if constexpr (kShape.cell_state) s.c_prev = load_up_to(rows[k].c_prev + u, n);
      for (int i = 0; i < kShape.more_states; ++i) {
        s.more_prev[i] = load_up_to(rows[k].c_prev + (i + 1) * sizes_.H + u, n);
      }
    }
#pragma GCC unroll 2
    for (int k = 0; k < kRows; ++k) {
      if constexpr (kWithoutOutput) {
        Cell::forward_state(steps[k]);
      } else {
        Cell::forward(steps[k]);
      }
    }
#pragma GCC unroll 2
    for (int k = 0; k < kRows; ++k) {
      Step<Vec<T>>& s = steps[k];
      const RowPointers& row = rows[k];
      if constexpr (kWithoutOutput) {
#pragma GCC unroll 8
        for (int i = 0; i < kShape.slots; ++i) {
          store_up_to(acc + k * kAccWidth + Panels::slot_at(i, width), s.slot[i], n);
        }
      } else {
        store_up_to(row.h + u, s.h, n);
      }
      if constexpr (kCarriesCells) {
        if (f_.rounds_cells) s.c = rounded<T>(s.c);
        if (row.saved_c) store_up_to(row.saved_c + u, s.c, n);
      }
      if constexpr (kShape.cell_state) store_up_to(row.c + u, s.c, n);
      for (int i = 0; i < kShape.more_states; ++i) {
        const int64_t place = (i + 1) * sizes_.H + u;
        if constexpr (kCarriesCells) {
          if (f_.rounds_cells) s.more[i] = rounded<T>(s.more[i]);
          if (row.saved_c) store_up_to(row.saved_c + place, s.more[i], n);
        }
        store_up_to(row.c + place, s.more[i], n);
      }
      if (kShape.saves_slots && row.slots) {
#pragma GCC unroll 8
        for (int i = 0; i < kStored; ++i) {
          store_up_to(row.slots + i * sizes_.H + u, s.slot[i], n);
        }
      }
    }
  }

  // Writes the input of the next step, once the whole team has written y.
  void feed(const Part& part, const Visit& v, int64_t count) const {
    const Range own = split(sizes_.I, part.members, part.member, kPanelWidth<T>);
    const auto made = [&](int64_t k) {
      return row_at(steps_, f_.readout.made, v.t, part.rows.begin + k);
    };
    for (int64_t k = 0; k < count; ++k) copy_or_zero_row(made(k), f_.readout.b, own);
    readout_.multiply_rows(
        own, count, part.scratch.output, [&](int64_t k) { return part.scratch.pointers[k].y; },
        made, true);
  }

  // The final states of a row whose last step is t.
  void finish_row(const Part& part, int64_t t, int64_t rank) const {
    const int d = part.direction;
    const Direction& of = directions_[d];
    T *const hn = state_at(steps_, f_.hn, d, rank), *const y = row_at(steps_, of.y, t, rank);
    if (hn != y) copy_row(hn, y, part.columns);  // in a single step they may be the same memory
    for_planes<kPlanes>(part.units, sizes_.H, [&](Range own) {
      if (kCarriesCells || has_zoneout_) {
        copy_row(state_at(steps_, f_.cn, d, rank), carried_.at(d, rank), own);
      } else if (of.cells.data) {
        copy_row(state_at(steps_, f_.cn, d, rank), row_at(steps_, of.cells, t, rank), own);
      }
    });
  }

  const Forward<T>& f_;
  Panels panels_;
  int64_t capacity_;  // rows of a block of steps
  const bool has_zoneout_;
  Carver frozen_;  // hands out the weights of a frozen layer
  Direction directions_[kMaxDirections];
  const DropoutMasks<T> masks_;
  const SumNorms<T, Cell> norms_;
  ColumnPanels<T> readout_;
  CarriedRows<T> masked_;
  CarriedRows<CellState> carried_, candidates_;
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
