// Forward pass, resident tier:  slots(t) = inputs(t) + W_hh h(t-1) + biases,
// (h, c)(t) = cell(slots, c(t-1), h(t-1)).
//
// inputs = W_ih x is made before for all steps. A block's rows m of the product are gate i of unit
// u, m = i units + u; k is the hidden unit of h(t-1). Per step a block reads rows x H elements of
// h, makes 2 G units x rows x H operations, and writes units x rows elements of h.
#pragma once

#include "cuda/resident.cuh"
#include "cuda/stores.cuh"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

template <typename T, typename E, typename Cell, cuda::TileShape kTile>
class ResidentForward {
  using A = Compute<T>;
  using Block = ResidentBlock<E, kTile>;
  static constexpr CellShape kShape = Cell::kShape;

 public:
  static constexpr int kColumns = Block::kColumns, kMostUnits = Block::kRows / kShape.gates;
  static constexpr bool kBlocksWait = true;
  static constexpr int kMostThreads = kResidentThreads;

  struct Arguments {
    Forward<T> f;
    Residency residency;
    const A* inputs;  // [D, total, width], from column first_input on
    int64_t width, first_input;
  };

  RNNKERN_DEVICE static void run(const Arguments& arguments) { ResidentForward(arguments).scan(); }

 private:
  using OwnPairs = Pairs<kMostUnits, kColumns>;
  static constexpr int kPairs = OwnPairs::kCount;

  RNNKERN_DEVICE explicit ResidentForward(const Arguments& a)
      : a_(a),
        r_(a.residency),
        z_(a.f.sizes),
        s_(a.f.steps),
        block_(r_, z_.D, s_.N, z_.H, 1),
        d_(block_.direction()),
        pairs_(r_.units),
        stores_(a.f, d_),
        visits_(s_, d_ == 0),
        y_(columns(a.f.y, d_ * z_.H)),
        inputs_(saved_rows(s_, a.inputs + a.first_input, d_, a.width)),
        kept_(r_, block_.rest()),
        biases_(kept_.end()) {}

  RNNKERN_DEVICE void scan() {
    const Weights<T>& w = a_.f.weights[d_];
    block_.template pack<false>(
        int(z_.H), kShape.gates * r_.units, [&](int group, int m, int k) -> A {
          const int64_t unit = block_.units(group).begin + m % r_.units;
          if (unit >= block_.units(group).end) return 0;
          return value(w.w_hh[(recurrent_gate<Cell>(m / r_.units) * z_.H + unit) * w.w_hh_row + k]);
        });
    block_.hold();
    read_biases();
    block_.for_each_turn([&](const Turn& turn) {
      begin(turn);
      block_.finish(turn, 1);
    });
    load_inputs(visits_.now(block_.rows(0)), {});
    for (int64_t i = 0; i < s_.T; ++i, visits_.advance()) {
      block_.for_each_turn([&](const Turn& turn) { step(i, turn); });
    }
  }

  // States of the thread's cells, as what is computed with.
  RNNKERN_DEVICE A& carried_h(const Turn& turn, int i) const {
    return kept_.first(turn, pairs_, i);
  }
  RNNKERN_DEVICE A& carried_c(const Turn& turn, int i) const {
    return kept_.second(turn, pairs_, i);
  }

  RNNKERN_DEVICE A& bias(int group, int slot, int64_t unit) const {
    return biases_[(int64_t(group) * kShape.slots + slot) * r_.units + unit];
  }
  RNNKERN_DEVICE void read_biases() const {
    for (int group = 0; group < r_.groups; ++group) {
      const Range units = block_.units(group);
      for (int i = thread_index(); i < kShape.slots * r_.units; i += kResidentThreads) {
        const int slot = i / r_.units;
        const int64_t unit = units.begin + i % r_.units;
        bias(group, slot, i % r_.units) =
            unit < units.end ? bias_of<Cell>(a_.f.weights[d_], z_.H, slot, unit) : A(0);
      }
    }
  }

  // The initial states, where each row finds them in its first step; rows that never take part end
  // with them.
  RNNKERN_DEVICE void begin(const Turn& turn) const {
    pairs_.for_each(
        block_.rows(turn.pass), block_.units(turn.group), [&](int i, int64_t slot, int64_t unit) {
          const bool is_cut = d_ == 0 && cut(s_, 0, 0, slot);
          const A h = is_cut ? A(0) : element_of(s_, a_.f.h0, d_, slot, unit);
          carried_h(turn, i) = h;
          if constexpr (kShape.cell_state) {
            carried_c(turn, i) = is_cut ? A(0) : element_of(s_, a_.f.c0, d_, slot, unit);
          }
          for (int epoch = 0; epoch < 2; ++epoch) {
            put_operand(block_.exchanged(epoch, slot, unit), h);
          }
          if (slot < active_rows(s_, 0)) return;
          pass_element(s_, a_.f.h0, a_.f.hn, d_, slot, unit);
          if (kShape.cell_state) pass_element(s_, a_.f.c0, a_.f.cn, d_, slot, unit);
        });
  }

  // What the next step adds to its products, on its way while this one ends; and whether an episode
  // begins after that step.
  RNNKERN_DEVICE void load_inputs(const Visit& v, const Turn& turn) {
    pairs_.for_each(
        block_.rows(turn.pass), block_.units(turn.group), [&](int p, int64_t slot, int64_t unit) {
          if (slot >= v.active_end) return;
          const A* row = row_at(s_, inputs_, v.t, slot) + unit;
#pragma unroll
          for (int g = 0; g < kShape.gates; ++g) ahead_[p][g] = row[g * z_.H];
          cut_after_.set(p, slot < v.leaving && cut(s_, d_, d_ == 0 ? v.t + 1 : v.t - 1, slot));
        });
  }

  RNNKERN_DEVICE void step(int64_t i, const Turn& turn) {
    const Range rows = block_.rows(turn.pass), units = block_.units(turn.group);
    const Visit v = visits_.now(rows);
    if (v.active_end > rows.begin) block_.multiply(turn, i + 1);
    Step<A> steps[kPairs];
    pairs_.for_each(rows, units, [&](int p, int64_t slot, int64_t unit) {
      if (slot >= v.active_end) return;
      Step<A>& s = steps[p];
      assemble<Cell>(
          s, [&](int slot) { return bias(turn.group, slot, pairs_.unit()); },
          [&](int gate) { return ahead_[p][gate]; },
          [&](int slot) { return block_.sum(slot * r_.units + pairs_.unit(), pairs_.column(p)); });
      s.h_prev = carried_h(turn, p);
      if constexpr (kShape.cell_state) s.c_prev = carried_c(turn, p);
      Cell::forward(s);
      if (kCarriesCells<T, Cell> && a_.f.rounds_cells) s.c = rounded<T>(s.c);
      const A h = cut_after_[p] ? A(0) : rounded<T>(s.h);
      put_operand(block_.exchanged(i, slot, unit), h);
      carried_h(turn, p) = h;
      if constexpr (kShape.cell_state) carried_c(turn, p) = cut_after_[p] ? A(0) : s.c;
    });
    block_.finish(turn, i + 2);
    pairs_.for_each(rows, units, [&](int p, int64_t slot, int64_t unit) {
      if (slot < v.active_end) {
        put(row_at(s_, y_, v.t, slot) + unit, steps[p].h);
        stores_.put_step(v, slot, unit, steps[p]);
      } else if (!s_.start) {
        row_at(s_, y_, v.t, slot)[unit] = T{};  // a padded row past its end
      }
    });
    const Turn next = turn.next(r_);
    const Range next_rows = block_.rows(next.pass);
    load_inputs(turn.is_last(r_) ? visits_.next(next_rows) : visits_.now(next_rows), next);
  }

  const Arguments& a_;
  const Residency& r_;
  const Sizes& z_;
  const Steps& s_;
  Block block_;
  const int d_;
  const OwnPairs pairs_;
  const ForwardStores<T, Cell> stores_;
  Visits visits_;
  const Rows<T> y_;
  const Rows<const A> inputs_;
  const Kept<A, OwnPairs, kColumns> kept_;
  A* const biases_;
  A ahead_[kPairs][kShape.gates];
  Bits<kPairs> cut_after_;
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
