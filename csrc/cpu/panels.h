// Weight matrices as the products of a step read them: in panels of units, with all gates of a unit
// side by side. So one register tile holds every slot of its units, and the cell can finish them
// while they are in the cache.
//
//   panel p = units [p*kUnits, ...): [groups of K][gates][width]       acc row = [slots][width]
//
// width is that of a slot: whole vectors. Up to four slots share a register tile of four vectors;
// what is left of it is not used. More slots take a second tile. There is one exception. If a cell
// has four slots and the units of the last panel fill no more than half or a quarter of a vector,
// then width is that half or quarter, and the slots share vectors. A product that owns fewer of
// them then has zeros in place of the others, before or behind, so that its range is whole vectors.
#pragma once

#include "cpu/gemm.h"
#include "cpu/rows.h"
#include "scan.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

template <typename T, typename Cell>
struct UnitPanels {
  static constexpr CellShape kShape = Cell::kShape;
  static constexpr int kTiles = int(ceil_div(kShape.slots, kPanelVectors));
  static constexpr int kUnitVectors = kTiles * kPanelVectors / kShape.slots;
  static constexpr int64_t kUnits = kUnitVectors * kLanes<T>;
  static constexpr int64_t kGroupLanes = kShape.gates * kUnits;  // of one group of a whole panel
  static constexpr int64_t kAccWidth = kTiles * kPanelWidth<T>;  // a row of accumulators

  int64_t H = 0;

  int64_t count() const { return ceil_div(H, kUnits); }
  // `units` begins with a panel.
  static Range panels_of(Range units) {
    return {units.begin / kUnits, ceil_div(units.end, kUnits)};
  }
  int64_t first_unit(int64_t p) const { return p * kUnits; }
  static int64_t panel_lanes(int64_t K) {
    return kParts<T> * kGroupLanes * groups_in_memory<Operand<T>>(K);
  }
  int64_t packed_lanes(int64_t K) const { return count() * panel_lanes(K); }

  // The width of one slot in panel p.
  int64_t width(int64_t p) const {
    const int64_t units = min_of(kUnits, H - first_unit(p));
    if constexpr (kShape.slots == kPanelVectors) {
      if (kLanes<T> % 4 == 0 && units <= kLanes<T> / 4) return kLanes<T> / 4;
      if (units <= kLanes<T> / 2) return kLanes<T> / 2;
    }
    return ceil_div(units, kLanes<T>) * kLanes<T>;
  }
  static constexpr bool shares_vectors(int64_t width) { return width < kLanes<T>; }
  // Where a slot begins in a row of accumulators.
  static constexpr int64_t slot_at(int slot, int64_t width) {
    return (slot + (shares_vectors(width) ? kShape.slots - kShape.gates : 0)) * width;
  }

  // The row of accumulators that products start from: the biases of each slot, which are b_ih +
  // b_hh if both products enter it. If the sums are normalised, the biases come after that.
  void pack_bias(int64_t p, const Weights<T>& w, Compute<T>* to) const {
    const int64_t lanes = width(p);
    zero_row(to, 0, kAccWidth);
    for (int slot = 0; slot < kShape.slots; ++slot) {
      for (int64_t i = 0; i < lanes; ++i) {
        const int64_t u = first_unit(p) + i;
        const bool has_biases = u < H && !w.gains.ih;
        const T* b_ih = has_biases && slot >= kShape.input_slot ? w.b_ih : nullptr;
        const T* b_hh = has_biases && slot < kShape.gates ? w.b_hh : nullptr;
        to[slot_at(slot, lanes) + i] =
            (b_ih ? value(b_ih[kShape.input_gate(slot) * H + u]) : Compute<T>(0)) +
            (b_hh ? value(b_hh[kShape.recurrent_gate(slot) * H + u]) : Compute<T>(0));
      }
    }
  }
};

enum class Role { kInput, kRecurrent };

// One of W_ih and W_hh: packed, or as it is in memory if `packed` is null.
template <typename T, typename Cell, Role role>
struct StepWeights {
  using Panels = UnitPanels<T, Cell>;
  using E = Operand<T>;
  static constexpr CellShape kShape = Cell::kShape;
  static constexpr int kFirstSlot = role == Role::kInput ? kShape.input_slot : 0;

  Panels panels;
  const T* w = nullptr;
  int64_t row_stride = 0, K = 0;
  const float* scales = nullptr;  // of the rows of integers
  Panel<T>* packed = nullptr;

  int64_t count() const { return panels.count(); }
  void take_room(Carver& carver) { packed = carver.take<Panel<T>>(panels.packed_lanes(K)); }

  static constexpr int gate_of(int i) {
    return role == Role::kInput ? kShape.input_gate(i + kFirstSlot) : kShape.recurrent_gate(i);
  }

  // The number of slots that the product adds to, with those of zeros.
  static constexpr int slots_of(int64_t width) {
    return Panels::shares_vectors(width) ? kShape.slots : kShape.gates;
  }
  static constexpr int zeros_before(int64_t width) {
    return role == Role::kRecurrent ? slots_of(width) - kShape.gates : 0;
  }

  void pack(int64_t p) const {
    const int64_t width = panels.width(p), unit = panels.first_unit(p);
    const int64_t lanes = slots_of(width) * width;
    const PanelLayout<E> layout(K, lanes);
    Panel<T>* panel = packed + p * Panels::panel_lanes(K);
    if (slots_of(width) > kShape.gates) zero_row(panel, 0, kParts<T> * layout.part());
    for (int i = 0; i < kShape.gates; ++i) {
      for (int64_t v = 0; v < width; v += kLanes<T>) {
        const int64_t row = gate_of(i) * panels.H + unit + v;
        pack_weights<T>(
            K, [&](int64_t u) { return w + (row + u) * row_stride; },
            scales ? scales + row : nullptr, panels.H - unit - v, layout,
            (zeros_before(width) + i) * width + v, panel, min_of(width, kLanes<T>));
      }
    }
  }

  // Writes the packed weights to a dense matrix [G*H, K].
  void unpack(Compute<T>* to) const {
    for (int64_t p = 0; p < count(); ++p) {
      const int64_t width = panels.width(p), unit = panels.first_unit(p);
      const PanelLayout<E> layout(K, slots_of(width) * width);
      const Panel<T>* panel = packed + p * Panels::panel_lanes(K);
      for (int i = 0; i < kShape.gates; ++i) {
        for (int64_t u = 0; u < min_of(Panels::kUnits, panels.H - unit); ++u) {
          Compute<T>* const row = to + (gate_of(i) * panels.H + unit + u) * K;
          for (int64_t k = 0; k < K; ++k) {
            row[k] = unpacked<T>(panel, layout, k, (zeros_before(width) + i) * width + u);
          }
        }
      }
    }
  }

  // acc[m][the slots of this product] += a[m] x this matrix, for the units of panel p.
  void add(int64_t p, int64_t rows, const E* const* a, Compute<T>* acc, int64_t acc_row) const {
    const int64_t width = panels.width(p);
    if (kRoundedForProducts<T> || packed) {
      const int64_t panel_row = slots_of(width) * width;
      const Panel<T>* panel = packed + p * Panels::panel_lanes(K);
      acc += Panels::slot_at(kFirstSlot - zeros_before(width), width);
      const PanelLayout<E> layout(K, panel_row);
      auto vectors = int(panel_row / kLanes<T>);
      if constexpr (kShape.gates > kPanelVectors) {
        product_of<T>(kPanelVectors, rows, K, a, panel, panel_row, layout.part(), acc, acc_row);
        panel += layout.at(kPanelWidth<T>);
        vectors -= kPanelVectors, acc += kPanelWidth<T>;
      }
      product_of<T>(vectors, rows, K, a, panel, panel_row, layout.part(), acc, acc_row);
      return;
    }
    if constexpr (!kRoundedForProducts<T>) add_dots(p, rows, a, acc, acc_row);
  }

  // The same with the batch transposed (`across`): the rows of this matrix are the left operand,
  // and the result is transposed. Every sum must have the bits of packed weights. So products by
  // AMX tiles begin with the contents of acc, and other products are added to it in blocks of
  // kDepth k. `weights` has room for kAccWidth rows.
  void add_broadcast(int64_t p, int64_t rows, const Compute<T>* across, const LeftRows<T>& weights,
                     Compute<T>* acc, int64_t acc_row) const {
    constexpr int64_t kWidth = kPanelWidth<T>;
    const int64_t width = panels.width(p),
                  units = min_of(Panels::kUnits, panels.H - panels.first_unit(p));
    for (int i = 0; i < kShape.gates; ++i) {
      for (int64_t u = 0; u < units; ++u) {
        weights[i * units + u] = row_of(i, panels.first_unit(p) + u);
      }
    }
    acc += Panels::slot_at(kFirstSlot, width);
    const int64_t count = kShape.gates * units;
    const auto left = weights.as_they_lie(count, units);
    alignas(kVectorBytes) Compute<T> sums[Panels::kAccWidth * kWidth];
    constexpr bool kFromAcc = kByTiles<E>;
    for (int64_t m = 0; m < rows; m += kWidth) {
      const int64_t lanes = lanes_across<T>(rows - m);
      // block(sums, units left, acc, rows left) for each block of vectors by vectors.
      const auto for_blocks = [&](auto block) __attribute__((always_inline)) {
        for (int i = 0; i < kShape.gates; ++i) {
          for (int64_t u = 0; u < units; u += kLanes<T>) {
            for (int64_t n = 0; n < min_of(lanes, rows - m); n += kLanes<T>) {
              block(sums + (i * units + u) * lanes + n, units - u,
                    acc + (m + n) * acc_row + i * width + u, rows - m - n);
            }
          }
        }
      };
      if constexpr (kFromAcc) {
        for_blocks(
            [&](Compute<T>* sum, int64_t units_left, const Compute<T>* of, int64_t rows_left) {
              transpose_to<false>(of, acc_row, rows_left, units_left, sum, lanes, kLanes<T>);
            });
      }
      const int64_t depth = kFromAcc ? K : kDepth;
      for (int64_t k = 0; k < K; k += depth) {
        product<E, kFromAcc>(int(lanes / kLanes<T>), count, k, min_of(depth, K - k), left.rows,
                             across + m * groups_in_memory<E>(K) + groups<E>(k) * lanes, lanes,
                             sums, lanes, left.tails);
        for_blocks(
            [&](const Compute<T>* sum, int64_t units_left, Compute<T>* to, int64_t rows_left) {
              transpose_to<!kFromAcc>(sum, lanes, units_left, rows_left, to, acc_row,
                                      min_of(width, kLanes<T>));
            });
      }
    }
  }

 private:
  const T* row_of(int gate, int64_t unit) const {
    return w + (gate_of(gate) * panels.H + unit) * row_stride;
  }

  __attribute__((noinline)) void add_dots(int64_t p, int64_t rows, const E* const* a,
                                          Compute<T>* acc, int64_t acc_row) const {
    const int64_t width = panels.width(p);
    acc += Panels::slot_at(kFirstSlot, width);
    for (int i = 0; i < kShape.gates; ++i) {
      for (int64_t v = 0; v < width; v += kLanes<T>) {
        const int64_t u = panels.first_unit(p) + v, n = min_of(kLanes<T>, panels.H - u);
        dot_rows(rows, K, a, row_of(i, u), row_stride, n, acc + i * width + v, acc_row);
      }
    }
  }
};

// A matrix [K, width] as the other products read it: its columns in panels of kPanelWidth, panel p
// packed as [groups of K][its columns, whole vectors]. If elements are multiplied as they are and
// `packs` is false, then the panels are read in place. The vectors of the last panel may then reach
// into the next row, and those products are not used. Only the last row is copied, because there is
// no row behind it.
//
// Row k is w + k*row_stride. With `shape`, the rows are those of a weight matrix of gates, in the
// order of the recurrent slots. If `transposed`, then w and row_stride describe the transposed
// matrix [width, K].
template <typename T>
struct ColumnPanels {
  using E = Operand<T>;

  int64_t K = 0, width = 0;
  const T* w = nullptr;
  int64_t row_stride = 0;
  const CellShape* shape = nullptr;
  bool packs = true, transposed = false;
  const float* scales = nullptr;  // of the columns, which are rows of integers
  bool frozen = false;            // packed before, and w is null
  Panel<T>* packed = nullptr;

  int64_t count() const { return ceil_div(width, kPanelWidth<T>); }
  int64_t lanes() const {
    if (is_read_in_place()) return copies_last_row() ? kPanelWidth<T> : 0;
    return count() * panel_lanes();
  }
  void take_room(Carver& carver) { packed = carver.take<Panel<T>>(lanes()); }
  int64_t columns(int64_t p) const { return min_of(kPanelWidth<T>, width - p * kPanelWidth<T>); }
  int vectors(int64_t p) const { return int(ceil_div(columns(p), kLanes<T>)); }
  int64_t panel_lanes() const { return kParts<T> * kPanelWidth<T> * groups_in_memory<E>(K); }
  Panel<T>* panel(int64_t p) const { return packed + p * panel_lanes(); }
  // Whether the panels are read in place. No vector may reach beyond the next row.
  bool is_read_in_place() const { return !packs && row_stride >= kLanes<T>; }
  bool copies_last_row() const { return width % kLanes<T> != 0; }
  const T* last_row() const { return w + (K - 1) * row_stride; }

  const T* row_of(int64_t k) const {
    if (!shape) return w + k * row_stride;
    const int64_t H = K / shape->gates;
    return w + (shape->recurrent_gate(int(k / H)) * H + k % H) * row_stride;
  }

  __attribute__((noinline)) void pack(int64_t p) const {
    if (kFrozenOnly<T> || transposed) {
      pack_transposed_rows(p);
    } else if constexpr (!kFrozenOnly<T>) {
      if (!is_read_in_place()) {
        pack_rows(p, [&](int64_t k) { return row_of(k); });
      } else if (p == count() - 1 && copies_last_row()) {
        pack_group<T>(
            0, 1, [&](int64_t) { return last_row() + p * kPanelWidth<T>; }, columns(p), {1, 0},
            packed);
      }
    }
  }
  // Writes the packed matrix, transposed, to a dense one [width, K].
  void unpack_transposed(Compute<T>* to) const {
    for (int64_t p = 0; p < count(); ++p) {
      const PanelLayout<E> layout = layout_of(p);
      for (int64_t i = 0; i < columns(p); ++i) {
        for (int64_t k = 0; k < K; ++k) {
          to[(p * kPanelWidth<T> + i) * K + k] = unpacked<T>(panel(p), layout, k, i);
        }
      }
    }
  }
  // Packs rows from anywhere in memory: row k begins at rows(k).
  template <typename RowsOf>
  void pack_rows(int64_t p, RowsOf rows) const {
    const PanelLayout<E> layout = layout_of(p);
    for (int64_t k = 0; k < K; k += kGroup<E>) {
      pack_group<T>(
          k, K, [&](int64_t i) { return rows(i) + p * kPanelWidth<T>; }, columns(p), layout,
          panel(p) + groups<E>(k) * layout.stride());
    }
    for (int64_t v = 0; v < vectors(p); ++v) {
      Panel<T>* const to = panel(p) + layout.at(v * kLanes<T>);
      for (int64_t g = groups<E>(K); g < groups_in_memory<E>(K); ++g) {
        for (int part = 0; part < kParts<T>; ++part) {
          zero_row(to + part * layout.part() + g * layout.stride(), 0, kLanes<T>);
        }
      }
    }
  }

  // acc[m][columns of p, whole vectors] += a[m] x this matrix.
  void add(int64_t p, int64_t rows, const E* const* a, Compute<T>* acc, int64_t acc_row) const {
    if constexpr (kMultipliedInPlace<T>) {
      if (is_read_in_place()) {
        const bool copied = p == count() - 1 && copies_last_row();
        const int64_t depth = shape ? K / shape->gates : K;  // consecutive rows
        for (int64_t k = 0; k < K; k += depth) {
          const T* first = row_of(k);
          const int64_t last = copied && first + (depth - 1) * row_stride == last_row();
          product(vectors(p), rows, k, depth - last, a, first + p * kPanelWidth<T>, row_stride, acc,
                  acc_row);
          if (last) {
            product(vectors(p), rows, k + depth - 1, 1, a, packed, kPanelWidth<T>, acc, acc_row);
          }
        }
        return;
      }
    }
    product_of<T>(vectors(p), rows, K, a, panel(p), vectors(p) * kLanes<T>, layout_of(p).part(),
                  acc, acc_row);
  }

  // acc[m][columns of p] = or += a[m] x this matrix, of panels that have been packed and whose
  // vectors are whole.
  void put(int64_t p, int64_t rows, const E* const* a, Compute<T>* acc, int64_t acc_row,
           bool adds) const {
    const int64_t panel_row = vectors(p) * kLanes<T>, part = layout_of(p).part();
    if (adds) {
      product_of<T, true>(vectors(p), rows, K, a, panel(p), panel_row, part, acc, acc_row);
    } else {
      product_of<T, false>(vectors(p), rows, K, a, panel(p), panel_row, part, acc, acc_row);
    }
  }

  // out[m][columns of p] = or += a[m] x this matrix.
  template <typename Out>
  __attribute__((noinline)) void multiply(int64_t p, int64_t rows, const E* const* a,
                                          Out* const* out, bool adds) const {
    product_to<Compute<T>>(rows, out, columns(p), adds,
                           [&](int64_t first, int64_t count, Compute<T>* acc) {
                             add(p, count, a + first, acc, kPanelWidth<T>);
                           });
  }

  // The columns `own` of the rows to(m) = or += from(m) x this matrix, for m < rows. If w is null,
  // the matrix is zeros, and nothing is written. `left` has room for kRowsAtOnce rows.
  template <typename From, typename To>
  void multiply_rows(Range own, int64_t rows, const LeftRows<T>& left, From from, To to,
                     bool adds) const {
    decltype(to(0)) out[kRowsAtOnce];
    for (int64_t first = 0; (w || frozen) && first < rows; first += kRowsAtOnce) {
      const int64_t count = min_of(kRowsAtOnce, rows - first);
      for (int64_t m = 0; m < count; ++m) left[m] = from(first + m);
      const E* const* operands = left.operands(count);
      for (int64_t p = own.begin / kPanelWidth<T>; p * kPanelWidth<T> < own.end; ++p) {
        for (int64_t m = 0; m < count; ++m) out[m] = to(first + m) + p * kPanelWidth<T>;
        multiply(p, count, operands, out, adds);
      }
    }
  }

 private:
  PanelLayout<E> layout_of(int64_t p) const { return {K, vectors(p) * kLanes<T>}; }

  void pack_transposed_rows(int64_t p) const {
    const PanelLayout<E> layout = layout_of(p);
    for (int v = 0; v < vectors(p); ++v) {
      const int64_t column = p * kPanelWidth<T> + v * kLanes<T>;
      pack_weights<T>(
          K, [&](int64_t i) { return w + (column + i) * row_stride; },
          scales ? scales + column : nullptr, width - column, layout, v * kLanes<T>, panel(p),
          kLanes<T>);
    }
  }
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
