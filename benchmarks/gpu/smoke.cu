// The kernels of one cell and type without torch and Python: whether they are right, and how long a
// step takes. Run it first on a new GPU, because nothing else has to be built or imported for it.
//
//   smoke FILE NAME T N I H [tf32]
//
// Each tier is compared with tests/standalone/reference.h in float64, forward and backward, over
// the first steps of the sequence. Then it is timed over all of them, and three things are checked
// that need no reference of so many steps: the first outputs are still right, two runs give the
// same bits, and the tiers agree. Each result is appended to FILE as a line of JSON as it comes.
// The exit status is 0 if all is right.
//
// benchmarks/gpu/run_all.py says how it is compiled, with RNNKERN_CELL and RNNKERN_ELEMENT. With
// RNNKERN_SIMT it is plain C++ on the stand-in for a GPU (tests/test_gpu_run.py).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../tests/standalone/reference.h"
#include "../../tests/standalone/tolerance.h"
#include "cuda/plan.h"
#include "cuda/start.h"
#include "smoke_device.h"

namespace rnnkern {
namespace {

using T = RNNKERN_ELEMENT;
using Cell = gpu::RNNKERN_CELL;
using Vector = std::vector<double>;
using Named = std::map<std::string, Vector>;  // results by name

constexpr CellShape kShape = Cell::kShape;
const CellId kCell = *cell_named(Cell::kMode);
constexpr int64_t kCheckedSteps = 8;
constexpr int kWarmUps = 2, kSamples = 5;
// For the time of the scan alone: so few inputs that their product takes no time.
constexpr int64_t kFewInputs = 8;

struct Shape {
  std::string name;
  int64_t T, N, I, H;
  bool tf32;
};

// ---- Operands, and the right results ----

struct Operands {
  reference::Layer<double> layer;
  reference::Outputs<double> incoming;
};

// Numbers of T, uniform in (-scale, scale). Sequences are drawn in order of time.
class Random {
 public:
  Vector numbers(int64_t count, double scale) {
    std::uniform_real_distribution<double> uniform(-scale, scale);
    Vector made(static_cast<size_t>(count));
    for (double& x : made) x = round_to<T>(uniform(generator_));
    return made;
  }

 private:
  std::mt19937 generator_{1};
};

Operands draw(const Shape& s) {
  Random random;
  const int64_t gates = kShape.gates * s.H;
  const double scale = 1 / std::sqrt(double(s.H));
  Operands o;
  auto& w = o.layer.weights[0];
  w.w_ih = random.numbers(gates * s.I, scale);
  w.w_hh = random.numbers(gates * s.H, scale);
  w.b_ih = random.numbers(gates, scale);
  w.b_hh = random.numbers(gates, scale);
  o.layer.h0 = random.numbers(s.N * s.H, 1);
  o.incoming.hn = random.numbers(s.N * s.H, 1);
  if (kShape.cell_state) o.layer.c0 = random.numbers(s.N * s.H, 1);
  if (kShape.cell_state) o.incoming.cn = random.numbers(s.N * s.H, 1);
  o.layer.x = random.numbers(s.T * s.N * s.I, 1);
  o.incoming.y = random.numbers(s.T * s.N * s.H, 1);
  return o;
}

// Rows first to first + count - 1 of the batch, of each tensor that has rows.
Operands rows_of(const Operands& all, const Shape& s, int64_t first, int64_t count) {
  const auto cut = [&](Vector& of, int64_t width) {
    Vector part;
    for (size_t at = size_t(first * width); at < of.size(); at += size_t(s.N * width)) {
      part.insert(part.end(), of.begin() + int64_t(at), of.begin() + int64_t(at) + count * width);
    }
    of = std::move(part);
  };
  Operands o = all;
  cut(o.layer.x, s.I);
  for (Vector* of : {&o.layer.h0, &o.layer.c0, &o.incoming.hn, &o.incoming.cn, &o.incoming.y}) {
    cut(*of, s.H);
  }
  return o;
}

// Both passes by the reference, computed in A, with the batch split among threads.
template <typename A>
Named evaluate(const Shape& s, const Operands& all) {
  using N = typename A::Number;
  const int64_t threads =
      std::clamp<int64_t>(std::thread::hardware_concurrency(), 1, std::min<int64_t>(s.N, 16));
  const auto begin = [&](int64_t part) { return part * s.N / threads; };
  const auto convert = [](const Vector& from) { return std::vector<N>(from.begin(), from.end()); };
  std::vector<Named> parts(static_cast<size_t>(threads));
  const auto work = [&](int64_t part) {
    const int64_t count = begin(part + 1) - begin(part);
    const Operands o = rows_of(all, s, begin(part), count);
    const auto& w = o.layer.weights[0];
    reference::Problem problem = {kCell, s.T, count, s.I, s.H, s.H, 1, false, {}, {}};
    problem.lengths.assign(size_t(count), s.T);
    reference::Layer<N> layer;
    layer.x = convert(o.layer.x);
    layer.h0 = convert(o.layer.h0);
    layer.c0 = convert(o.layer.c0);
    layer.weights[0] = {convert(w.w_ih), convert(w.w_hh), convert(w.b_ih), convert(w.b_hh), {}};
    const reference::Reference<A> run(problem, layer);
    const reference::Layer<N> made =
        run.backward({convert(o.incoming.y), convert(o.incoming.hn), convert(o.incoming.cn)});
    const auto& g = made.weights[0];
    const auto get = [&](const char* name, const std::vector<N>& from) {
      if (!from.empty()) parts[size_t(part)][name] = Vector(from.begin(), from.end());
    };
    get("y", run.outputs.y), get("h_n", run.outputs.hn), get("c_n", run.outputs.cn);
    get("dx", made.x), get("dh_0", made.h0);
    if (kShape.cell_state) get("dc_0", made.c0);
    get("dW_ih", g.w_ih), get("dW_hh", g.w_hh), get("db_ih", g.b_ih), get("db_hh", g.b_hh);
  };
  std::vector<std::thread> pool;
  for (int64_t part = 0; part < threads; ++part) pool.emplace_back(work, part);
  for (std::thread& thread : pool) thread.join();

  Named whole;
  for (const auto& [name, first] : parts[0]) {
    Vector& to = whole[name];
    if (name.starts_with("dW") || name.starts_with("db")) {
      to.resize(first.size());
      for (const Named& part : parts) {
        for (size_t i = 0; i < to.size(); ++i) to[i] += part.at(name)[i];
      }
      for (double& x : to) x = double(A::stored(N(x)));
      continue;
    }
    const bool is_sequence = name == "y" || name == "dx";
    const int64_t steps = is_sequence ? s.T : 1, width = name == "dx" ? s.I : s.H;
    for (int64_t t = 0; t < steps; ++t) {
      for (int64_t part = 0; part < threads; ++part) {
        const int64_t row = (begin(part + 1) - begin(part)) * width;
        const double* const from = parts[size_t(part)].at(name).data() + t * row;
        to.insert(to.end(), from, from + row);
      }
    }
  }
  return whole;
}

// The reference in the type of the kernels: which part of the error is due to the type.
struct Loop {
  using Number = Compute<T>;
  static Number stored(Number x) { return Number(round_to<T>(x)); }
};

// The largest error of some results, by the rule of tolerance.h. Products of TF32 have a
// significand of 11 bits, and their errors are in eps of T, too.
struct Finding {
  std::string name;
  double error = 0, limit = 1;
  bool right() const { return error <= limit; }
};
Finding compare(const Named& actual, const Named& plain, const Named& exact, bool tf32) {
  const double floor = tf32 ? 2 * std::ldexp(1.0, Format<T>::kDigits - 11) : kFloor<T>;
  Finding worst;
  for (const auto& [name, wanted] : exact) {
    Finding f = {name};
    f.error = error_eps<T>(actual.at(name), wanted);
    const double of_plain = &plain == &exact ? 0 : error_eps<T>(plain.at(name), wanted);
    f.limit = std::min(kFactor * of_plain + floor, 5 * floor);
    if (worst.name.empty() || !(f.error / f.limit <= worst.error / worst.limit)) worst = f;
  }
  return worst;
}

// ---- The kernels ----

// A tensor of T on the GPU, which is NaN until something is written.
class Tensor {
 public:
  explicit Tensor(int64_t count) : memory_(size_t(count) * sizeof(T)), count_(count) {
    memory_.fill(0xff);
  }
  explicit Tensor(const Vector& numbers) : Tensor(int64_t(numbers.size())) {
    std::vector<T> stored;
    for (double x : numbers) stored.push_back(from_double<T>(x));
    memory_.write(stored.data(), stored.size() * sizeof(T));
  }
  T* data() const { return reinterpret_cast<T*>(memory_.data()); }
  std::vector<T> read() const {
    std::vector<T> stored(static_cast<size_t>(count_));
    memory_.read(stored.data(), stored.size() * sizeof(T));
    return stored;
  }

 private:
  smoke::Memory memory_;
  int64_t count_;
};

class Layer {
 public:
  // `wants_all`: gradients of weights, biases and input too, and not of the states alone.
  Layer(const Shape& s, const Operands& o, bool wants_all) : s_(s) {
    const auto& w = o.layer.weights[0];
    Steps steps;
    steps.T = s.T;
    steps.N = s.N;
    steps.total = s.T * s.N;
    const int64_t I = s.I, H = s.H, row = s.N * H, gates = kShape.gates * H;
    f_.sizes = {kCell, I, H, H, 1, false};
    f_.steps = steps;
    f_.x = {put(o.layer.x), s.N * I, I};
    f_.h0 = {put(o.layer.h0), row, H};
    f_.weights[0] = {put(w.w_ih), put(w.w_hh), put(w.b_ih), put(w.b_hh), nullptr, I, H, 0};
    f_.y = {make("y", s.T * row), row, H};
    f_.hn = {make("h_n", row), row, H};
    if (kShape.saves_slots) f_.slots = make("", s.T * row * kShape.slots);
    b_.sizes = f_.sizes;
    b_.steps = steps;
    b_.dy = {put(o.incoming.y), row, H};
    b_.dhn = {put(o.incoming.hn), row, H};
    b_.dslots = make("", s.T * row * kShape.slots);
    b_.dh0 = {make("dh_0", row), row, H};
    if (kShape.cell_state) {
      f_.c0 = {put(o.layer.c0), row, H};
      f_.cn = {make("c_n", row), row, H};
      f_.cells = make("", s.T * row);
      b_.dcn = {put(o.incoming.cn), row, H};
      b_.dc0 = {make("dc_0", row), row, H};
    }
    if (wants_all) {
      b_.dx = {make("dx", s.T * s.N * I), s.N * I, I};
      b_.gradients[0] = {make("dW_ih", gates * I), make("dW_hh", gates * H), make("db_ih", gates),
                         make("db_hh", gates), nullptr};
    }
    b_.x = f_.x;
    b_.h0 = f_.h0;
    b_.c0 = f_.c0;
    b_.weights[0] = f_.weights[0];
    b_.y = {f_.y.data, f_.y.step, f_.y.row};
    b_.slots = f_.slots;
    b_.cells = f_.cells;
  }

  void forward() { run(f_); }
  void backward() { run(b_); }

  // The results of both passes, as they are stored.
  std::map<std::string, std::vector<T>> stored() const {
    smoke::wait();
    std::map<std::string, std::vector<T>> all;
    for (const auto& [name, tensor] : results_) all[name] = tensor->read();
    return all;
  }
  Named results() const {
    Named all;
    for (const auto& [name, numbers] : stored()) {
      for (T x : numbers) all[name].push_back(to_double(x));
    }
    return all;
  }

  std::string plan(bool backward) const {
    const cuda::Device& device = cuda::device(0);
    const cuda::Problem problem = {.sizes = f_.sizes,
                                   .T = s_.T,
                                   .N = s_.N,
                                   .numbers = cuda::numbers_of<T>(s_.tf32),
                                   .backward = backward,
                                   .has_library = cuda::has_library(),
                                   .inputs_are_saved = cuda::kSavesInputs<T> && f_.slots};
    return cuda::describe(cuda::plan_for(problem, device), problem, device);
  }

 private:
  T* put(const Vector& numbers) {
    tensors_.push_back(std::make_unique<Tensor>(numbers));
    return tensors_.back()->data();
  }
  T* make(const std::string& name, int64_t count) {
    tensors_.push_back(std::make_unique<Tensor>(count));
    if (!name.empty()) results_[name] = tensors_.back().get();
    return tensors_.back()->data();
  }
  template <typename Scan>
  void run(const Scan& scan) {
    const cuda::Call call = {0, nullptr, s_.tf32, false};
    const cuda::Device& device = cuda::device(0);
    gpu::Queue counts(call, device, nullptr, "");
    gpu::start<Cell>(scan, counts);
    if (!workspace_ || workspace_->bytes() < counts.bytes()) {
      smoke::wait();
      workspace_.reset();
      workspace_ = std::make_unique<smoke::Memory>(counts.bytes());
      workspace_->fill(0xff);
    }
    gpu::Queue runs(call, device, workspace_->data(), s_.name);
    if (!gpu::start<Cell>(scan, runs)) {
      throw std::runtime_error("the device refuses to run so many blocks at once");
    }
  }

  const Shape s_;
  Forward<T> f_;
  Backward<T> b_;
  std::vector<std::unique_ptr<Tensor>> tensors_;
  std::map<std::string, const Tensor*> results_;
  std::unique_ptr<smoke::Memory> workspace_;
};

// ---- The results, written as they come ----

class Report {
 public:
  Report(const char* path, const Shape& s) : path_(path), shape_(s) {}

  bool all_right = true;

  // `fields` are JSON without braces.
  void add(const std::string& tier, const std::string& fields) const {
    char sizes[160];
    std::snprintf(sizes, sizeof sizes, "\"T\": %lld, \"N\": %lld, \"I\": %lld, \"H\": %lld",
                  (long long)shape_.T, (long long)shape_.N, (long long)shape_.I,
                  (long long)shape_.H);
    const std::string type = shape_.tf32 ? "tf32" : Format<T>::kName;
    const std::string line =
        "{\"shape\": \"" + shape_.name + "\", \"cell\": \"" + Cell::kMode + "\", \"dtype\": \"" +
        type + "\", " + sizes + ", \"tier\": \"" + tier + "\", \"exchange\": \"" +
        (cuda::kExchangesByValue ? "values" : "flags") +
        "\", \"cublas\": " + (cuda::has_library() ? "true" : "false") + ", " + fields + "}\n";
    std::fputs(line.c_str(), stdout);
    std::fflush(stdout);
    std::FILE* const file = std::fopen(path_, "a");
    if (!file || std::fputs(line.c_str(), file) < 0 || std::fclose(file) != 0) {
      throw std::runtime_error(std::string("cannot write ") + path_);
    }
  }
  // A check that needs `name` and numbers; an infinite error is null.
  std::string found(const std::string& name, const Finding& f) {
    all_right = all_right && f.right();
    char text[200];
    char error[32] = "null";
    if (std::isfinite(f.error)) std::snprintf(error, sizeof error, "%.4g", f.error);
    std::snprintf(text, sizeof text,
                  "\"%s\": {\"right\": %s, \"worst\": \"%s\", \"error\": %s, \"limit\": %.4g}",
                  name.c_str(), f.right() ? "true" : "false", f.name.c_str(), error, f.limit);
    return text;
  }

 private:
  const char* path_;
  const Shape shape_;
};

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c < ' ' ? ' ' : c;
  }
  return out + "\"";
}

template <typename F>
double median_us(F work) {
  std::vector<double> samples;
  for (int i = 0; i < kWarmUps + kSamples; ++i) {
    smoke::Stopwatch watch;
    work();
    const double us = watch.us();
    if (i >= kWarmUps) samples.push_back(us);
  }
  std::sort(samples.begin(), samples.end());
  return samples[samples.size() / 2];
}

// Median microseconds a step, as fields.
std::string timed(const char* prefix, Layer& layer, int64_t steps) {
  const double forward = median_us([&] { layer.forward(); }) / double(steps);
  const double backward = median_us([&] { layer.backward(); }) / double(steps);
  char text[200];
  std::snprintf(text, sizeof text,
                "\"%sforward_us_per_step\": %.4g, \"%sbackward_us_per_step\": %.4g", prefix,
                forward, prefix, backward);
  return text;
}

Named first_outputs(const Named& all, int64_t count) {
  const Vector& y = all.at("y");
  return {{"y", Vector(y.begin(), y.begin() + count)}};
}

void run(const Shape& shape, Report& report) {
  const Operands whole = draw(shape);
  Shape few = shape;
  few.T = std::min(shape.T, kCheckedSteps);
  Operands first = whole;
  first.layer.x.resize(size_t(few.T * few.N * few.I));
  first.incoming.y.resize(size_t(few.T * few.N * few.H));
  const Named exact = evaluate<reference::Plain<double>>(few, first);
  const Named plain = evaluate<Loop>(few, first);

  Named of_other_tier;
  for (const std::string tier : {"resident", "stepwise"}) {
    setenv("RNNKERN_CUDA_TIER", tier.c_str(), 1);
    try {
      Layer checked(few, first, true);
      checked.forward();
      checked.backward();
      const Finding found = compare(checked.results(), plain, exact, shape.tf32);
      report.add(tier, report.found("first_steps", found) +
                           ", \"forward_plan\": " + quoted(checked.plan(false)) +
                           ", \"backward_plan\": " + quoted(checked.plan(true)));

      Layer layer(shape, whole, true);
      std::string times = timed("", layer, shape.T);
      {
        Shape narrow = shape;
        narrow.I = kFewInputs;
        Layer alone(narrow, draw(narrow), false);
        times += ", " + timed("scan_", alone, shape.T);
      }
      const auto once = layer.stored();
      layer.forward();
      layer.backward();
      const auto twice = layer.stored();
      Finding bits = {"all"};
      for (const auto& [name, numbers] : once) {
        if (std::memcmp(numbers.data(), twice.at(name).data(), numbers.size() * sizeof(T)) != 0) {
          bits = {name, INFINITY};
        }
      }
      const Named all = layer.results();
      const int64_t count = few.T * few.N * few.H;
      const Named y = first_outputs(exact, count);
      times += ", " + report.found("same_bits", bits);
      times += ", " +
               report.found("first_outputs", compare(first_outputs(all, count), y, y, shape.tf32));
      if (of_other_tier.empty()) {
        of_other_tier = all;
      } else {
        Finding agree = compare(all, of_other_tier, of_other_tier, shape.tf32);
        agree.limit *= 2;  // because both may be off
        times += ", " + report.found("tiers_agree", agree);
      }
      report.add(tier, times);
    } catch (const std::exception& error) {
      report.all_right = false;
      report.add(tier, "\"failed\": " + quoted(error.what()));
    }
  }
}

int main_of(int count, char** arguments) {
  if (count < 7) {
    std::fprintf(stderr, "usage: %s FILE NAME T N I H [tf32]\n", arguments[0]);
    return 2;
  }
  const auto number = [&](int i) { return int64_t(std::atoll(arguments[i])); };
  const Shape shape = {arguments[2], number(3), number(4), number(5), number(6), count > 7};
  Report report(arguments[1], shape);
  smoke::load_cublas();
  run(shape, report);
  return report.all_right ? 0 : 1;
}

}  // namespace
}  // namespace rnnkern

int main(int count, char** arguments) {
  try {
    return rnnkern::main_of(count, arguments);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
