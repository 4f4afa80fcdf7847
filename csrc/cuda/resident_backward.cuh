// Backward pass, resident tier, in reverse scan order:
//
//   dh(t) = dy(t) + dh
//   dslots(t), dc, dh' = cell_backward(slots(t), c(t), c(t-1), h(t-1), dh(t), dc)
//   dh = dh' + dslots(t) x W_hh
//
// The rows m of a block's product are its units; k is a slot of dslots(t). The slots of a unit are
// neighbours, so that a block writes one piece, and few blocks compute what a warp reads. In each
// step a block reads rows x G H gradients of slots, does 2 units x rows x G H operations, and
// writes rows x G units gradients. The product after the last step is computed only if the gradient
// of h_0 is wanted.
#pragma once

#include "cuda/resident.cuh"
#include "cuda/stores.cuh"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

template <typename T, typename E, typename Cell, cuda::TileShape kTile>
class ResidentBackward {
  using A = Compute<T>;
  using Block = ResidentBlock<E, kTile>;
  static constexpr CellShape kShape = Cell::kShape;
  static constexpr bool kByValue = Block::kByValue;

 public:
  static constexpr int kColumns = Block::kColumns, kMostUnits = Block::kRows;
  static constexpr bool kBlocksWait = true;
  static constexpr int kMostThreads = kResidentThreads;

  struct Arguments {
    Backward<T> b;
    Residency residency;
    const T* zeros;  // [H]
  };

  RNNKERN_DEVICE static void run(const Arguments& arguments) { ResidentBackward(arguments).scan(); }

 private:
  // What a cell gives to the products of the next step. It is one store, if its size allows.
  static constexpr size_t kGateBytes = kShape.gates * sizeof(E);
  static constexpr size_t kAlignment = kGateBytes % 16 == 0                   ? 16
                                       : (kGateBytes & (kGateBytes - 1)) == 0 ? kGateBytes
                                                                              : sizeof(E);
  struct alignas(kAlignment) Gates {
    E of[kShape.gates];
  };

  using OwnPairs = Pairs<kMostUnits, kColumns>;
  static constexpr int kPairs = OwnPairs::kCount;

  RNNKERN_DEVICE explicit ResidentBackward(const Arguments& a)
      : b_(a.b),
        r_(a.residency),
        z_(a.b.sizes),
        s_(a.b.steps),
        block_(r_, z_.D, s_.N, z_.H, kShape.gates),
        d_(block_.direction()),
        pairs_(r_.units),
        visits_(s_, d_ == 1),
        loads_(b_, a.zeros, d_),
        dslots_(saved_rows(s_, b_.dslots, d_, kShape.slots * z_.H)),
        kept_(r_, block_.rest()) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const int place = Block::place_of_sum(pairs_.unit(), pairs_.column(p));
      sums_[p] = p == 0 ? computed_once(place) : place;
    }
  }

  RNNKERN_DEVICE void scan() {
    const Weights<T>& w = b_.weights[d_];
    constexpr unsigned kGates = kShape.gates;
    block_.template pack<T>(
        int(kGates * z_.H),
        [&](int group, int m) -> const T* {
          const int64_t unit = block_.units(group).begin + m;
          return m < r_.units && unit < z_.H ? w.w_hh + unit : nullptr;
        },
        [unit_apart = w.w_hh_row, gate_apart = z_.H * w.w_hh_row](unsigned k) {
          return recurrent_gate<Cell>(int(k % kGates)) * gate_apart + k / kGates * unit_apart;
        });
    block_.for_each_turn([&](const Turn& turn) {
      pass_empty_rows(turn);
      if constexpr (kByValue) {
        make_all_absent(turn);
        block_.publish(turn, 1);
      }
    });
    if constexpr (kByValue) block_.wait_for_team(1);
    load(visits_.now(block_.rows(0)), {});
    for (int64_t i = 0; i < s_.T + (b_.dh0.data ? 1 : 0); ++i, visits_.advance()) {
      block_.for_each_turn([&](const Turn& turn) { step(i, turn); });
    }
  }

  // What passes from step to step besides the product: gradients of c, and of h if the cell itself
  // reads it.
  RNNKERN_DEVICE A& carried_dc(const Turn& turn, int i) const {
    return kept_.first(turn, pairs_, i);
  }
  RNNKERN_DEVICE A& carried_dh(const Turn& turn, int i) const {
    return kept_.second(turn, pairs_, i);
  }

  RNNKERN_DEVICE void pass_empty_rows(const Turn& turn) const {
    pairs_.for_each(block_.rows(turn.pass), block_.units(turn.group),
                    [&](int, int64_t rank, int64_t unit) {
                      if (rank < active_rows(s_, 0)) return;
                      pass_element(s_, b_.dhn, b_.dh0, d_, rank, unit);
                      if (kShape.cell_state) pass_element(s_, b_.dcn, b_.dc0, d_, rank, unit);
                    });
  }

  RNNKERN_DEVICE Gates* exchanged(int64_t epoch, int64_t rank, int64_t unit) const {
    return reinterpret_cast<Gates*>(block_.exchanged(epoch, rank, unit * kShape.gates));
  }
  RNNKERN_DEVICE void make_all_absent(const Turn& turn) const {
    pairs_.for_each(block_.rows(turn.pass), block_.units(turn.group),
                    [&](int, int64_t rank, int64_t unit) {
                      for (int epoch = 0; epoch < cuda::kExchangeBuffers; ++epoch) {
                        Block::make_absent(exchanged(epoch, rank, unit));
                      }
                    });
  }

  // Loads what the next step reads of the saved buffer, while this step ends; and whether an
  // episode begins there, because no gradient then passes to the step before. No row takes part
  // after the last step.
  RNNKERN_DEVICE void load(const Visit& v, const Turn& turn) {
    pairs_.for_each(block_.rows(turn.pass), block_.units(turn.group),
                    [&](int p, int64_t rank, int64_t unit) {
                      if (rank >= v.active_end) return;
                      Step<A>& s = ahead_[p];
                      loads_.get_step(v.t, rank, unit, &s);
                      s.dh = loads_.dy(v.t, rank, unit);
                      cut_.set(p, cut(s_, d_, v.t, rank));
                    });
  }

  RNNKERN_DEVICE void step(int64_t i, const Turn& turn) {
    const Range rows = block_.rows(turn.pass), units = block_.units(turn.group);
    const Visit before = visits_.before(rows), v = visits_.now(rows);
    // For each cell of the thread: whether it has a product, of the step before; whether it is
    // active; and whether its gradient of h_0 is written now.
    Bits<kPairs> has_product, active, ends;
    Bits<kPairs> gives;  // by value: zeros are given, because the row is not active
    Gates* to[kPairs];
    A direct[kPairs], dh[kPairs];
    pairs_.for_each(rows, units, [&](int p, int64_t rank, int64_t unit) {
      has_product.set(p, rank < before.active_end);
      ends.set(p, rank < before.active_end && rank >= before.leaving && b_.dh0.data);
      active.set(p, rank < v.active_end);
      direct[p] = kShape.reads_h && rank < before.active_end ? carried_dh(turn, p) : A(0);
      if constexpr (kByValue) {
        to[p] = exchanged(i + 1, rank, unit);
        gives.set(p, rank >= v.active_end && v.active_end > rows.begin);
      }
      if (rank >= v.active_end) return;
      Step<A>& s = ahead_[p];
      const bool is_last = rank >= v.entering;  // its last step, the first that this pass visits
      if (is_last) s.dh += element_of(s_, b_.dhn, d_, rank, unit);
      if constexpr (kShape.cell_state) {
        s.dc = is_last ? element_of(s_, b_.dcn, d_, rank, unit) : carried_dc(turn, p);
      }
      to[p] = exchanged(i + 1, rank, unit);
    });
    if (before.active_end > rows.begin) block_.multiply(turn, i);
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      if (has_product[p]) dh[p] = block_.sum(sums_[p]) + direct[p];
      if (kByValue && gives[p]) Block::give(to[p], Gates{});
      if (!active[p]) continue;
      Step<A>& s = ahead_[p];
      if (has_product[p]) s.dh += dh[p];
      Cell::backward(s);
      Gates gates;
#pragma unroll
      for (int g = 0; g < kShape.gates; ++g) {
        put_operand(&gates.of[g], cut_[p] ? A(0) : rounded<T>(s.slot[g]));
      }
      Block::give(to[p], gates);
      if (kShape.reads_h) carried_dh(turn, p) = cut_[p] ? A(0) : s.dh_direct;
      if constexpr (kShape.cell_state) {
        if (cut_[p]) s.dc = 0;
        carried_dc(turn, p) = s.dc;
      }
    }
    if (kByValue && before.active_end > rows.begin) {
      pairs_.for_each(rows, units, [&](int, int64_t rank, int64_t unit) {
        Block::make_absent(exchanged(i - 1, rank, unit));
      });
    }
    block_.finish(turn, i + 1);
    pairs_.for_each(rows, units, [&](int p, int64_t rank, int64_t unit) {
      if (ends[p]) put(state_at(s_, b_.dh0, d_, rank) + unit, dh[p]);
      if (i == s_.T || (rank >= v.active_end && s_.start)) return;
      T* to = row_at(s_, dslots_, v.t, rank) + unit;
#pragma unroll
      for (int g = 0; g < kShape.slots; ++g) {
        put(to + g * z_.H, rank < v.active_end ? ahead_[p].slot[g] : A(0));
      }
      if constexpr (kShape.cell_state) {
        if (rank < v.active_end && rank >= v.leaving && b_.dc0.data) {
          put(state_at(s_, b_.dc0, d_, rank) + unit, ahead_[p].dc);
        }
      }
    });
    const Turn next = turn.next(r_);
    const Range next_rows = block_.rows(next.pass);
    load(turn.is_last(r_) ? visits_.next(next_rows) : visits_.now(next_rows), next);
  }

  const Backward<T>& b_;
  const Residency& r_;
  const Sizes& z_;
  const Steps& s_;
  Block block_;
  const int d_;
  const OwnPairs pairs_;
  Visits visits_;
  const BackwardLoads<T, Cell> loads_;
  const Rows<T> dslots_;
  const Kept<A, OwnPairs, kColumns> kept_;
  int sums_[kPairs];  // places of the sums of the thread's cells
  Step<A> ahead_[kPairs];
  Bits<kPairs> cut_;
};

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
