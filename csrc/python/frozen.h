// The weights of a module, packed once for this CPU, and its calls. A call packs nothing and reads
// nothing from Python but its operands.
#pragma once

#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "huge_pages.h"
#include "python/layer.h"
#include "python/operands.h"
#include "python/run.h"
#include "python/states.h"
#include "scan.h"

namespace rnnkern {

// Does not change once it is made: several threads may call it at the same time.
class Frozen {
 public:
  // `weights`: those of all layers in torch's flat order. `numbers`: what they become: "own",
  // "bfloat16" (of float32), or "int8" (of float32, whole numbers already, of which `scales` has
  // the scale of each row: those of w_ih, w_hh and, if there is one, w_hr of each direction).
  Frozen(const Layer& layer, int64_t input, int layers, const std::string& numbers,
         const py::sequence& weights, const py::sequence& scales)
      : number(next_number++), layer_(layer), step_(layer), input_(input), layers_(layers) {
    step_.is_cell = true;  // the tensors of a step have no axis of time
    step_.batch_first = false;
    if (cuda::kIsStandIn) throw Refused("frozen weights are for the kernels of the CPU");
    if (layers < 1) throw Refused("a module has 1 layer or more, got " + std::to_string(layers));
    const size_t count = weights_of_layer();
    if (weights.size() != size_t(layers) * count) {
      throw Refused("expected " + std::to_string(size_t(layers) * count) + " weights, got " +
                    std::to_string(weights.size()));
    }
    const py::object first = weights[0];
    dtype_ = view_of(first, "weight_ih").tensor.dtype;
    numbers_ = numbers == "own"        ? Numbers::kOwn
               : numbers == "bfloat16" ? Numbers::kBfloat16
               : numbers == "int8"     ? Numbers::kInt8
                                       : throw Refused("no weights are kept as " + numbers);
    const bool covered = with_numbers([&](auto element) {
      pack<decltype(element)>(weights, scales);
      return true;
    });
    if (!covered) throw Refused("weight_ih is not covered: its dtype");
  }

  const int64_t number;  // no other one of this process has it

  // The weights of a module of this layer alone, for a pass of kernels of T.
  template <typename T>
  const char* only_layer(const Layer& layer, int64_t input) const {
    const bool same_numbers =
        with_numbers([](auto element) { return std::is_same_v<decltype(element), T>; });
    if (!same_numbers || layers_ != 1 || layer != layer_ || input != input_) {
      throw Refused("the packed weights are of another layer, or of other numbers");
    }
    return packed_[0]->data;
  }

  const Layer& layer() const { return layer_; }
  int layers() const { return layers_; }
  int64_t bytes() const {
    int64_t sum = 0;
    for (const auto& block : packed_) sum += int64_t(block->bytes);
    return sum;
  }

  // y, h_n and, if there is a cell state, c_n; of a cell without y. `steps`: as in
  // `Kernel.forward`.
  py::tuple forward(py::handle x, py::handle h0, py::handle c0, py::handle steps) const {
    return with_numbers(
        [&](auto element) { return forward_of<decltype(element)>(x, h0, c0, steps); });
  }

  // What the module returns for an input and its state; or None if the call is not a plain one of
  // one batch, if a mode of torch or a profiler has to see it, or if a gradient is wanted.
  py::object plain_call(py::handle x, py::handle hx) const {
    if (!may_be_viewed(x)) return py::none();
    const dlpack::Tensor input = view_of(x, "input").tensor;
    const bool fits = layer_.is_cell ? input.ndim == 1 || input.ndim == 2 : input.ndim == 3;
    const auto states = plain_states(layer_, hx);
    if (!fits || !states || has_to_be_seen(x, *states) || is_autocast(input.device)) {
      return py::none();
    }
    py::tuple made = forward(x, (*states)[0], (*states)[1], py::none());
    if (layer_.is_cell && made.size() == 1) return made[0];
    if (layer_.is_cell) return made;
    if (made.size() == 2) return made;
    return py::make_tuple(made[0], py::make_tuple(made[1], made[2]));
  }

  // One step: returns the output, and writes the new state into the tensors of `hx`. None as above.
  py::object step(py::handle x, py::handle hx) const {
    if (layer_.directions != 1) throw Refused("a step is of one direction");
    if (!may_be_viewed(x)) return py::none();
    const auto states = plain_states(layer_, hx);
    if (!states || !states->size() || has_to_be_seen(x, *states)) return py::none();
    return with_numbers([&](auto element) { return step_of<decltype(element)>(x, *states); });
  }

  // Writes the weights to dense tensors: w_ih, w_hh and, if there is one, w_hr of each direction,
  // in float32, or float64 if that is their own type.
  void unpack(const py::sequence& tensors) const {
    const auto matrices = size_t(layer_.directions * (2 + layer_.projected));
    if (tensors.size() != size_t(layers_) * matrices) throw Refused("one tensor for each matrix");
    with_numbers([&](auto element) {
      unpack_to<decltype(element)>(tensors);
      return true;
    });
  }

 private:
  enum class Numbers { kOwn, kBfloat16, kInt8 };
  static inline std::atomic<int64_t> next_number{1};

  template <typename F>
  auto with_numbers(F f) const -> decltype(f(float{})) {
    if (numbers_ == Numbers::kOwn) return rnnkern::with_element(dtype_, f);
    if (dtype_ != dlpack::kDataType<float>) {
      throw Refused("weights become bfloat16 or int8 only if they are float32");
    }
    return numbers_ == Numbers::kInt8 ? f(F32ByI8{}) : f(F32ByBf16{});
  }

  size_t weights_of_layer() const { return size_t(layer_.directions * layer_.tensors()); }
  int64_t input_of(int layer) const { return layer ? layer_.directions * layer_.out : input_; }
  Sizes sizes_of(int layer) const {
    return {layer_.cell, input_of(layer),   layer_.hidden,
            layer_.out,  layer_.directions, layer_.projected};
  }

  template <typename T>
  void pack(const py::sequence& weights, const py::sequence& scales) {
    const size_t count = weights_of_layer(), of_direction = size_t(2 + layer_.projected);
    if (scales.size() !=
        (numbers_ == Numbers::kInt8 ? size_t(layers_ * layer_.directions) * of_direction : 0)) {
      throw Refused("scales: one tensor for each matrix of integers");
    }
    for (int i = 0; i < layers_; ++i) {
      Weights<T> own[kMaxDirections];
      const auto begin = Py_ssize_t(size_t(i) * count);
      const auto part = py::reinterpret_steal<py::sequence>(
          PySequence_GetSlice(weights.ptr(), begin, begin + Py_ssize_t(count)));
      read_weights(layer_, input_of(i), kHost, part, own);
      for (int d = 0; d < layer_.directions && scales.size(); ++d) {
        const int64_t rows = known_shape(layer_.cell).gates * layer_.hidden;
        const auto scale = [&](size_t k, int64_t wanted) {
          const py::object object = scales[size_t(i * layer_.directions + d) * of_direction + k];
          const TensorView v = float_view<float>(object, "scale");
          v.expect_shape({wanted});
          return v.data<const float>();
        };
        own[d].scale_ih = scale(0, rows);
        own[d].scale_hh = scale(1, rows);
        if (layer_.projected) own[d].scale_hr = scale(2, layer_.out);
      }
      const auto pack = std::get<Kernels<T>>(kernels_in_use()).pack;
      const Sizes sizes = sizes_of(i);
      packed_.push_back(std::make_unique<Block>(pack(sizes, own, nullptr)));
      pack(sizes, own, packed_.back()->data);
    }
  }

  template <typename T>
  void unpack_to(const py::sequence& tensors) const {
    size_t next = 0;
    for (int i = 0; i < layers_; ++i) {
      const Sizes z = sizes_of(i);
      const int64_t rows = known_shape(z.cell).gates * z.H;
      Matrices<Compute<T>> to[kMaxDirections];
      const auto take = [&](int64_t height, int64_t width) {
        const py::object object = tensors[next++];
        const TensorView v = float_view<Compute<T>>(object, "matrix");
        v.expect_device(kHost);
        v.expect_shape({height, width});
        if (height > 1 && v.stride(0) != width) v.fail("is not dense");
        return v.template data<Compute<T>>();
      };
      for (int d = 0; d < z.D; ++d) {
        to[d].w_ih = take(rows, z.I);
        to[d].w_hh = take(rows, z.O);
        if (z.projected) to[d].w_hr = take(z.O, z.H);
      }
      std::get<Kernels<T>>(kernels_in_use()).unpack(z, packed_[size_t(i)]->data, to);
    }
  }

  // Whether a profiler or autograd has to see the call.
  static bool has_to_be_seen(py::handle x, const PlainStates& states) {
    return is_profiled() || wants_gradient(std::array<py::handle, 1>{x}, states);
  }

  template <typename T>
  void check(const Operands<T>& o) const {
    if (o.device().type != dlpack::kCpu) {
      throw Refused("input is on a GPU, and frozen weights are on the CPU");
    }
    if (o.sizes.I != input_) {
      throw Refused("input has " + std::to_string(o.sizes.I) + " features, expected " +
                    std::to_string(input_));
    }
    if (o.steps.T == 0) throw Refused("the sequence has no steps");
  }

  // The states of one layer, out of those of all layers.
  template <typename U>
  State<U> of_layer(const State<U>& all, int layer) const {
    return {all.data ? all.data + layer * layer_.directions * all.direction : nullptr,
            all.direction, all.row};
  }

  // The states [layers * D, N, F] of a module; of a cell [N, F], or [F] of a single row.
  template <typename T>
  State<const T> states(Operands<T>& o, py::handle object, const char* name,
                        int64_t features) const {
    if (object.is_none()) return {};
    if (o.of_a_cell()) return o.template state<const T>(object, name, features);
    const TensorView v = float_view<T>(object, name);
    v.expect_device(o.device());
    v.expect_shape({layers_ * layer_.directions, o.steps.N, features});
    return {v.template data<const T>(), v.stride(0), v.stride(1)};
  }

  // Everything that does not change from layer to layer is left to the caller.
  template <typename T>
  Forward<T> scan_of(int layer, const Steps& steps) const {
    Forward<T> f;
    f.sizes = sizes_of(layer);
    f.steps = steps;
    f.packed = packed_[size_t(layer)]->data;
    f.rounds_cells = true;  // as under deterministic algorithms
    return f;
  }

  template <typename T>
  void run(const Forward<T>& f) const {
    const int threads = num_threads();
    with_interpreter_released(f.sizes, f.steps, [&] { rnnkern::run(f, threads, true); });
  }

  template <typename T>
  py::tuple forward_of(py::handle x, py::handle h0, py::handle c0, py::handle steps) const {
    py::object input = py::reinterpret_borrow<py::object>(x), hn, cn;
    State<const T> h_first, c_first;
    State<T> h_last, c_last;
    for (int i = 0; i < layers_; ++i) {
      Operands<T> o(layer_, input, steps);
      const int64_t N = o.steps.N, rows = layers_ * layer_.directions;
      if (i == 0) {
        check(o);
        if (!c0.is_none() && !layer_.has_cell_state()) throw Refused("c_0 is of LSTMs alone");
        h_first = states(o, h0, "h_0", layer_.out);
        c_first = states(o, c0, "c_0", layer_.hidden);
        const auto make = [&](int64_t features, State<T>* all) {
          *all = {nullptr, N * features, features};
          return o.make(o.of_a_cell() ? o.rows_shape(features) : dense({rows, N, features}),
                        &all->data);
        };
        if (!o.of_a_cell()) hn = make(layer_.out, &h_last);
        if (layer_.has_cell_state()) cn = make(layer_.hidden, &c_last);
      }
      Forward<T> f = scan_of<T>(i, o.steps);
      f.x = o.input();
      f.h0 = of_layer(h_first, i);
      f.c0 = of_layer(c_first, i);
      f.cn = of_layer(c_last, i);
      py::object y = o.make_rows(layer_.directions * layer_.out, &f.y);
      f.hn = o.of_a_cell() ? State<T>{f.y.data, 0, f.y.row} : of_layer(h_last, i);
      run(f);
      input = std::move(y);
    }
    py::list made;
    for (const py::object& each : {input, hn, cn}) {
      if (each) made.append(each);
    }
    return py::tuple(made);
  }

  // A state that a step writes: [layers, N, F], or [layers, F] of a single row; of a cell without
  // the first axis.
  template <typename T>
  State<T> state_to_write(const Operands<T>& o, int axes_of_x, py::handle object, const char* name,
                          int64_t features) const {
    const TensorView v = float_view<T>(object, name);
    v.expect_device(kHost);
    const int64_t N = o.steps.N;
    const int first = !layer_.is_cell, row = axes_of_x == 2 ? first : -1;
    if (first && row > 0) v.expect_shape({layers_, N, features});
    if (first && row < 0) v.expect_shape({layers_, features});
    if (!first && row == 0) v.expect_shape({N, features});
    if (!first && row < 0) v.expect_shape({features});
    const int64_t of_layer = layers_ > 1 ? v.stride(0) : 0, of_row = N > 1 ? v.stride(row) : 0;
    const int64_t layer_end = (layers_ - 1) * of_layer + features,
                  row_end = (N - 1) * of_row + features;
    if ((layers_ > 1 && of_layer < (of_row < of_layer || N == 1 ? row_end : features)) ||
        (N > 1 && of_row < (of_layer < of_row || layers_ == 1 ? layer_end : features))) {
      v.fail("has rows that overlap, and a step writes to them");
    }
    return {v.template data<T>(), of_layer, of_row};
  }

  // N rows of `layers` matrices, each `width` wide.
  template <typename T>
  struct Area {
    const T* data;
    int64_t layers, of_layer, N, of_row, width;

    const T* end() const { return data + (layers - 1) * of_layer + (N - 1) * of_row + width; }
  };
  // Whether two of them share memory. Rows at the same distances may lie between each other.
  template <typename T>
  static bool overlap(const Area<T>& a, const Area<T>& b) {
    if (!a.N || a.end() <= b.data || b.end() <= a.data) return false;
    if (a.layers != b.layers || a.of_layer != b.of_layer || a.of_row != b.of_row) return true;
    int64_t distance = 0;  // of neighbouring rows
    if (a.N > 1) distance = a.of_row;
    if (a.layers > 1 && (!distance || a.of_layer < distance)) distance = a.of_layer;
    const int64_t apart = b.data - a.data;
    return apart >= 0 ? apart < a.width || apart + b.width > distance
                      : -apart < b.width || -apart + a.width > distance;
  }

  template <typename T>
  py::object step_of(py::handle x, const PlainStates& given) const {
    const int axes = view_of(x, "input").tensor.ndim;
    if (axes != 1 && axes != 2) {
      throw Refused("the input of a step has 1 or 2 axes, got " + std::to_string(axes));
    }
    Operands<T> o(step_, x, py::none());
    check(o);
    const State<T> h = state_to_write(o, axes, given[0], "h", layer_.out);
    State<T> c;
    if (given.size() == 2) {
      c = state_to_write(o, axes, given[1], "c", layer_.hidden);
      const int64_t N = o.steps.N;
      const Rows<const T> in = o.input();
      const Area<T> of_c = {c.data, layers_, c.direction, N, c.row, layer_.hidden};
      if (overlap({h.data, layers_, h.direction, N, h.row, layer_.out}, of_c)) {
        throw Refused("h and c must be two tensors, which share no memory");
      }
      if (overlap({in.data, 1, 0, N, N > 1 ? in.row : 0, o.sizes.I}, of_c)) {
        throw Refused("x must share no memory with c, which a step writes to");
      }
    }
    thread_local std::vector<T> between;  // what a layer that is not the last makes
    const int64_t O = layer_.out, N = o.steps.N;
    if (layers_ > 1 && between.size() < size_t(N * O)) between.resize(size_t(N * O));
    Rows<T> y;
    py::object output = o.make_rows(O, &y);
    Rows<const T> input = o.input();
    for (int i = 0; i < layers_; ++i) {
      const State<T> own_h = of_layer(h, i), own_c = of_layer(c, i);
      Forward<T> f = scan_of<T>(i, o.steps);
      f.x = input;
      f.y = i + 1 < layers_ ? Rows<T>{between.data(), 0, O} : y;
      f.h0 = {own_h.data, 0, own_h.row};
      f.c0 = {own_c.data, 0, own_c.row};
      f.cn = own_c;
      f.hn = {f.y.data, 0, f.y.row};  // h is read until the last thread has finished
      run(f);
      for (int64_t n = 0; n < N; ++n) {
        std::memcpy(own_h.data + n * own_h.row, f.y.data + n * f.y.row, size_t(O) * sizeof(T));
      }
      input = {own_h.data, 0, own_h.row};
    }
    return output;
  }

  Layer layer_, step_;
  int64_t input_;
  int layers_;
  Numbers numbers_ = Numbers::kOwn;
  dlpack::DataType dtype_;
  std::vector<std::unique_ptr<Block>> packed_;  // of each layer
};

}  // namespace rnnkern
