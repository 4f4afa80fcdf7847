// Weight matrices as the step products read them: panels of units with all their gates side by
// side, so that one register tile holds every slot of its units and the cell can finish them
// without leaving the cache.
//
//   panel p = units [p*kUnits, ...): [groups of K][gates][width]       acc row = [slots][width]
//
// width is that of a slot: whole vectors. Only where four slots stand side by side and the units of
// the last panel fill no more than half or a quarter of a vector, it is that half or quarter, and
// the slots share vectors; a product that owns three of them then has a fourth of zeros, before or
// behind, for its range to be whole vectors.
#pragma once

#include "cpu/gemm.h"
#include "cpu/rows.h"
#include "scan.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

template <typename T, typename Cell>
struct UnitPanels {
  static constexpr CellShape kShape = Cell::kShape;
  static constexpr int kUnitVectors = kPanelVectors / kShape.slots;
  static constexpr int64_t kUnits = kUnitVectors * kLanes<T>;
  static constexpr int64_t kGroupLanes = kShape.gates * kUnits;  // of one group of a whole panel
  static_assert(kPanelVectors % kShape.slots == 0, "all slots of a unit stand in one tile");

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
};

enum class Role { kInput, kRecurrent };

// One of W_ih and W_hh: packed, or as it lies where `packed` is null.
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

  static constexpr int gate_of(int i) {
    return role == Role::kInput ? kShape.input_gate(i + kFirstSlot) : kShape.recurrent_gate(i);
  }

  // The range of slots that the product adds to, with the fourth of zeros where there is one.
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
        pack_transposed(K, w + (gate_of(i) * panels.H + unit + v) * row, row, panels.H - unit - v,
                        panel + (zeros_before(width) + i) * width + v, panel_row,
                        min_of(width, kLanes<T>));
      }
    }
  }

  // acc[m][the slots of this product] += a[m] x this matrix, for the units of panel p.
  void add(int64_t p, int64_t rows, const E* const* a, Compute<T>* acc, int64_t acc_row) const {
    const int64_t width = panels.width(p);
    acc += Panels::slot_at(kFirstSlot - zeros_before(width), width);
    if (packed) {
      product(int(slots_of(width) * width / kLanes<T>), rows, K, a,
              packed + p * Panels::panel_lanes(K), acc, acc_row);
      return;
    }
    acc += zeros_before(width) * width;
    for (int i = 0; i < kShape.gates; ++i) {
      for (int64_t v = 0; v < width; v += kLanes<T>) {
        const int64_t u = panels.first_unit(p) + v, n = min_of(kLanes<T>, panels.H - u);
        const T* first = w + (gate_of(i) * panels.H + u) * row;
        for (int64_t m = 0; m < rows; ++m) {
          Compute<T>* to = acc + m * acc_row + i * width + v;
          store_up_to(to, load(to) + dot_rows(K, a[m], first, row, n), n);
        }
      }
    }
  }
};

// A matrix [K, width] as the other products read it: its columns in panels of kPanelWidth, panel p
// packed as [groups of K][its columns, whole vectors]; or, where `packed` is null, as it lies.
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
  Compute<T>* packed;

  int64_t count() const { return ceil_div(width, kPanelWidth<T>); }
  int64_t lanes() const { return count() * kPanelWidth<T> * groups<E>(K); }
  int64_t columns(int64_t p) const { return min_of(kPanelWidth<T>, width - p * kPanelWidth<T>); }
  int vectors(int64_t p) const { return int(ceil_div(columns(p), kLanes<T>)); }
  Compute<T>* panel(int64_t p) const { return packed + p * kPanelWidth<T> * groups<E>(K); }

  const T* row_of(int64_t k) const {
    if (!shape) return w + k * row;
    const int64_t H = K / shape->gates;
    return w + (shape->recurrent_gate(int(k / H)) * H + k % H) * row;
  }

  void pack(int64_t p) const {
    if (!packed) return;
    pack_rows(p, [&](int64_t k) { return row_of(k); });
  }
  // From rows that lie anywhere: row k begins at rows(k).
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
      pack_transposed(K, w + column * row, row, width - column, panel(p) + v * kLanes<T>,
                      vectors(p) * kLanes<T>, kLanes<T>);
    }
  }

  // out[m][columns of p] = or += a[m] x this matrix.
  template <typename Out>
  void multiply(int64_t p, int64_t rows, const E* const* a, Out* const* out, bool add) const {
    if (packed) {
      product_to(rows, K, a, panel(p), out, columns(p), add);
      return;
    }
    for (int64_t m = 0; m < rows; ++m) multiply_as_it_lies(p, a[m], out[m], add);
  }

 private:
  // The end of the part of K that begins there: at most kDepth, all in one gate.
  static int64_t next_part(int64_t begin, int64_t depth) {
    return min_of(begin + kDepth, (begin / depth + 1) * depth);
  }
  template <typename Out>
  void multiply_as_it_lies(int64_t p, const E* a, Out* out, bool add) const {
    const int64_t n = columns(p), blocks = shape ? shape->gates : 1, depth = K / blocks;
    Vec<T> sum[kPanelVectors] = {};
    for (int64_t begin = 0; begin < K; begin = next_part(begin, depth)) {
      const int64_t end = next_part(begin, depth);
      const T* from = row_of(begin) + p * kPanelWidth<T>;
      Vec<T> part[kPanelVectors] = {};
      for (int64_t k = begin; k < end; ++k, from += row) {
#pragma GCC unroll 4
        for (int v = 0; v < kPanelVectors; ++v) {
          const int64_t left = n - v * kLanes<T>;
          if (left > 0) part[v] = value(a[k]) * load_up_to(from + v * kLanes<T>, left) + part[v];
        }
      }
      for (int v = 0; v < kPanelVectors; ++v) sum[v] += part[v];
    }
    for (int v = 0; v < vectors(p); ++v) {
      const int64_t i = v * kLanes<T>;
      if (add) sum[v] += load_up_to(out + i, n - i);
      store_up_to(out + i, sum[v], n - i);
    }
  }
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
