// A cell of tests/any_gates/cells/list.h on some kernels, against a plain loop. All numbers are
// small integers, so that every sum is exact and the results must be equal.
#pragma once

#include <cstdint>
#include <cstdio>
#include <vector>

#include "cells/cells.h"
#include "scan.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

struct Case {
  int64_t T, N, I, H;
};

// A layer of one direction. Kernels has forward(f) and backward(b).
template <typename T>
class Check {
  using Numbers = std::vector<T>;

 public:
  Check(CellId cell, const Case& c)
      : cell_(cell), G_(cell_shape(cell).gates), S_(cell_shape(cell).slots), c_(c) {
    x_ = numbers(c.T * c.N * c.I);
    h0_ = numbers(c.N * c.H);
    w_ih_ = numbers(G_ * c.H * c.I, c.I);
    w_hh_ = numbers(G_ * c.H * c.H, c.H);
    b_ih_ = numbers(G_ * c.H), b_hh_ = numbers(G_ * c.H);
    dy_ = numbers(c.T * c.N * c.H);
  }

  template <typename Kernels>
  bool run(const Kernels& kernels) {
    const Results wanted = loop();
    Results found = zeros();
    Numbers hn(h0_.size()), slots(size_t(c_.T * c_.N * S_ * c_.H));
    Forward<T> f;
    f.sizes = {cell_, c_.I, c_.H, c_.H, 1, false};
    f.steps.T = c_.T, f.steps.N = c_.N, f.steps.total = c_.T * c_.N;
    f.x = rows<const T>(x_.data(), c_.I);
    f.h0 = {h0_.data(), 0, c_.H};
    f.weights[0] = {w_ih_.data(), w_hh_.data(), b_ih_.data(), b_hh_.data(), nullptr, c_.I, c_.H, 0};
    f.y = rows<T>(found.y.data(), c_.H);
    f.hn = {hn.data(), 0, c_.H};
    f.slots = slots.data();
    kernels.forward(f);

    Numbers dslots(slots.size());
    Backward<T> b;
    b.sizes = f.sizes, b.steps = f.steps, b.x = f.x, b.h0 = f.h0;
    b.weights[0] = f.weights[0];
    b.y = rows<const T>(found.y.data(), c_.H);
    b.slots = slots.data(), b.dslots = dslots.data();
    b.dy = rows<const T>(dy_.data(), c_.H);
    b.dx = rows<T>(found.dx.data(), c_.I);
    b.dh0 = {found.dh0.data(), 0, c_.H};
    b.gradients[0] = {found.dw_ih.data(), found.dw_hh.data(), found.db_ih.data(),
                      found.db_hh.data(), nullptr};
    kernels.backward(b);
    if (!(found == wanted)) return false;

    // relu(x) = relu'(x) x: in the direction of x, h_0 and the biases themselves, y changes by y.
    if constexpr (requires(SecondOrder<T>& s) { kernels.second_order(s); }) {
      Numbers y(found.y.size()), tangent_dslots(slots.size());
      SecondOrder<T> s;
      s.sizes = f.sizes, s.steps = f.steps, s.x = f.x, s.h0 = f.h0;
      s.weights[0] = f.weights[0];
      s.y = b.y, s.slots = b.slots, s.dslots = b.dslots, s.dy = b.dy;
      s.tangent.x = f.x, s.tangent.h0 = f.h0;
      s.tangent.weights[0].b_ih = b_ih_.data(), s.tangent.weights[0].b_hh = b_hh_.data();
      s.tangent_y = rows<T>(y.data(), c_.H);
      s.tangent_hn = f.hn;
      s.tangent.dslots = tangent_dslots.data();
      kernels.second_order(s);
      return y == found.y;
    }
    return true;
  }

 private:
  struct Results {
    Numbers y, dx, dh0, dw_ih, dw_hh, db_ih, db_hh;

    bool operator==(const Results&) const = default;
  };
  Results zeros() const {
    return {Numbers(dy_.size()),   Numbers(x_.size()),    Numbers(h0_.size()),
            Numbers(w_ih_.size()), Numbers(w_hh_.size()), Numbers(b_ih_.size()),
            Numbers(b_hh_.size())};
  }

  // -1, 0 or 1, the same ones every time. All but one of `one_of` are 0, so that no sum grows
  // large.
  Numbers numbers(int64_t count, int64_t one_of = 1) {
    Numbers made(static_cast<size_t>(count));
    for (T& x : made) x = below(one_of) ? T(0) : T(below(3) - 1);
    return made;
  }
  int64_t below(int64_t limit) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return int64_t((state_ >> 33) % uint64_t(limit));
  }

  template <typename U>
  Rows<U> rows(U* data, int64_t width) const {
    return {data, c_.N * width, width};
  }

  // f(slot, gate) for the slots of each product: the first G of the recurrent one, which begins
  // with the gates that have a slot of their own for it, and the last G of the input product.
  template <typename F>
  void each_input(F f) const {
    for (int gate = 0; gate < G_; ++gate) f(S_ - G_ + gate, gate);
  }
  template <typename F>
  void each_recurrent(F f) const {
    for (int slot = 0; slot < G_; ++slot) f(slot, (slot + G_ - (S_ - G_)) % G_);
  }

  Results loop() const {
    Results r = zeros();
    const int64_t I = c_.I, H = c_.H;
    const auto x = [&](int64_t t, int64_t n) { return x_.data() + (t * c_.N + n) * I; };
    const auto before = [&](int64_t t, int64_t n) {
      return t ? r.y.data() + ((t - 1) * c_.N + n) * H : h0_.data() + n * H;
    };
    const auto sum = [](T bias, const T* w, const T* of, int64_t count) {
      for (int64_t i = 0; i < count; ++i) bias += w[i] * of[i];
      return bias;
    };
    for (int64_t t = 0; t < c_.T; ++t) {
      for (int64_t n = 0; n < c_.N; ++n) {
        for (int64_t u = 0; u < H; ++u) {
          T made = 0;
          each_input([&](int slot, int gate) {
            const int64_t row = gate * H + u;
            made += T(weight_of(slot)) * sum(b_ih_[row], &w_ih_[row * I], x(t, n), I);
          });
          each_recurrent([&](int slot, int gate) {
            const int64_t row = gate * H + u;
            made += T(weight_of(slot)) * sum(b_hh_[row], &w_hh_[row * H], before(t, n), H);
          });
          r.y[(t * c_.N + n) * H + u] = made > 0 ? made : 0;
        }
      }
    }
    const auto add = [](T d, const T* from, int64_t count, T* to) {
      for (int64_t i = 0; i < count; ++i) to[i] += d * from[i];
    };
    Numbers dh(h0_.size());
    for (int64_t t = c_.T - 1; t >= 0; --t) {
      Numbers next(dh.size());
      for (int64_t n = 0; n < c_.N; ++n) {
        for (int64_t u = 0; u < H; ++u) {
          const int64_t at = (t * c_.N + n) * H + u;
          const T dmade = r.y[at] > 0 ? dh[n * H + u] + dy_[at] : 0;
          each_input([&](int slot, int gate) {
            const int64_t row = gate * H + u;
            const T d = T(weight_of(slot)) * dmade;
            r.db_ih[row] += d;
            add(d, x(t, n), I, &r.dw_ih[row * I]);
            add(d, &w_ih_[row * I], I, &r.dx[(t * c_.N + n) * I]);
          });
          each_recurrent([&](int slot, int gate) {
            const int64_t row = gate * H + u;
            const T d = T(weight_of(slot)) * dmade;
            r.db_hh[row] += d;
            add(d, before(t, n), H, &r.dw_hh[row * H]);
            add(d, &w_hh_[row * H], H, &next[n * H]);
          });
        }
      }
      dh = next;
    }
    r.dh0 = dh;
    return r;
  }

  const CellId cell_;
  const int G_, S_;
  const Case c_;
  uint64_t state_ = 1;
  Numbers x_, h0_, w_ih_, w_hh_, b_ih_, b_hh_, dy_;
};

// Every cell of the list in each case; returns the exit status.
template <typename T, typename Kernels, size_t kCases>
int check_all(const char* name, const Case (&cases)[kCases], const Kernels& kernels) {
  int wrong = 0;
  for (size_t id = 0; id < kCellInfos.size(); ++id) {
    for (const Case& c : cases) {
      if (Check<T>(CellId(int(id)), c).run(kernels)) continue;
      ++wrong;
      std::printf("%s: %d gates, %d slots: wrong at T=%d N=%d I=%d H=%d\n", name,
                  kCellInfos[id].shape.gates, kCellInfos[id].shape.slots, int(c.T), int(c.N),
                  int(c.I), int(c.H));
    }
  }
  std::printf("%s: %d cells of 1 to 8 gates, %d results wrong\n", name, int(kCellInfos.size()),
              wrong);
  return wrong;
}

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
