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

  int64_t H;

  int64_t count() const { return ceil_div(H, kUnits); }
  int64_t first_unit(int64_t p) const { return p * kUnits; }
  static int64_t panel_lanes(int64_t K) { return kGroupLanes * groups<Operand<T>>(K); }
  int64_t packed_lanes(int64_t K) const { return count() * panel_lanes(K); }

  // Of one slot in panel p.
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
  // b_hh if both products enter it.
  void pack_bias(int64_t p, const Weights<T>& w, Compute<T>* to) const {
    const int64_t lanes = width(p);
    zero_row(to, 0, kAccWidth);
    for (int slot = 0; slot < kShape.slots; ++slot) {
      for (int64_t i = 0; i < lanes; ++i) {
        const int64_t u = first_unit(p) + i;
        const T* b_ih = slot >= kShape.input_slot && u < H ? w.b_ih : nullptr;
        const T* b_hh = slot < kShape.gates && u < H ? w.b_hh : nullptr;
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
  const T* w;
  int64_t row, K;
  Compute<T>* packed;

  int64_t lanes() const { return panels.packed_lanes(K); }

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
    const int64_t panel_row = slots_of(width) * width;
    Compute<T>* panel = packed + p * Panels::panel_lanes(K);
    if (slots_of(width) > kShape.gates) zero_row(panel, 0, groups<E>(K) * panel_row);
    for (int i = 0; i < kShape.gates; ++i) {
      for (int64_t v = 0; v < width; v += kLanes<T>) {
        const T* first = w + (gate_of(i) * panels.H + unit + v) * row;
        pack_transposed<T>(
            K, [&](int64_t u) { return first + u * row; }, panels.H - unit - v,
            panel + (zeros_before(width) + i) * width + v, panel_row, min_of(width, kLanes<T>));
      }
    }
  }

  // acc[m][the slots of this product] += a[m] x this matrix, for the units of panel p.
  void add(int64_t p, int64_t rows, const E* const* a, Compute<T>* acc, int64_t acc_row) const {
    const int64_t width = panels.width(p);
    if (kRoundedForProducts<T> || packed) {
      const int64_t panel_row = slots_of(width) * width;
      const Compute<T>* panel = packed + p * Panels::panel_lanes(K);
      acc += Panels::slot_at(kFirstSlot - zeros_before(width), width);
      auto vectors = int(panel_row / kLanes<T>);
      if constexpr (kShape.gates > kPanelVectors) {
        product(kPanelVectors, rows, 0, K, a, panel, panel_row, acc, acc_row);
        vectors -= kPanelVectors, panel += kPanelWidth<T>, acc += kPanelWidth<T>;
      }
      product(vectors, rows, 0, K, a, panel, panel_row, acc, acc_row);
      return;
    }
    if constexpr (!kRoundedForProducts<T>) {
      acc += Panels::slot_at(kFirstSlot, width);
      for (int i = 0; i < kShape.gates; ++i) {
        for (int64_t v = 0; v < width; v += kLanes<T>) {
          const int64_t u = panels.first_unit(p) + v, n = min_of(kLanes<T>, panels.H - u);
          dot_rows(rows, K, a, row_of(i, u), row, n, acc + i * width + v, acc_row);
        }
      }
    }
  }

  // The same with the batch across: the rows of this matrix are the left operand, and the result is
  // transposed. Every sum has to be that of packed weights. So products by AMX tiles begin with the
  // contents of acc, and other products are added to it in blocks of kDepth k. `weights` has room
  // for kAccWidth rows.
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
    const E* const* left = weights.operands(count);
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
        product<E, kFromAcc>(int(lanes / kLanes<T>), count, k, min_of(depth, K - k), left,
                             across + m * groups<E>(K) + groups<E>(k) * lanes, lanes, sums, lanes);
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
    return w + (gate_of(gate) * panels.H + unit) * row;
  }
};

// A matrix [K, width] as the other products read it: its columns in panels of kPanelWidth, panel p
// packed as [groups of K][its columns, whole vectors]. If elements are multiplied as they are and
// `packs` is false, then the panels are read in place. The vectors of the last panel may then reach
// into the next row, and those products are not used. Only the last row is copied, because there is
// no row behind it.
//
// Row k is w + k*row; with `shape`, the rows of a weight matrix of gates in the order of the
// recurrent slots.
template <typename T>
struct ColumnPanels {
  using E = Operand<T>;

  int64_t K, width;
  const T* w;
  int64_t row;
  const CellShape* shape;
  bool packs;
  Compute<T>* packed;

  int64_t count() const { return ceil_div(width, kPanelWidth<T>); }
  int64_t lanes() const {
    if (lies()) return copies_last_row() ? kPanelWidth<T> : 0;
    return count() * kPanelWidth<T> * groups<E>(K);
  }
  int64_t columns(int64_t p) const { return min_of(kPanelWidth<T>, width - p * kPanelWidth<T>); }
  int vectors(int64_t p) const { return int(ceil_div(columns(p), kLanes<T>)); }
  Compute<T>* panel(int64_t p) const { return packed + p * kPanelWidth<T> * groups<E>(K); }
  // No vector reaches beyond the next row.
  bool lies() const { return !packs && row >= kLanes<T>; }
  bool copies_last_row() const { return width % kLanes<T> != 0; }
  const T* last_row() const { return w + (K - 1) * row; }

  const T* row_of(int64_t k) const {
    if (!shape) return w + k * row;
    const int64_t H = K / shape->gates;
    return w + (shape->recurrent_gate(int(k / H)) * H + k % H) * row;
  }

  void pack(int64_t p) const {
    if (!lies()) {
      pack_rows(p, [&](int64_t k) { return row_of(k); });
    } else if (p == count() - 1 && copies_last_row()) {
      pack_group<T>(
          0, 1, [&](int64_t) { return last_row() + p * kPanelWidth<T>; }, columns(p), packed);
    }
  }
  // From rows anywhere in memory: row k begins at rows(k).
  template <typename RowsOf>
  void pack_rows(int64_t p, RowsOf rows) const {
    const int64_t panel_row = vectors(p) * kLanes<T>;
    for (int64_t k = 0; k < K; k += kGroup<E>) {
      pack_group<T>(
          k, K, [&](int64_t i) { return rows(i) + p * kPanelWidth<T>; }, columns(p),
          panel(p) + groups<E>(k) * panel_row);
    }
  }
  // From the transposed matrix [width, K], which is then what w and row describe.
  void pack_transpose(int64_t p) const {
    for (int v = 0; v < vectors(p); ++v) {
      const int64_t column = p * kPanelWidth<T> + v * kLanes<T>;
      pack_transposed<T>(
          K, [&](int64_t i) { return w + (column + i) * row; }, width - column,
          panel(p) + v * kLanes<T>, vectors(p) * kLanes<T>, kLanes<T>);
    }
  }

  // acc[m][columns of p, whole vectors] += a[m] x this matrix.
  void add(int64_t p, int64_t rows, const E* const* a, Compute<T>* acc, int64_t acc_row) const {
    if constexpr (kMultipliedInPlace<T>) {
      if (lies()) {
        const bool copied = p == count() - 1 && copies_last_row();
        const int64_t depth = shape ? K / shape->gates : K;  // rows in a row
        for (int64_t k = 0; k < K; k += depth) {
          const T* first = row_of(k);
          const int64_t last = copied && first + (depth - 1) * row == last_row();
          product(vectors(p), rows, k, depth - last, a, first + p * kPanelWidth<T>, row, acc,
                  acc_row);
          if (last) {
            product(vectors(p), rows, k + depth - 1, 1, a, packed, kPanelWidth<T>, acc, acc_row);
          }
        }
        return;
      }
    }
    product(vectors(p), rows, 0, K, a, panel(p), vectors(p) * kLanes<T>, acc, acc_row);
  }

  // acc[m][columns of p] = or += a[m] x this matrix, of panels that have been packed and whose
  // vectors are whole.
  void put(int64_t p, int64_t rows, const E* const* a, Compute<T>* acc, int64_t acc_row,
           bool adds) const {
    const int64_t panel_row = vectors(p) * kLanes<T>;
    if (adds) {
      product<E, true>(vectors(p), rows, 0, K, a, panel(p), panel_row, acc, acc_row);
    } else {
      product<E, false>(vectors(p), rows, 0, K, a, panel(p), panel_row, acc, acc_row);
    }
  }

  // out[m][columns of p] = or += a[m] x this matrix.
  template <typename Out>
  void multiply(int64_t p, int64_t rows, const E* const* a, Out* const* out, bool adds) const {
    product_to<Compute<T>>(rows, out, columns(p), adds,
                           [&](int64_t first, int64_t count, Compute<T>* acc) {
                             add(p, count, a + first, acc, kPanelWidth<T>);
                           });
  }
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
