// The kernels on the operands of a case, through the structs that csrc/python fills.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <new>
#include <tuple>

#include "cpu/kernels.h"
#include "huge_pages.h"
#include "layout.h"

namespace rnnkern {

template <typename T>
class KernelRun {
  using Vector = std::vector<double>;
  using Layer = reference::Layer<double>;
  using Outputs = reference::Outputs<double>;

 public:
  KernelRun(const Case& c, const reference::Problem& p, const Layer& layer)
      : c_(c), p_(p), layout_(c, p) {
    f_.sizes = {p.cell, p.I, p.H, p.O, p.D, p.projected};
    f_.steps = layout_.steps();
    f_.x = put_rows(layer.x, p.I);
    f_.h0 = put_state(layer.h0, p.O);
    f_.c0 = put_state(layer.c0, p.H);
    put_weights(layer, f_.weights);
    f_.rounds_cells = c.options.rounds_cells;
    if (!c.options.is_closed_loop) return;
    f_.readout.w = put(layer.readout, p.I, p.O, &f_.readout.row);
    f_.readout.b = put(layer.readout_bias, 1, p.I);
    f_.readout.made = {const_cast<T*>(f_.x.data) + f_.x.step, f_.x.step, f_.x.row};
  }

  // `trains`: keeps what backward needs.
  Outputs forward(bool trains) {
    const int64_t rows = p_.D * f_.steps.total;
    const CellShape shape = cell_shape(p_.cell);
    f_.y = new_rows(p_.D * p_.O);
    f_.hn = new_state(p_.O);
    if (p_.has_cell_state()) f_.cn = new_state(p_.H);
    if (trains && shape.saves_slots) f_.slots = memory_.take(rows * p_.slots() * p_.H);
    if (trains && p_.has_cell_state()) f_.cells = memory_.take(rows * p_.H);
    if (trains && p_.projected) f_.unprojected = memory_.take(rows * p_.H);
    run(f_, [&](const auto& kernels, Plan plan, Workspace w) {
      if (!f_.packed) return kernels.forward(f_, plan, w);
      plan.input = plan.recurrent = Reading::kPacked;
      return kernels.frozen(f_, plan, w);
    });
    return {get_rows(f_.y, p_.D * p_.O), get(f_.hn, p_.O), get(f_.cn, p_.H)};
  }

  // The same with weights that are packed before.
  Outputs frozen() {
    for (Weights<T>& w : f_.weights) {
      if constexpr (std::is_same_v<T, F32ByI8>) {
        const int64_t rows = p_.gates() * p_.H;
        w.scale_ih = quantize(w.w_ih, w.w_ih_row, rows, p_.I);
        w.scale_hh = quantize(w.w_hh, w.w_hh_row, rows, p_.O);
        w.scale_hr = quantize(w.w_hr, w.w_hr_row, p_.O, p_.H);
      }
    }
    const auto& kernels = std::get<Kernels<T>>(kernels_in_use());
    packed_ = std::make_unique<Block>(kernels.pack(f_.sizes, f_.weights, nullptr));
    kernels.pack(f_.sizes, f_.weights, packed_->data);
    f_.packed = packed_->data;
    std::fill_n(f_.weights, kMaxDirections, Weights<T>());
    return forward(false);
  }

  // What a closed loop has fed itself.
  Vector inputs() const { return get_rows(f_.x, p_.I); }

  // After forward(true).
  Layer backward(const Outputs& incoming) {
    Backward<T> b = operands();
    b.dy_uniform = c_.options.dy == kUniform;
    b.dy = put_rows(incoming.y, p_.D * p_.O, b.dy_uniform);
    b.dhn = put_state(incoming.hn, p_.O);
    b.dcn = put_state(incoming.cn, p_.H);
    const int64_t rows = p_.D * f_.steps.total;
    dslots_ = c_.options.in_place && f_.slots ? f_.slots : memory_.take(rows * p_.slots() * p_.H);
    b.dslots = dslots_;
    if (p_.projected) b.dprojected = memory_.take(rows * p_.O);
    new_gradients(&b.dx, &b.dh0, &b.dc0, b.gradients);
    run(b, [&](const auto& kernels, Plan plan, Workspace w) {
      if (kNarrow<T>) {
        plan.input = plan.recurrent = Reading::kPacked;
      } else if (plan.input != Reading::kPacked) {
        plan.input = plan.recurrent = Reading::kInPlace;
      }
      return kernels.backward(b, plan, w);
    });
    return get_gradients(b.dx, b.dh0, b.dc0, b.gradients, b.dslots);
  }

  // After backward(incoming), not in place: the tangents of outputs and gradients.
  std::pair<Outputs, Layer> second_order(const Outputs& incoming, const Layer& tangents,
                                         const Outputs& incoming_tangents) {
    SecondOrder<T> s;
    static_cast<Backward<T>&>(s) = operands();
    s.dslots = dslots_;
    s.dy = put_rows(incoming.y, p_.D * p_.O);
    s.dhn = put_state(incoming.hn, p_.O);
    s.dcn = put_state(incoming.cn, p_.H);
    s.tangent.x = put_rows(tangents.x, p_.I);
    s.tangent.h0 = put_state(tangents.h0, p_.O);
    s.tangent.c0 = put_state(tangents.c0, p_.H);
    put_weights(tangents, s.tangent.weights);
    s.tangent_sums = put_saved(tangents.sums, p_.slots() * p_.H);
    s.tangent.dy = put_rows(incoming_tangents.y, p_.D * p_.O);
    s.tangent.dhn = put_state(incoming_tangents.hn, p_.O);
    s.tangent.dcn = put_state(incoming_tangents.cn, p_.H);
    s.tangent_y = new_rows(p_.D * p_.O);
    s.tangent_hn = new_state(p_.O);
    if (p_.has_cell_state()) s.tangent_cn = new_state(p_.H);
    s.tangent.dslots = memory_.take(p_.D * f_.steps.total * p_.slots() * p_.H);
    new_gradients(&s.tangent.dx, &s.tangent.dh0, &s.tangent.dc0, s.tangent.gradients);
    run(s, [&](const auto& kernels, const Plan& plan, Workspace w) {
      return kernels.second_order(s, plan, plan, w);
    });
    return {{get_rows(s.tangent_y, p_.D * p_.O), get(s.tangent_hn, p_.O), get(s.tangent_cn, p_.H)},
            get_gradients(s.tangent.dx, s.tangent.dh0, s.tangent.dc0, s.tangent.gradients,
                          s.tangent.dslots)};
  }

  bool is_guarded() const { return memory_.is_guarded(); }

 private:
  // Of a backward pass: the layer, and what forward has made and saved.
  Backward<T> operands() const {
    Backward<T> b;
    b.sizes = f_.sizes;
    b.steps = f_.steps;
    b.x = f_.x;
    b.h0 = f_.h0;
    b.c0 = f_.c0;
    std::copy_n(f_.weights, kMaxDirections, b.weights);
    b.y = constant(f_.y);
    b.slots = f_.slots;
    b.cells = f_.cells;
    b.unprojected = f_.unprojected;
    return b;
  }

  // On the plan of the case, or as a call from Python.
  template <typename Scan, typename Call>
  void run(const Scan& scan, Call call) {
    if (!c_.options.plan) return rnnkern::run(scan, 2, c_.options.rounds_cells);
    const auto& kernels = std::get<Kernels<T>>(kernels_in_use());
    constexpr size_t kLine = 64;
    const size_t bytes = call(kernels, *c_.options.plan, Workspace{nullptr, 0});
    const std::unique_ptr<char, decltype(&std::free)> data(
        static_cast<char*>(std::aligned_alloc(kLine, (bytes + kLine - 1) / kLine * kLine)),
        &std::free);
    if (!data) throw std::bad_alloc();
    std::memset(data.get(), 0xff, bytes);  // NaN
    call(kernels, *c_.options.plan, Workspace{data.get(), bytes});
  }

  int64_t gap() const { return c_.options.has_gaps ? 3 : 0; }
  static Rows<const T> constant(const Rows<T>& rows) { return {rows.data, rows.step, rows.row}; }

  // Null if the values are empty, here and below.
  const T* put(const Vector& values, int64_t rows, int64_t columns, int64_t* row = nullptr) {
    if (values.empty()) return nullptr;
    const int64_t width = columns + (row ? gap() : 0);
    if (row) *row = width;
    T* to = memory_.take(rows * width);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        to[i * width + j] = from_double<T>(values[i * columns + j]);
      }
    }
    return to;
  }

  // Makes the rows of a matrix integers from -127 to 127. Returns the factor of each row.
  const float* quantize(const T* matrix, int64_t row, int64_t rows, int64_t columns) {
    if (!matrix) return nullptr;
    std::vector<float>& scales = scales_.emplace_back();
    for (int64_t i = 0; i < rows; ++i) {
      T* const begin = const_cast<T*>(matrix) + i * row;
      double most = 0;
      for (int64_t j = 0; j < columns; ++j) most = std::max(most, std::abs(to_double(begin[j])));
      scales.push_back(float(most / 127));
      for (int64_t j = 0; most > 0 && j < columns; ++j) {
        begin[j] = from_double<T>(std::nearbyint(to_double(begin[j]) / most * 127));
      }
    }
    return scales.data();
  }

  // Rows that do not take part are NaN: nothing reads them.
  Rows<const T> put_rows(const Vector& values, int64_t features, bool is_uniform = false) {
    if (values.empty()) return {};
    const Rows<T> rows = new_rows(features);
    each_row([&](int64_t t, int64_t n) {
      for (int64_t i = 0; layout_.takes_part(t, n) && i < (is_uniform ? 1 : features); ++i) {
        rows.data[layout_.row(t, n) * rows_width(features) + i] =
            from_double<T>(values[(t * p_.N + n) * features + i]);
      }
    });
    return constant(rows);
  }
  State<const T> put_state(const Vector& values, int64_t features) {
    State<const T> state;
    state.data = put(values, p_.D * p_.N, features, &state.row);
    state.direction = p_.N * state.row;
    return state;
  }
  void put_weights(const Layer& layer, Weights<T>* out) {
    const int64_t rows = p_.gates() * p_.H;
    for (int d = 0; d < p_.D; ++d) {
      const auto& w = layer.weights[d];
      out[d].w_ih = put(w.w_ih, rows, p_.I, &out[d].w_ih_row);
      out[d].w_hh = put(w.w_hh, rows, p_.O, &out[d].w_hh_row);
      out[d].b_ih = put(w.b_ih, 1, rows);
      out[d].b_hh = put(w.b_hh, 1, rows);
      out[d].w_hr = put(w.w_hr, p_.O, p_.H, &out[d].w_hr_row);
    }
  }
  // [D, T, N, features] as forward lays out what it saves
  const T* put_saved(const Vector& values, int64_t features) {
    if (values.empty()) return nullptr;
    T* to = memory_.take(p_.D * f_.steps.total * features);
    each_saved(features, [&](int64_t from, int64_t i) { to[i] = from_double<T>(values[from]); });
    return to;
  }

  int64_t rows_width(int64_t features) const { return features + gap(); }
  Rows<T> new_rows(int64_t features) {
    const int64_t width = rows_width(features);
    // Of a closed loop also the input of a step that is not taken.
    const int64_t more = c_.options.is_closed_loop ? p_.N : 0;
    return layout_.rows(memory_.take((f_.steps.total + more) * width), width);
  }
  State<T> new_state(int64_t features) {
    return {memory_.take(p_.D * p_.N * features), p_.N * features, features};
  }
  void new_gradients(Rows<T>* dx, State<T>* dh0, State<T>* dc0, WeightGradients<T>* out) {
    const int64_t rows = p_.gates() * p_.H;
    *dx = new_rows(p_.I);
    if (c_.options.has_states) *dh0 = new_state(p_.O);
    if (c_.options.has_states && p_.has_cell_state()) *dc0 = new_state(p_.H);
    for (int d = 0; d < p_.D; ++d) {
      out[d].w_ih = memory_.take(rows * p_.I);
      out[d].w_hh = memory_.take(rows * p_.O);
      if (c_.options.has_bias) out[d].b_ih = memory_.take(rows);
      if (c_.options.has_bias) out[d].b_hh = memory_.take(rows);
      if (p_.projected) out[d].w_hr = memory_.take(p_.O * p_.H);
    }
  }

  static Vector get(const T* from, int64_t count) {
    Vector values;
    for (int64_t i = 0; from && i < count; ++i) values.push_back(to_double(from[i]));
    return values;
  }
  Vector get(const State<T>& state, int64_t features) const {
    return get(state.data, p_.D * p_.N * features);
  }
  // Zeros if there is no memory.
  template <typename U>
  Vector get_rows(const Rows<U>& rows, int64_t features) const {
    Vector values(p_.T * p_.N * features);
    each_row([&](int64_t t, int64_t n) {
      const T* from = rows.data + layout_.row(t, n) * rows_width(features);
      for (int64_t i = 0; i < features; ++i) {
        values[(t * p_.N + n) * features + i] = to_double(from[i]);
      }
    });
    return values;
  }
  Layer get_gradients(const Rows<T>& dx, const State<T>& dh0, const State<T>& dc0,
                      const WeightGradients<T>* of, const T* dslots) const {
    const int64_t rows = p_.gates() * p_.H, features = p_.slots() * p_.H;
    Layer layer;
    layer.x = get_rows(dx, p_.I);
    layer.h0 = get(dh0, p_.O);
    layer.c0 = get(dc0, p_.H);
    for (int d = 0; d < p_.D; ++d) {
      layer.weights[d] = {get(of[d].w_ih, rows * p_.I), get(of[d].w_hh, rows * p_.O),
                          get(of[d].b_ih, rows), get(of[d].b_hh, rows),
                          get(of[d].w_hr, p_.O * p_.H)};
    }
    layer.sums.resize(p_.D * p_.T * p_.N * features);
    each_saved(features, [&](int64_t to, int64_t i) { layer.sums[to] = to_double(dslots[i]); });
    return layer;
  }

  // f(t, n) for rows that are in memory.
  template <typename F>
  void each_row(F f) const {
    for (int64_t t = 0; t < p_.T; ++t) {
      for (int64_t n = 0; n < p_.N; ++n) {
        if (layout_.has_row(t, n)) f(t, n);
      }
    }
  }
  // f(index in [D, T, N, features], index in [D, total, features]) for rows that take part.
  template <typename F>
  void each_saved(int64_t features, F f) const {
    for (int d = 0; d < p_.D; ++d) {
      each_row([&](int64_t t, int64_t n) {
        const int64_t a = (d * p_.T + t) * p_.N + n;
        const int64_t b = d * f_.steps.total + layout_.saved_row(t, n);
        for (int64_t i = 0; layout_.takes_part(t, n) && i < features; ++i) {
          f(a * features + i, b * features + i);
        }
      });
    }
  }

  const Case& c_;
  const reference::Problem& p_;
  Layout layout_;
  Memory<T> memory_;
  std::unique_ptr<Block> packed_;
  std::deque<std::vector<float>> scales_;
  Forward<T> f_;
  T* dslots_ = nullptr;
};

}  // namespace rnnkern
