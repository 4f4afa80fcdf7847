// Forward pass, resident tier:  slots(t) = inputs(t) + W_hh h(t-1) + biases,
// (h, c)(t) = cell(slots, c(t-1), h(t-1)).
//
// inputs = W_ih x is computed before, for a window of steps. A launch runs one window. What passes
// to the next one stays in global memory: h in the exchange buffer, the rest in `kept`. Row m of a
// block's product is gate i of unit u, with m = i kMostUnits + u; k is the hidden unit of h(t-1).
// In each step a block reads rows x H elements of h, does 2 G units x rows x H operations, and
// writes units x rows elements of h.
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
  static constexpr bool kByValue = Block::kByValue;

 public:
  static constexpr int kColumns = Block::kColumns, kMostUnits = Block::kRows / kShape.gates;
  static constexpr bool kBlocksWait = true;
  static constexpr int kMostThreads = kResidentThreads;

  struct Arguments {
    Forward<T> f;
    Residency residency;
    Inputs<A> inputs;
    int64_t first = 0, end = 0;  // numbers of the steps, in the order of the scan
    A* kept = nullptr;           // [blocks][kept_count(plan, 0)] if there are several windows
  };

  RNNKERN_DEVICE static void run(const Arguments& arguments) { ResidentForward(arguments).scan(); }

 private:
  using OwnPairs = Pairs<kMostUnits, kColumns>;
  static constexpr int kPairs = OwnPairs::kCount;
  // How many places of sums a cell needs for its gates: one leads to the others if the number of
  // units is a power of two.
  static constexpr int kPlaces = (kMostUnits & (kMostUnits - 1)) == 0 ? 1 : kShape.gates;

  RNNKERN_DEVICE explicit ResidentForward(const Arguments& a)
      : a_(a),
        r_(a.residency),
        z_(a.f.sizes),
        s_(a.f.steps),
        block_(r_, z_.D, s_.N, z_.H, 1),
        d_(block_.direction()),
        pairs_(r_.units),
        stores_(a.f, d_),
        visits_(s_, d_ == 0, int(a.first)),
        y_(columns(a.f.y, d_ * z_.H)),
        inputs_(a.inputs.of(s_, d_)),
        kept_(r_, block_.rest()),
        biases_(kept_.end()) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
#pragma unroll
      for (int g = 0; g < kPlaces; ++g) {
        const int place = Block::place_of_sum(g * kMostUnits + pairs_.unit(), pairs_.column(p));
        // The places of the other pairs are computed while the sums of the first pair are loaded.
        sums_[p][g] = p == 0 ? computed_once(place) : place;
      }
    }
  }

  RNNKERN_DEVICE void scan() {
    const Weights<T>& w = a_.f.weights[d_];
    block_.template pack<T>(
        int(z_.H),
        [&](int group, int m) -> const T* {
          const int gate = m / kMostUnits, index = m % kMostUnits;
          const int64_t unit = block_.units(group).begin + index;
          if (gate >= kShape.gates || index >= r_.units || unit >= z_.H) return nullptr;
          return w.w_hh + (recurrent_gate<Cell>(gate) * z_.H + unit) * w.w_hh_row;
        },
        [](unsigned k) { return k; });
    read_biases();
    block_.for_each_turn([&](const Turn& turn) {
      a_.first == 0 ? begin(turn) : go_on(turn);
      block_.publish(turn, a_.first + 1);
    });
    if constexpr (kByValue) block_.wait_for_team(a_.first + 1);
    load_inputs(visits_.now(block_.rows(0)), {});
    for (int64_t i = a_.first; i < a_.end; ++i, visits_.advance()) {
      block_.for_each_turn([&](const Turn& turn) { step(i, turn); });
    }
    if (a_.end < s_.T) block_.for_each_turn([&](const Turn& turn) { leave(turn); });
  }

  // Reads the states that the launch before has left.
  RNNKERN_DEVICE void go_on(const Turn& turn) const {
    const auto left = kept_.elsewhere(a_.kept);
    pairs_.for_each(block_.rows(turn.pass), block_.units(turn.group), [&](int p, int64_t, int64_t) {
      carried_h(turn, p) = left.first(turn, pairs_, p);
      if constexpr (kShape.cell_state) carried_c(turn, p) = left.second(turn, pairs_, p);
    });
  }
  RNNKERN_DEVICE void leave(const Turn& turn) const {
    const auto left = kept_.elsewhere(a_.kept);
    pairs_.for_each(block_.rows(turn.pass), block_.units(turn.group), [&](int p, int64_t, int64_t) {
      left.first(turn, pairs_, p) = carried_h(turn, p);
      if constexpr (kShape.cell_state) left.second(turn, pairs_, p) = carried_c(turn, p);
    });
  }

  RNNKERN_DEVICE static void give(E* to, A h) {
    E operand;
    put_operand(&operand, h);
    Block::give(to, operand);
  }

  RNNKERN_DEVICE int place_of_sum(int p, int gate) const {
    if constexpr (kPlaces > 1) return sums_[p][gate];
    return Block::place_further_on(sums_[p][0], gate * kMostUnits);
  }

  // The states of the thread's cells, in the type that is computed with.
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

  // Puts the initial states where each row reads them in its first step. Rows that never take part
  // end with them.
  RNNKERN_DEVICE void begin(const Turn& turn) const {
    pairs_.for_each(
        block_.rows(turn.pass), block_.units(turn.group), [&](int i, int64_t rank, int64_t unit) {
          const bool is_cut = d_ == 0 && cut(s_, 0, 0, rank);
          const A h = is_cut ? A(0) : element_of(s_, a_.f.h0, d_, rank, unit);
          carried_h(turn, i) = h;
          if constexpr (kShape.cell_state) {
            carried_c(turn, i) = is_cut ? A(0) : element_of(s_, a_.f.c0, d_, rank, unit);
          }
          put_first(turn, rank, unit, h);
          if (rank < active_rows(s_, 0)) return;
          pass_element(s_, a_.f.h0, a_.f.hn, d_, rank, unit);
          if (kShape.cell_state) pass_element(s_, a_.f.c0, a_.f.cn, d_, rank, unit);
        });
  }

  // Puts an initial state where the first step of its row reads it. By value, a pass that begins
  // later gets it in the step before.
  RNNKERN_DEVICE void put_first(const Turn& turn, int64_t rank, int64_t unit, A h) const {
    const bool begins = !kByValue || takes_part(visits_.now(block_.rows(turn.pass)), turn);
    for (int epoch = 0; epoch < cuda::kExchangeBuffers; ++epoch) {
      E* const to = block_.exchanged(epoch, rank, unit);
      if (begins && (!kByValue || epoch == 1)) {
        put_operand(to, h);
        if constexpr (kByValue) *to = present(*to);
      } else {
        *to = absent<E>();
      }
    }
  }
  // Whether any row of the pass takes part.
  RNNKERN_DEVICE bool takes_part(const Visit& v, const Turn& turn) const {
    return v.active_end > block_.rows(turn.pass).begin;
  }

  // Loads what the next step adds to its products, while this step ends; and whether an episode
  // begins after that step.
  RNNKERN_DEVICE void load_inputs(const Visit& v, const Turn& turn) {
    pairs_.for_each(
        block_.rows(turn.pass), block_.units(turn.group), [&](int p, int64_t rank, int64_t unit) {
          if (rank >= v.active_end) return;
          const A* row = row_at(s_, inputs_, v.t, rank) + unit;
#pragma unroll
          for (int g = 0; g < kShape.gates; ++g) ahead_[p][g] = row[g * z_.H];
          cut_after_.set(p, rank < v.leaving && cut(s_, d_, d_ == 0 ? v.t + 1 : v.t - 1, rank));
        });
  }

  RNNKERN_DEVICE void step(int64_t i, const Turn& turn) {
    const Range rows = block_.rows(turn.pass), units = block_.units(turn.group);
    const Visit v = visits_.now(rows);
    Step<A> steps[kPairs];
    E* to[kPairs];
    Bits<kPairs> active, gives;  // by value: the state is given although the row is not active
    pairs_.for_each(rows, units, [&](int p, int64_t rank, int64_t unit) {
      active.set(p, rank < v.active_end);
      if constexpr (kByValue) {
        to[p] = block_.exchanged(i + 2, rank, unit);
        gives.set(p, rank >= v.active_end &&
                         (takes_part(v, turn) || takes_part(visits_.next(rows), turn)));
      }
      if (rank >= v.active_end) return;
      Step<A>& s = steps[p];
      add_inputs<Cell>(
          s, [&](int slot) { return bias(turn.group, slot, pairs_.unit()); },
          [&](int gate) { return ahead_[p][gate]; });
      s.h_prev = carried_h(turn, p);
      if constexpr (kShape.cell_state) s.c_prev = carried_c(turn, p);
      to[p] = block_.exchanged(i + 2, rank, unit);
    });
    if (takes_part(v, turn)) block_.multiply(turn, i + 1);
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      if (kByValue && gives[p]) give(to[p], carried_h(turn, p));
      if (!active[p]) continue;
      Step<A>& s = steps[p];
      add_products<Cell>(s, [&](int slot) { return block_.sum(place_of_sum(p, slot)); });
      Cell::forward(s);
      if (kCarriesCells<T, Cell> && a_.f.rounds_cells) s.c = rounded<T>(s.c);
      const A h = cut_after_[p] ? A(0) : rounded<T>(s.h);
      give(to[p], h);
      carried_h(turn, p) = h;
      if constexpr (kShape.cell_state) carried_c(turn, p) = cut_after_[p] ? A(0) : s.c;
    }
    if (kByValue && takes_part(v, turn)) {
      pairs_.for_each(rows, units, [&](int, int64_t rank, int64_t unit) {
        Block::make_absent(block_.exchanged(i, rank, unit));
      });
    }
    block_.finish(turn, i + 2);
    pairs_.for_each(rows, units, [&](int p, int64_t rank, int64_t unit) {
      if (rank < v.active_end) {
        put(row_at(s_, y_, v.t, rank) + unit, steps[p].h);
        stores_.put_step(v, rank, unit, steps[p]);
      } else if (!s_.start) {
        row_at(s_, y_, v.t, rank)[unit] = T{};  // a padded row past its end
      }
    });
    if (i + 1 == a_.end && turn.is_last(r_)) return;  // the inputs that follow are not computed yet
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
  int sums_[kPairs][kPlaces];  // places of the sums of the thread's cells
  A ahead_[kPairs][kShape.gates];
  Bits<kPairs> cut_after_;
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
