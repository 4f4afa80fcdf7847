// Layer normalisation on the CPU (Ba et al., "Layer normalization", 2016, equations 20 to 22):
//
//   slots(t) = N(W_ih x(t)) + b_ih + N(W_hh h(t-1)) + b_hh        N(z) = gain (z - mean) * scale
//   h(t) = output(slots(t), N(c(t)) + bias_c)                     scale = 1 / sqrt(variance + eps)
//
// Mean and variance are those of one row: of all G H sums of a product, and of the H cell states.
// Cells that do not normalise c (cells/cell.h) have the first line alone.
//
// A member of a team has the sums of its own units. So each member publishes sums over blocks of
// kPanelWidth units. After a barrier all members add these in the order of the blocks, so the
// number of members does not change the bits. A variance is computed from the variances of the
// blocks and the differences of their means (Chan et al., 1983), because digits would cancel if it
// were computed from the mean of the squares. Each member reads all of c.
//
// For backward a row saves the normalised sums (z - mean) * scale of the input product [G*H], of
// the recurrent one [G*H] in the order of its slots, of c [H], and the three scales. With dz the
// gradient of N(z), the gradient of z is
//
//   scale (gain dz - mean of gain dz - n * mean of gain dz n)     n = (z - mean) * scale
//
// and has the same place in rows of the same width (Backward::dnormalised), in which c has dz
// instead. The gradients of gains and biases are sums over all rows (gradients.h).
#pragma once

#include <cmath>
#include <cstring>

#include "cells/cell.h"
#include "cpu/panels.h"
#include "cpu/pass.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

constexpr double kEpsilon = 1e-5;  // that of torch.nn.LayerNorm

// What is normalised, in the order in which rows have it.
enum class Normed { kInput, kRecurrent, kCell };

// The parts of a row that is saved, or of its gradients.
template <typename T, typename Cell>
struct NormalisedRow {
  using A = Compute<T>;
  static constexpr CellShape kShape = Cell::kShape;

  static constexpr int64_t place(Normed what, int64_t H) { return int(what) * kShape.gates * H; }

  static A scale(const T* row, Normed what, int64_t H) {
    A found;
    std::memcpy(&found, row + place_of_scale(what, H), sizeof(A));
    return found;
  }
  static void set_scale(T* row, Normed what, int64_t H, A scale) {
    std::memcpy(row + place_of_scale(what, H), &scale, sizeof(A));
  }

 private:
  static constexpr int64_t place_of_scale(Normed what, int64_t H) {
    return kShape.normalised() * H + int(what) * int(sizeof(A) / sizeof(T));
  }
};

template <typename T, int kHalf = kLanes<T> / 2>
RNNKERN_INLINE Compute<T> sum_of_lanes(Vec<T> v) {
  if constexpr (kHalf == 0) {
    return v[0];
  } else {
    v += halves_swapped<kHalf, kLanes<T>>(v);
    return sum_of_lanes<T, kHalf / 2>(v);
  }
}

// The first n lanes, with zeros in the others.
template <typename T>
RNNKERN_INLINE Vec<T> first_lanes(Vec<T> v, int64_t n) {
  using A = Compute<T>;
  if (n >= kLanes<T>) return v;
  alignas(kVectorBytes) A lanes[kLanes<T>];
  store(lanes, v);
  return load_part(lanes, n);
}

template <typename T>
RNNKERN_INLINE Vec<T> load_or_zero(const T* p, int64_t at, int64_t n) {
  return p ? load_up_to(p + at, n) : Vec<T>{};
}

// Calls f(block, its units) for the blocks of kPanelWidth units.
template <typename T, typename F>
RNNKERN_INLINE void for_unit_blocks(Range units, F f) {
  for (int64_t u = units.begin; u < units.end; u += kPanelWidth<T>) {
    f(u / kPanelWidth<T>, Range{u, min_of(u + kPanelWidth<T>, units.end)});
  }
}

template <typename A>
struct Moments {
  A mean, scale;
};
// `squares` is the sum of the squared differences of `count` numbers from their mean.
template <typename A>
Moments<A> moments(A mean, A squares, int64_t count) {
  return {mean, A(1) / std::sqrt(squares / A(count) + A(kEpsilon))};
}

// What the output of the cell reads for n units from u on, whose normalised c is `normal`.
template <typename T, typename G>
RNNKERN_INLINE Vec<T> read_by_output(const Gains<G>& gains, Vec<T> normal, int64_t u, int64_t n) {
  return normal * load_up_to(gains.c + u, n) + load_or_zero(gains.bias_c, u, n);
}

// The moments of a row of H units with `values` numbers each. Each block of units has two numbers,
// `stride` apart from the next: their sum, and the sum of their squared differences from the mean
// of the block.
template <typename T>
Moments<Compute<T>> moments_of(const Compute<T>* blocks, int64_t stride, int64_t H, int values) {
  using A = Compute<T>;
  A sum = 0, squares = 0;
  for_unit_blocks<T>({0, H}, [&](int64_t b, Range) { sum += blocks[b * stride]; });
  const A mean = sum / A(values * H);
  for_unit_blocks<T>({0, H}, [&](int64_t b, Range of) {
    const A count = A(values * (of.end - of.begin));
    const A differs = blocks[b * stride] / count - mean;
    squares += blocks[b * stride + 1] + count * differs * differs;
  });
  return moments(mean, squares, values * H);
}

// The forward pass.
template <typename T, typename Cell>
class SumNorms {
  using A = Compute<T>;
  using Panels = UnitPanels<T, Cell>;
  using Saved = NormalisedRow<T, Cell>;
  static constexpr CellShape kShape = Cell::kShape;
  static constexpr int kNumbers = 4;  // of a block
  static_assert(kPanelWidth<T> % Panels::kUnits == 0, "a block is whole panels");

 public:
  // The sums of a row in the accumulators of the first panel, and the distance to those of the next
  // panel.
  struct Row {
    int direction;
    int64_t rank;
    A *input, *recurrent;
    int64_t input_panel, recurrent_panel;
    T* saved;  // null: inference
  };

  SumNorms(const Sizes& sizes, const Steps& steps, Carver& carver) : panels_{sizes.H} {
    if (!sizes.normalised) return;
    blocks_ =
        CarriedRows<A>::take(sizes, steps, kNumbers * ceil_div(sizes.H, kPanelWidth<T>), carver);
  }

  // Publishes the thread's part of the sums over all units.
  void publish(const Row& row, Range units) const {
    A* const to = blocks_.at(row.direction, row.rank);
    for_unit_blocks<T>(units, [&](int64_t b, Range own) {
      publish<kShape.input_slot>(row.input, row.input_panel, own, to + b * kNumbers);
      if constexpr (kShape.recurrent) {
        publish<0>(row.recurrent, row.recurrent_panel, own, to + b * kNumbers + 2);
      }
    });
  }

  // Writes what the cell reads to the accumulators of the input product. With `saves`, saves the
  // scales too.
  void apply(const Weights<T>& w, const Row& row, Range units, bool saves) const {
    const int64_t H = panels_.H;
    const A* const blocks = blocks_.at(row.direction, row.rank);
    const auto input = moments_of<T>(blocks, kNumbers, H, kShape.gates);
    Moments<A> recurrent = {};
    if constexpr (kShape.recurrent) {
      recurrent = moments_of<T>(blocks + 2, kNumbers, H, kShape.gates);
    }
    if (row.saved && saves) {
      Saved::set_scale(row.saved, Normed::kInput, H, input.scale);
      Saved::set_scale(row.saved, Normed::kRecurrent, H, recurrent.scale);
    }
    for_vectors(units, [&](int64_t p, int64_t place, int64_t width, int64_t u,
                           int64_t n) __attribute__((always_inline)) {
      A* const sums = row.input + p * row.input_panel + place;
      const A* const others = row.recurrent + p * row.recurrent_panel + place;
#pragma GCC unroll 8
      for (int i = 0; i < kShape.slots; ++i) {
        const int64_t at = Panels::slot_at(i, width);
        Vec<T> slot{};
        if (i >= kShape.input_slot) {
          const int64_t g = kShape.input_gate(i) * H + u;
          const Vec<T> normal = (load_up_to(sums + at, n) - input.mean) * input.scale;
          if (row.saved) store_up_to(row.saved + g, normal, n);
          slot = normal * load_up_to(w.gains.ih + g, n) + load_or_zero(w.b_ih, g, n);
        }
        if (kShape.recurrent && i < kShape.gates) {
          const int64_t g = kShape.recurrent_gate(i) * H + u;
          const Vec<T> normal = (load_up_to(others + at, n) - recurrent.mean) * recurrent.scale;
          if (row.saved) {
            store_up_to(row.saved + Saved::place(Normed::kRecurrent, H) + i * H + u, normal, n);
          }
          slot += normal * load_up_to(w.gains.hh + g, n) + load_or_zero(w.b_hh, g, n);
        }
        store_up_to(sums + at, slot, n);
      }
    });
  }

  // Writes h, once the whole team has written c. The accumulators hold the slots after
  // forward_state.
  template <typename C>
  void apply_to_c(const Weights<T>& w, const Row& row, const C* c, Range units, bool saves,
                  T* h) const {
    const int64_t H = panels_.H;
    const Moments<A> of = moments_of_c(c);
    if (row.saved && saves) Saved::set_scale(row.saved, Normed::kCell, H, of.scale);
    for_vectors(units, [&](int64_t p, int64_t place, int64_t width, int64_t u,
                           int64_t n) __attribute__((always_inline)) {
      const A* const slots = row.input + p * row.input_panel + place;
      Step<Vec<T>> s;
#pragma GCC unroll 8
      for (int i = 0; i < kShape.slots; ++i) {
        s.slot[i] = load_up_to(slots + Panels::slot_at(i, width), n);
      }
      const Vec<T> normal = (load_up_to(c + u, n) - of.mean) * of.scale;
      if (row.saved) store_up_to(row.saved + Saved::place(Normed::kCell, H) + u, normal, n);
      s.c = read_by_output<T>(w.gains, normal, u, n);
      Cell::forward_output(s);
      store_up_to(h + u, s.h, n);
    });
  }

 private:
  // Calls f(panel, place in its accumulators, width of a slot, unit, units left) for each vector of
  // units.
  template <typename F>
  RNNKERN_INLINE void for_vectors(Range units, F f) const {
    const Range panels = Panels::panels_of(units);
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      const int64_t width = panels_.width(p), first = panels_.first_unit(p);
      for (int64_t v = 0; v < width; v += kLanes<T>) {
        const int64_t left = panels_.H - first - v;
        if (left >= kLanes<T>) {  // a number that the compiler knows
          f(p, v, width, first + v, int64_t(kLanes<T>));
        } else {
          f(p, v, width, first + v, left);
        }
      }
    }
  }

  // Publishes the two numbers of one block of units, for the product whose slots begin with kFirst.
  template <int kFirst>
  RNNKERN_INLINE void publish(const A* sums, int64_t panel, Range units, A* to) const {
    const auto add_up = [&](auto f) __attribute__((always_inline)) {
      Vec<T> total{};
      for_vectors(units, [&](int64_t p, int64_t place, int64_t width, int64_t,
                             int64_t n) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int i = kFirst; i < kFirst + kShape.gates; ++i) {
          total += f(load_up_to(sums + p * panel + place + Panels::slot_at(i, width), n), n);
        }
      });
      return sum_of_lanes<T>(total);
    };
    to[0] = add_up([](Vec<T> x, int64_t) { return x; });
    const A mean = to[0] / A(kShape.gates * (units.end - units.begin));
    to[1] = add_up([mean](Vec<T> x, int64_t n) {
      const Vec<T> differs = first_lanes<T>(x - mean, n);
      return differs * differs;
    });
  }

  template <typename C>
  Moments<A> moments_of_c(const C* c) const {
    const int64_t H = panels_.H;
    const auto add_up = [&](auto f) __attribute__((always_inline)) {
      Vec<T> total{};
      for (int64_t u = 0; u < H; u += kLanes<T>) total += f(load_up_to(c + u, H - u), H - u);
      return sum_of_lanes<T>(total);
    };
    const A mean = add_up([](Vec<T> x, int64_t) { return x; }) / A(H);
    const A squares = add_up([mean](Vec<T> x, int64_t n) {
      const Vec<T> differs = first_lanes<T>(x - mean, n);
      return differs * differs;
    });
    return moments(mean, squares, H);
  }

  Panels panels_;
  CarriedRows<A> blocks_;  // [D, N, blocks * kNumbers]
};

// The backward pass: computes the gradients of what was normalised from those of the results.
template <typename T, typename Cell>
class NormGradients {
  using A = Compute<T>;
  using Saved = NormalisedRow<T, Cell>;
  static constexpr CellShape kShape = Cell::kShape;
  static constexpr int64_t G = kShape.gates;
  static constexpr int kNumbers = 6;  // of a block: two for each kind

 public:
  // One row in one step.
  struct Row {
    int direction;
    int64_t rank;
    const T* saved;
    T* gradients;     // like it, written
    const T* dslots;  // as the cell has left them
  };

  NormGradients() = default;
  NormGradients(const Sizes& sizes, const Steps& steps, Carver& carver) : H_(sizes.H) {
    if (!sizes.normalised) return;
    blocks_ =
        CarriedRows<A>::take(sizes, steps, kNumbers * ceil_div(sizes.H, kPanelWidth<T>), carver);
  }

  // The normalised c of n units from u on.
  Vec<T> normal_c(const Row& row, int64_t u, int64_t n) const {
    return load_up_to(row.saved + c_at(u), n);
  }

  // Publishes the thread's part of the sums for c. dc(u, n): the gradients of what the output
  // reads.
  template <typename Dc>
  void publish_c(const Gains<const T>& gains, const Row& row, Range units, Dc dc) const {
    for_unit_blocks<T>(units, [&](int64_t b, Range own) {
      Vec<T> sums[2] = {};
      for (int64_t u = own.begin; u < own.end; u += kLanes<T>) {
        const int64_t n = own.end - u;
        const Vec<T> d = dc(u, n);
        store_up_to(row.gradients + c_at(u), d, n);
        add(first_lanes<T>(d, n) * load_up_to(gains.c + u, n), normal_c(row, u, n), sums);
      }
      write(sums, at(row, b, Normed::kCell));
    });
  }
  // The means that turn a gradient of the normalised c into one of c, once the team has published
  // its sums.
  struct Means {
    A first, second, scale;
    Vec<T> gradient(Vec<T> d, Vec<T> normal) const { return scale * (d - first - normal * second); }
  };
  Means means(const Row& row, Normed what) const {
    A sums[2] = {};
    for_unit_blocks<T>({0, H_}, [&](int64_t b, Range) {
      const A* const block = at(row, b, what);
      sums[0] += block[0];
      sums[1] += block[1];
    });
    const A count = A(what == Normed::kCell ? H_ : G * H_);
    return {sums[0] / count, sums[1] / count, Saved::scale(row.saved, what, H_)};
  }

  // Publishes the thread's part of the sums for both products, from dslots.
  void publish(const Gains<const T>& gains, const Row& row, Range units) const {
    for_unit_blocks<T>(units, [&](int64_t b, Range own) {
      for_products([&](auto product) {
        Vec<T> sums[2] = {};
        for_values<product()>(gains, row, own, [&](Vec<T> d, Vec<T> normal, int64_t, int64_t) {
          add(d, normal, sums);
        });
        write(sums, at(row, b, product()));
      });
    });
  }
  // Writes the gradients of the sums of both products, for the thread's units.
  void apply(const Gains<const T>& gains, const Row& row, Range units) const {
    for_products([&](auto product) {
      const Means of = means(row, product());
      for_values<product()>(gains, row, units, [&](Vec<T> d, Vec<T> normal, int64_t at, int64_t n) {
        store_up_to(row.gradients + at, of.gradient(d, normal), n);
      });
    });
  }

 private:
  int64_t c_at(int64_t u) const { return Saved::place(Normed::kCell, H_) + u; }
  A* at(const Row& row, int64_t block, Normed what) const {
    return blocks_.at(row.direction, row.rank) + block * kNumbers + 2 * int(what);
  }
  static RNNKERN_INLINE void add(Vec<T> d, Vec<T> normal, Vec<T> (&sums)[2]) {
    sums[0] += d;
    sums[1] += d * normal;
  }
  static void write(const Vec<T> (&sums)[2], A* to) {
    for (int k = 0; k < 2; ++k) to[k] = sum_of_lanes<T>(sums[k]);
  }
  template <typename F>
  static RNNKERN_INLINE void for_products(F f) {
    f(std::integral_constant<Normed, Normed::kInput>{});
    if constexpr (kShape.recurrent) f(std::integral_constant<Normed, Normed::kRecurrent>{});
  }

  // Calls f(gradient of a normalised sum, that sum, its place in the row, n) for all gates of the
  // units.
  template <Normed kProduct, typename F>
  RNNKERN_INLINE void for_values(const Gains<const T>& gains, const Row& row, Range units,
                                 F f) const {
    constexpr bool kIsInput = kProduct == Normed::kInput;
    const T* const gain = kIsInput ? gains.ih : gains.hh;
#pragma GCC unroll 8
    for (int i = 0; i < kShape.gates; ++i) {
      const int slot = kIsInput ? i + kShape.input_slot : i;
      const int gate = kIsInput ? i : kShape.recurrent_gate(i);
      const auto vector = [&](int64_t u, int64_t n) __attribute__((always_inline)) {
        const int64_t at = Saved::place(kProduct, H_) + i * H_ + u;
        const Vec<T> d = load_up_to(row.dslots + slot * H_ + u, n);
        f(d * load_up_to(gain + gate * H_ + u, n), load_up_to(row.saved + at, n), at, n);
      };
      int64_t u = units.begin;
      for (; u + kLanes<T> <= units.end; u += kLanes<T>) vector(u, kLanes<T>);
      if (u < units.end) vector(u, units.end - u);
    }
  }

  int64_t H_ = 0;
  CarriedRows<A> blocks_;  // [D, N, blocks * kNumbers]
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
