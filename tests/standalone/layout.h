// Where the rows of a case lie in memory, and tensors in that memory.
#pragma once

#include <algorithm>
#include <deque>
#include <memory>
#include <numeric>
#include <vector>

#include "cases.h"
#include "numbers.h"
#include "reference.h"
#include "scan.h"

namespace rnnkern {

// From the lengths of the rows what Steps says of them.
class Layout {
 public:
  Layout(const Case& c, const reference::Problem& problem)
      : form_(c.options.form), T_(c.T), N_(c.N) {
    const std::vector<int64_t>& lengths = problem.lengths;
    order_.resize(N_);
    std::iota(order_.begin(), order_.end(), int64_t(0));
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    slot_.resize(N_);
    for (int64_t k = 0; k < N_; ++k) slot_[order_[k]] = k;
    for (int64_t t = 0; t < T_; ++t) {
      start_.push_back(t ? start_.back() + active_.back() : 0);
      active_.push_back(std::count_if(lengths.begin(), lengths.end(),
                                      [t](int64_t length) { return t < length; }));
    }
    reset_ = std::make_unique<bool[]>(T_ * N_);
    for (int64_t t = 0; t < T_; ++t) {
      for (int64_t n = 0; n < N_ && c.options.resets; ++n) {
        reset_[padded(t, n)] = problem.reset[t * N_ + n];
      }
    }
    resets_ = c.options.resets;
  }

  Steps steps() const {
    Steps s;
    s.T = T_;
    s.N = N_;
    s.total = is_packed() ? start_.back() + active_.back() : T_ * N_;
    if (is_packed() || form_ == kRagged) s.active = active_.data(), s.order = order_.data();
    if (is_packed()) s.start = start_.data();
    if (resets_) {
      s.reset = reset_.get();
      s.reset_step = step_of_rows();
      s.reset_row = form_ == kBatchFirst ? T_ : 1;
    }
    return s;
  }

  bool takes_part(int64_t t, int64_t n) const { return slot_[n] < active_[t]; }
  // Whether there is memory for it.
  bool has_row(int64_t t, int64_t n) const { return !is_packed() || takes_part(t, n); }
  // Of a tensor of rows, in rows.
  int64_t row(int64_t t, int64_t n) const { return is_packed() ? packed(t, n) : padded(t, n); }
  // Of what forward saves.
  int64_t saved_row(int64_t t, int64_t n) const { return is_packed() ? packed(t, n) : t * N_ + n; }
  template <typename T>
  Rows<T> rows(T* data, int64_t row) const {
    const bool batch_first = form_ == kBatchFirst;
    return {data, is_packed() ? 0 : step_of_rows() * row, (batch_first ? T_ : 1) * row};
  }

 private:
  bool is_packed() const { return form_ == kPacked; }
  int64_t step_of_rows() const { return form_ == kBatchFirst ? 1 : N_; }
  int64_t padded(int64_t t, int64_t n) const {
    return form_ == kBatchFirst ? n * T_ + t : t * N_ + n;
  }
  int64_t packed(int64_t t, int64_t n) const { return start_[t] + slot_[n]; }

  Form form_;
  int64_t T_, N_;
  bool resets_;
  std::vector<int64_t> active_, start_, order_, slot_;
  std::unique_ptr<bool[]> reset_;
};

// Blocks of NaN that live as long as this, with a few elements behind each that nothing may write.
template <typename T>
class Memory {
 public:
  T* take(int64_t count) {
    return blocks_.emplace_back(count + kGuard, from_double<T>(NAN)).data();
  }
  bool is_guarded() const {
    return std::all_of(blocks_.begin(), blocks_.end(), [](const std::vector<T>& block) {
      return std::all_of(block.end() - kGuard, block.end(),
                         [](T x) { return std::isnan(to_double(x)); });
    });
  }

 private:
  static constexpr int kGuard = 16;
  std::deque<std::vector<T>> blocks_;
};

}  // namespace rnnkern
