// One recurrent layer from its equations, row by row and step by step, forward and backward: what
// the kernels have to give. It shares no code with them but the names of the cells.
//
// The arithmetic is a template parameter. In double this says what is right; on dual numbers, what
// the derivative of both passes in a direction is; in the kernels' own type, how far a plain loop
// is off (tolerance.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "cells/cells.h"

namespace rnnkern::reference {

// a + a' eps, eps^2 = 0.
template <typename N>
struct Dual {
  N value = 0, tangent = 0;
  Dual() = default;
  Dual(N v, N t = 0) : value(v), tangent(t) {}

  Dual& operator+=(const Dual& b) { return *this = *this + b; }
  friend Dual operator+(const Dual& a, const Dual& b) {
    return {a.value + b.value, a.tangent + b.tangent};
  }
  friend Dual operator-(const Dual& a, const Dual& b) {
    return {a.value - b.value, a.tangent - b.tangent};
  }
  friend Dual operator*(const Dual& a, const Dual& b) {
    return {a.value * b.value, a.value * b.tangent + a.tangent * b.value};
  }
};

template <typename N>
N sigmoid(N x) {
  return N(1) / (N(1) + std::exp(-x));
}
template <typename N>
N hyperbolic(N x) {
  return std::tanh(x);
}
template <typename N>
N relu(N x) {
  return x < 0 ? N(0) : x;
}
// The gradient of relu: dy if y is above zero or NaN.
template <typename N>
N relu_gradient(N y, N dy) {
  return y <= 0 ? N(0) : dy;
}
template <typename N>
Dual<N> sigmoid(Dual<N> x) {
  const N y = sigmoid(x.value);
  return {y, x.tangent * y * (1 - y)};
}
template <typename N>
Dual<N> hyperbolic(Dual<N> x) {
  const N y = hyperbolic(x.value);
  return {y, x.tangent * (1 - y * y)};
}
template <typename N>
Dual<N> relu(Dual<N> x) {
  return {relu(x.value), relu_gradient(relu(x.value), x.tangent)};
}
template <typename N>
Dual<N> relu_gradient(Dual<N> y, Dual<N> dy) {
  return {relu_gradient(y.value, dy.value), relu_gradient(y.value, dy.tangent)};
}

// What a layer computes with, and what becomes of a number that is stored. There may be a function
// `factor`: what becomes of the numbers of a row when a product takes them.
template <typename N>
struct Plain {
  using Number = N;
  static Number stored(Number x) { return x; }
};

constexpr CellId kRnnTanh = *cell_named("RNN_TANH"), kRnnRelu = *cell_named("RNN_RELU"),
                 kLstm = *cell_named("LSTM"), kGru = *cell_named("GRU");

struct Problem {
  CellId cell;
  int64_t T, N, I, H, O;
  int D;
  bool projected;
  std::vector<int64_t> lengths;  // [N] row n takes part in the steps before lengths[n]
  std::vector<bool> reset;       // [T, N] the state of row n is zeroed before step t; or empty

  int gates() const { return cell == kLstm ? 4 : cell == kGru ? 3 : 1; }
  int slots() const { return cell == kGru ? 4 : gates(); }
  bool has_cell_state() const { return cell == kLstm; }
};

template <typename N>
struct LayerWeights {
  std::vector<N> w_ih, w_hh, b_ih, b_hh, w_hr;  // [G*H, I], [G*H, O], [G*H] twice, [O, H]
};

// The operands of a layer; or the gradients of all of them. An operand that is empty is zeros.
template <typename N>
struct Layer {
  std::vector<N> x, h0, c0;  // [T, N, I], [D, N, O], [D, N, H]
  LayerWeights<N> weights[kMaxDirections];
  // [D, T, N, S*H], added to what the activations are taken of; of GRU m, r, z, n, the first to
  // W_hn h + b_hn.
  std::vector<N> sums;
  std::vector<N> readout, readout_bias;  // [I, O], [I]: x(t+1) = readout h(t) + bias, where given
};

// The outputs of a layer; or their gradients.
template <typename N>
struct Outputs {
  std::vector<N> y, hn, cn;  // [T, N, D*O], [D, N, O], [D, N, H]
};

template <typename A>
class Reference {
 public:
  using N = typename A::Number;
  using Vector = std::vector<N>;

  Reference(const Problem& problem, const Layer<N>& layer) : p_(problem), layer_(layer) {
    outputs.y.resize(p_.T * p_.N * p_.D * p_.O);
    outputs.hn.resize(p_.D * p_.N * p_.O);
    if (p_.has_cell_state()) outputs.cn.resize(p_.D * p_.N * p_.H);
    steps_.resize(p_.D * p_.N);
    for (int d = 0; d < p_.D; ++d) {
      for (int64_t n = 0; n < p_.N; ++n) forward(d, n, &steps_[d * p_.N + n]);
    }
  }

  Outputs<N> outputs;
  const Vector& x() const { return layer_.x; }  // with what a readout has made

  Layer<N> backward(const Outputs<N>& incoming) const {
    const int64_t rows = p_.gates() * p_.H;
    Layer<N> gradients;
    gradients.x.resize(p_.T * p_.N * p_.I);
    gradients.h0.resize(p_.D * p_.N * p_.O);
    if (p_.has_cell_state()) gradients.c0.resize(p_.D * p_.N * p_.H);
    gradients.sums.resize(p_.D * p_.T * p_.N * p_.slots() * p_.H);
    for (int d = 0; d < p_.D; ++d) {
      LayerWeights<N>& g = gradients.weights[d];
      g.w_ih.resize(rows * p_.I);
      g.w_hh.resize(rows * p_.O);
      g.b_ih.resize(rows);
      g.b_hh.resize(rows);
      if (p_.projected) g.w_hr.resize(p_.O * p_.H);
      for (int64_t n = 0; n < p_.N; ++n) backward(d, n, incoming, &gradients);
    }
    return gradients;
  }

 private:
  // What one step of one row has found.
  struct Step {
    int64_t t;
    bool zeroed;               // the state that enters it
    Vector h_prev, c_prev;     //
    Vector slots;              // [S*H] activated; m of GRU
    Vector c, unprojected, h;  // [H], [H], [O]
  };

  // of [rows, width], row i of it
  static const N* row(const Vector& of, int64_t i, int64_t width) {
    return of.empty() ? nullptr : of.data() + i * width;
  }
  static Vector copy(const N* from, int64_t count) {
    return from ? Vector(from, from + count) : Vector(count);
  }

  // to[rows] += w[rows, columns] v[columns]
  static void add_product(const Vector& w, const N* v, int64_t columns, N* to, int64_t rows) {
    const auto add = [&](const N* of_row, const N* right, N* sum) {
      for (int64_t j = 0; j < columns; ++j) *sum += of_row[j] * right[j];
    };
    if constexpr (requires { A::factor(v, columns); }) {
      const Vector right = A::factor(v, columns);
      for (int64_t i = 0; i < rows; ++i) {
        add(A::factor(&w[i * columns], columns).data(), right.data(), to + i);
      }
    } else {
      for (int64_t i = 0; i < rows; ++i) add(&w[i * columns], v, to + i);
    }
  }
  // to[columns] += v[rows] w[rows, columns]
  static void add_transposed(const Vector& w, const Vector& v, N* to, int64_t columns) {
    for (int64_t j = 0; j < columns; ++j) {
      for (size_t i = 0; i < v.size(); ++i) to[j] += w[i * columns + j] * v[i];
    }
  }
  // to[rows, columns] += a[rows] b[columns]
  static void add_outer(const Vector& a, const N* b, int64_t columns, Vector* to) {
    for (size_t i = 0; i < a.size(); ++i) {
      for (int64_t j = 0; j < columns; ++j) (*to)[i * columns + j] += a[i] * b[j];
    }
  }

  bool begins(int64_t t, int64_t n) const { return !p_.reset.empty() && p_.reset[t * p_.N + n]; }

  // Of direction 1, an episode that begins at t+1 ends what comes down to t.
  bool zeroed(int d, int64_t t, int64_t n) const {
    return d == 0 ? begins(t, n) : t + 1 < p_.lengths[n] && begins(t + 1, n);
  }

  void forward(int d, int64_t n, std::vector<Step>* steps) {
    const int64_t state = d * p_.N + n, length = p_.lengths[n];
    Vector h = copy(row(layer_.h0, state, p_.O), p_.O);
    Vector c = copy(row(layer_.c0, state, p_.H), p_.H);
    for (int64_t i = 0; i < length; ++i) {
      Step s;
      s.t = d == 0 ? i : length - 1 - i;
      s.zeroed = zeroed(d, s.t, n);
      s.h_prev = s.zeroed ? Vector(p_.O) : h;
      s.c_prev = s.zeroed ? Vector(p_.H) : c;
      forward(d, n, &s);
      h = s.h;
      c = s.c;
      N* y = &outputs.y[((s.t * p_.N + n) * p_.D + d) * p_.O];
      for (int64_t o = 0; o < p_.O; ++o) y[o] = h[o];
      if (!layer_.readout.empty() && s.t + 1 < p_.T) feed(n, s);
      steps->push_back(std::move(s));
    }
    for (int64_t o = 0; o < p_.O; ++o) outputs.hn[state * p_.O + o] = h[o];
    for (size_t u = 0; !outputs.cn.empty() && u < c.size(); ++u) {
      outputs.cn[state * p_.H + u] = A::stored(c[u]);
    }
  }

  void feed(int64_t n, const Step& s) {
    N* x = &layer_.x[((s.t + 1) * p_.N + n) * p_.I];
    for (int64_t i = 0; i < p_.I; ++i) x[i] = layer_.readout_bias[i];
    add_product(layer_.readout, s.h.data(), p_.O, x, p_.I);
    for (int64_t i = 0; i < p_.I; ++i) x[i] = A::stored(x[i]);
  }

  void forward(int d, int64_t n, Step* s) const {
    const LayerWeights<N>& w = layer_.weights[d];
    const int64_t H = p_.H, rows = p_.gates() * H, at = (d * p_.T + s->t) * p_.N + n;
    Vector of_x = copy(row(w.b_ih, 0, 0), rows), of_h = copy(row(w.b_hh, 0, 0), rows);
    add_product(w.w_ih, row(layer_.x, s->t * p_.N + n, p_.I), p_.I, of_x.data(), rows);
    add_product(w.w_hh, s->h_prev.data(), p_.O, of_h.data(), rows);
    const Vector more = copy(row(layer_.sums, at, p_.slots() * H), p_.slots() * H);
    s->slots.resize(p_.slots() * H);
    s->c.resize(p_.has_cell_state() ? H : 0);
    s->unprojected.resize(H);
    for (int64_t u = 0; u < H; ++u) {
      const auto sum = [&](int k) { return of_x[k * H + u] + of_h[k * H + u] + more[k * H + u]; };
      N& h = s->unprojected[u];
      if (p_.cell == kRnnTanh || p_.cell == kRnnRelu) {
        h = p_.cell == kRnnTanh ? hyperbolic(sum(0)) : relu(sum(0));
        s->slots[u] = h;
      } else if (p_.cell == kLstm) {
        const N i = sigmoid(sum(0)), f = sigmoid(sum(1)), g = hyperbolic(sum(2)),
                o = sigmoid(sum(3));
        s->c[u] = f * s->c_prev[u] + i * g;
        h = o * hyperbolic(s->c[u]);
        store({i, f, g, o}, u, s);
      } else {
        const N m = of_h[2 * H + u] + more[u];
        const N r = sigmoid(of_x[u] + of_h[u] + more[H + u]);
        const N z = sigmoid(of_x[H + u] + of_h[H + u] + more[2 * H + u]);
        const N g = hyperbolic(of_x[2 * H + u] + r * m + more[3 * H + u]);
        h = (N(1) - z) * g + z * s->h_prev[u];
        store({m, r, z, g}, u, s);
      }
      h = A::stored(h);
      if (p_.has_cell_state()) s->c[u] = A::stored(s->c[u]);
    }
    s->h = s->unprojected;
    if (!p_.projected) return;
    s->h.assign(p_.O, N(0));
    add_product(w.w_hr, s->unprojected.data(), H, s->h.data(), p_.O);
    for (N& h : s->h) h = A::stored(h);
  }

  void store(std::initializer_list<N> activated, int64_t u, Step* s) const {
    for (const N& a : activated) {
      s->slots[u] = A::stored(a);
      u += p_.H;
    }
  }

  void backward(int d, int64_t n, const Outputs<N>& incoming, Layer<N>* gradients) const {
    const int64_t state = d * p_.N + n;
    const std::vector<Step>& steps = steps_[state];
    Vector dh = copy(row(incoming.hn, state, p_.O), p_.O);
    Vector dc = copy(row(incoming.cn, state, p_.H), p_.H);
    for (auto s = steps.rbegin(); s != steps.rend(); ++s) {
      const N* dy = row(incoming.y, (s->t * p_.N + n) * p_.D + d, p_.O);
      for (int64_t o = 0; dy && o < p_.O; ++o) dh[o] += dy[o];
      backward(d, n, *s, gradients, &dh, &dc);
      if (s->zeroed) dh.assign(p_.O, N(0)), dc.assign(p_.H, N(0));
    }
    for (int64_t o = 0; o < p_.O; ++o) gradients->h0[state * p_.O + o] = dh[o];
    for (int64_t u = 0; p_.has_cell_state() && u < p_.H; ++u) {
      gradients->c0[state * p_.H + u] = dc[u];
    }
  }

  // dh, dc: of what leaves the step, then of what has entered it.
  void backward(int d, int64_t n, const Step& s, Layer<N>* gradients, Vector* dh,
                Vector* dc) const {
    const LayerWeights<N>& w = layer_.weights[d];
    LayerWeights<N>& g = gradients->weights[d];
    const int64_t H = p_.H, row_of_x = s.t * p_.N + n;
    Vector du = *dh, direct(p_.O);  // of h before the projection; past W_hh
    if (p_.projected) {
      for (N& h : *dh) h = A::stored(h);
      add_outer(*dh, s.unprojected.data(), H, &g.w_hr);
      du.assign(H, N(0));
      add_transposed(w.w_hr, *dh, du.data(), H);
    }
    N* dsums = &gradients->sums[((d * p_.T + s.t) * p_.N + n) * p_.slots() * H];
    Vector of_x(p_.gates() * H), of_h(p_.gates() * H);
    for (int64_t u = 0; u < H; ++u) cell_backward(s, u, du[u], dsums, dc, &direct);
    for (int64_t i = 0; i < p_.slots() * H; ++i) dsums[i] = A::stored(dsums[i]);
    const bool is_gru = p_.cell == kGru;
    for (int64_t i = 0; i < p_.gates() * H; ++i) of_x[i] = of_h[i] = dsums[is_gru ? H + i : i];
    for (int64_t u = 0; is_gru && u < H; ++u) of_h[2 * H + u] = dsums[u];
    add_outer(of_x, row(layer_.x, row_of_x, p_.I), p_.I, &g.w_ih);
    add_outer(of_h, s.h_prev.data(), p_.O, &g.w_hh);
    for (size_t i = 0; i < of_x.size(); ++i) g.b_ih[i] += of_x[i], g.b_hh[i] += of_h[i];
    add_transposed(w.w_ih, of_x, &gradients->x[row_of_x * p_.I], p_.I);
    add_transposed(w.w_hh, of_h, direct.data(), p_.O);
    *dh = direct;
  }

  void cell_backward(const Step& s, int64_t u, N dh, N* dsums, Vector* dc, Vector* direct) const {
    const int64_t H = p_.H;
    const N one(1);
    const auto slot = [&](int k) { return s.slots[k * H + u]; };
    if (p_.cell == kRnnTanh) {
      dsums[u] = dh * (one - s.unprojected[u] * s.unprojected[u]);
    } else if (p_.cell == kRnnRelu) {
      dsums[u] = relu_gradient(s.unprojected[u], dh);
    } else if (p_.cell == kLstm) {
      const N i = slot(0), f = slot(1), g = slot(2), o = slot(3), tanh_c = hyperbolic(s.c[u]);
      const N d = (*dc)[u] + dh * o * (one - tanh_c * tanh_c);
      dsums[u] = d * g * i * (one - i);
      dsums[H + u] = d * s.c_prev[u] * f * (one - f);
      dsums[2 * H + u] = d * i * (one - g * g);
      dsums[3 * H + u] = dh * tanh_c * o * (one - o);
      (*dc)[u] = d * f;
    } else {
      const N m = slot(0), r = slot(1), z = slot(2), g = slot(3);
      const N d = dh * (one - z) * (one - g * g);
      dsums[u] = d * r;
      dsums[H + u] = d * m * r * (one - r);
      dsums[2 * H + u] = dh * (s.h_prev[u] - g) * z * (one - z);
      dsums[3 * H + u] = d;
      (*direct)[u] = dh * z;
    }
  }

  const Problem& p_;
  Layer<N> layer_;
  std::vector<std::vector<Step>> steps_;  // [D*N], in the order in which they were taken
};

}  // namespace rnnkern::reference
