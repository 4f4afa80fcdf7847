// What every measurement needs: checked calls, timing, a status word on the device, and results
// that are written as they come. Each group of measurements runs in a process of its own, so that a
// hang, or an error that ends a CUDA context, costs that group alone.
#pragma once

#include <cuda_runtime.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

namespace gpubench {

constexpr int kSamples = 5;
constexpr int kWarmUps = 2;
constexpr unsigned kGroupSeconds = 60;

// What a kernel writes to the status word.
enum Status : int { kNoError = 0, kTimedOut = 1, kWrongResult = 2, kNotBuilt = 3 };
// The first error counts, because after a wait has timed out the result is wrong as well.
__device__ inline void report_once(int* status, Status what) { atomicCAS(status, kNoError, what); }

inline void check(cudaError_t error, std::source_location at = std::source_location::current()) {
  if (error == cudaSuccess) return;
  throw std::runtime_error("line " + std::to_string(at.line()) + ": " + cudaGetErrorName(error) +
                           ", " + cudaGetErrorString(error));
}
// For destructors, which must not throw.
inline void report_error(cudaError_t error, const char* what) {
  if (error != cudaSuccess) std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
}

template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t count) : bytes_(count * sizeof(T)) {
    check(cudaMalloc(reinterpret_cast<void**>(&data_), bytes_));
  }
  ~Buffer() { report_error(cudaFree(data_), "cudaFree"); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  T* data_ = nullptr;
  size_t bytes_;
};

class Event {
 public:
  Event() { check(cudaEventCreate(&event_)); }
  ~Event() { report_error(cudaEventDestroy(event_), "cudaEventDestroy"); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

inline std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c < ' ' ? ' ' : c;
  }
  return out + "\"";
}

// "_8", "_8_warps". Appended, because GCC 12 has a spurious warning about operator+ here.
inline std::string suffix_of(long long number, const char* unit = "") {
  std::string text = "_";
  text += std::to_string(number);
  text += unit;
  return text;
}

template <typename T>
T median(std::vector<T> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

inline std::string failure(const std::string& name, const std::string& why) {
  return "{\"name\": " + quoted(name) + ", \"why\": " + quoted(why) + "}";
}

// Lines are shorter than PIPE_BUF, so each is written whole or not at all.
inline void send_line(int out, char kind, const std::string& json) {
  std::fflush(stdout);
  const std::string line = kind + json + "\n";
  if (write(out, line.data(), line.size()) != ssize_t(line.size())) {
    throw std::runtime_error("the results have no reader");
  }
}

// What one group measures with: the device, a stream, the status word, and where results go.
class Bench {
 public:
  explicit Bench(int out) : out_(out), status_(1), cycles_(kMostBlocks) {
    check(cudaGetDevice(&device_));
    check(cudaGetDeviceProperties(&properties, device_));
    check(cudaStreamCreate(&stream));
    clear_status();
  }
  ~Bench() { report_error(cudaStreamDestroy(stream), "cudaStreamDestroy"); }
  Bench(const Bench&) = delete;
  Bench& operator=(const Bench&) = delete;

  // Runs `value` and reports what it returns, or why it could not.
  void measure(const std::string& name, const std::string& unit, const std::string& how,
               const std::function<double()>& value) {
    try {
      clear_status();
      const double result = value();
      verify();
      add(name, result, unit, how);
    } catch (const std::exception& error) {
      fail(name, error.what());
    }
  }
  void add(const std::string& name, double value, const std::string& unit, const std::string& how) {
    if (!std::isfinite(value)) return fail(name, "not a finite number");
    std::printf("%-60s %12.4f %s\n", name.c_str(), value, unit.c_str());
    char number[32];
    std::snprintf(number, sizeof number, "%.6g", value);
    send('+', "{\"name\": " + quoted(name) + ", \"value\": " + number +
                  ", \"unit\": " + quoted(unit) + ", \"how\": " + quoted(how) + "}");
  }
  void fail(const std::string& name, const std::string& why) {
    std::printf("%-60s FAILED %s\n", name.c_str(), why.c_str());
    send('-', failure(name, why));
  }

  // Median time of what `launch` starts on the stream; `prepare` runs before each, untimed.
  double median_us(
      const std::function<void()>& launch, const std::function<void()>& prepare = [] {}) {
    const Event start, stop;
    std::vector<double> samples;
    for (int i = 0; i < kWarmUps + kSamples; ++i) {
      prepare();
      check(cudaEventRecord(start.get(), stream));
      launch();
      check(cudaGetLastError());
      check(cudaEventRecord(stop.get(), stream));
      check(cudaEventSynchronize(stop.get()));
      float ms = 0;
      check(cudaEventElapsedTime(&ms, start.get(), stop.get()));
      if (i >= kWarmUps) samples.push_back(1e3 * ms);
      verify();  // a kernel that has timed out must not run seven times
    }
    return median(samples);
  }
  // Clock ticks that the median block of the last launch took.
  double median_cycles(int blocks) {
    std::vector<long long> ticks(static_cast<size_t>(blocks));
    check(cudaMemcpy(ticks.data(), cycles_.get(), ticks.size() * sizeof(long long),
                     cudaMemcpyDeviceToHost));
    return double(median(ticks));
  }

  void verify() {
    int status = kNoError;
    check(cudaMemcpyAsync(&status, status_.get(), sizeof status, cudaMemcpyDeviceToHost, stream));
    check(cudaStreamSynchronize(stream));
    if (status == kTimedOut) throw std::runtime_error("a wait on the GPU took too long");
    if (status == kWrongResult) throw std::runtime_error("the kernel's result is wrong");
    if (status == kNotBuilt) throw std::runtime_error("not built for this architecture");
  }

  int* status() { return status_.get(); }
  long long* cycles() { return cycles_.get(); }
  int multiprocessors() const { return properties.multiProcessorCount; }
  // So much dynamic shared memory that only one block fits on a multiprocessor; at least `needed`.
  size_t whole_multiprocessor(size_t needed) const {
    return std::max(needed, properties.sharedMemPerMultiprocessor / 2 + 1024);
  }
  template <typename Kernel>
  void allow_shared(Kernel* kernel, size_t bytes) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  }
  // All blocks run at once, or the launch is refused.
  template <typename Arguments>
  void launch_cooperative(void (*kernel)(Arguments), int blocks, int threads, size_t shared,
                          Arguments arguments) {
    void* parameters[] = {&arguments};
    check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)),
                                      dim3(unsigned(threads)), parameters, shared, stream));
  }

  void send(char kind, const std::string& json) { send_line(out_, kind, json); }

  cudaStream_t stream = nullptr;
  cudaDeviceProp properties = {};

 private:
  static constexpr size_t kMostBlocks = 4096;
  void clear_status() { check(cudaMemset(status_.get(), 0, sizeof(int))); }

  int out_;
  int device_ = 0;
  Buffer<int> status_;
  Buffer<long long> cycles_;
};

struct GroupOfMeasurements {
  const char* name;
  void (*run)(Bench&);
};

// The parent's side: it never touches CUDA, collects what the groups send and rewrites the file.
class Collector {
 public:
  explicit Collector(const char* path) : path_(path) {}

  void run(const GroupOfMeasurements& group) {
    int ends[2];
    if (pipe(ends) != 0) throw std::runtime_error("pipe failed");
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child < 0) throw std::runtime_error("fork failed");
    if (child == 0) {
      close(ends[0]);
      alarm(kGroupSeconds);
      try {
        Bench bench(ends[1]);
        group.run(bench);
      } catch (const std::exception& error) {
        std::printf("%-60s FAILED %s\n", group.name, error.what());
        send_line(ends[1], '-', failure(group.name, error.what()));
      }
      std::fflush(nullptr);
      _exit(0);
    }
    close(ends[1]);
    std::FILE* in = fdopen(ends[0], "r");
    if (!in) throw std::runtime_error("fdopen failed");
    char* line = nullptr;
    size_t room = 0;
    for (ssize_t length; (length = getline(&line, &room, in)) > 1;) {
      lists_[line[0]].emplace_back(line + 1, size_t(length) - 2);
      write_file();
    }
    std::free(line);
    std::fclose(in);
    int status = 0;
    waitpid(child, &status, 0);
    if (status != 0) {
      const std::string why = WIFSIGNALED(status)
                                  ? "ended by signal " + std::to_string(WTERMSIG(status))
                                  : "ended early";
      std::printf("%-60s FAILED %s\n", group.name, why.c_str());
      lists_['-'].push_back(failure(group.name, why));
    }
    write_file();
  }
  bool failed() const { return lists_.count('-') != 0; }

 private:
  // Whole and then renamed: a reader never sees half a file.
  void write_file() const {
    const std::string draft = path_ + ".part";
    std::FILE* file = std::fopen(draft.c_str(), "w");
    if (!file) throw std::runtime_error("cannot write " + draft);
    const auto device = lists_.find('=');
    std::fprintf(file, "{\n \"device\": %s",
                 device == lists_.end() ? "null" : device->second.back().c_str());
    for (const auto& [kind, name] : {std::pair('+', "constants"), {'-', "failed"}}) {
      std::fprintf(file, ",\n \"%s\": [", name);
      const auto found = lists_.find(kind);
      for (size_t i = 0; found != lists_.end() && i < found->second.size(); ++i) {
        std::fprintf(file, "%s\n  %s", i ? "," : "", found->second[i].c_str());
      }
      std::fprintf(file, "\n ]");
    }
    std::fprintf(file, "\n}\n");
    if (std::fclose(file) != 0 || std::rename(draft.c_str(), path_.c_str()) != 0) {
      throw std::runtime_error("cannot write " + path_);
    }
  }

  std::string path_;
  std::map<char, std::vector<std::string>> lists_;
};

}  // namespace gpubench
