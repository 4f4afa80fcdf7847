// What instructions of PTX mean, for the C++ that translate.py writes: on the fibers of
// tests/simt/simt.h, from the PTX ISA alone. The names of its types are those of PTX.
#pragma once

#include <cxxabi.h>
#include <fenv.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "memory.h"
#include "simt.h"

namespace ptx {

using pred = bool;
using b8 = uint8_t;
using b16 = uint16_t;
using b32 = uint32_t;
using b64 = uint64_t;
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;

template <typename To, typename From>
inline To bits(From from) {
  return std::bit_cast<To>(from);
}

// Arithmetic for which C++ has no operator.

// Of .ftz: denormal numbers are zero, as operands and as results.
inline f32 flushed(f32 x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

template <typename X>
inline X shift_left(X x, u32 count) {
  return count >= sizeof(X) * 8 ? X(0) : X(x << count);
}
template <typename X>
inline X shift_right(X x, u32 count) {
  return X(x >> (count < sizeof(X) * 8 ? count : sizeof(X) * 8 - 1) >> (count >= sizeof(X) * 8));
}
// Bits [begin, begin + count) of `to` are the first ones of x.
template <typename X>
inline X bits_inserted(X x, X to, u32 begin, u32 count) {
  begin &= 0xff, count &= 0xff;
  const X mask = shift_left<X>(shift_left<X>(X(1), count) - 1, begin);
  return X((to & ~mask) | (shift_left<X>(x, begin) & mask));
}
// By zero: what the ISA leaves open, all bits set.
template <typename X>
inline X quotient(X a, X b) {
  if (b == 0) return X(-1);
  return std::is_signed_v<X> && b == X(-1) ? X(0 - std::make_unsigned_t<X>(a)) : X(a / b);
}
template <typename X>
inline X remainder(X a, X b) {
  if (b == 0) return a;
  return std::is_signed_v<X> && b == X(-1) ? X(0) : X(a % b);
}
template <typename X>
inline X least(X a, X b) {
  return a < b || b != b ? a : b;
}
template <typename X>
inline X greatest(X a, X b) {
  return a > b || b != b ? a : b;
}
// .NaN: NaN if one of them is.
template <typename X>
inline X least_or_nan(X a, X b) {
  return a != a || b != b ? X(NAN) : least(a, b);
}
template <typename X>
inline X greatest_or_nan(X a, X b) {
  return a != a || b != b ? X(NAN) : greatest(a, b);
}
template <typename X>
inline bool is_ordered(X a, X b) {
  return a == a && b == b;
}
// .approx: the result is up to one unit in the last place off, and here always is.
inline f32 approximate(f32 x) {
  return std::isfinite(x) && x != 0 ? bits<f32>(bits<u32>(x) ^ 1u) : x;
}
inline b32 to_tf32(f32 x) {
  const u32 word = bits<u32>(x);
  if (x != x) return 0x7fffffffu;
  return std::isinf(x) ? word : (word + 0x1000u) & ~0x1fffu;  // ties away from zero
}

// Numbers in the words of tensor cores' operands: of each E so many, as float.
struct Bf16 {
  static constexpr int kPerWord = 2;
  static f32 number(b32 word, int i) { return bits<f32>(word >> 16 * i << 16); }
};
struct F16 {
  static constexpr int kPerWord = 2;
  static f32 number(b32 word, int i) {
    const u32 half = word >> 16 * i & 0xffffu, exponent = half >> 10 & 31, mantissa = half & 1023;
    f32 x = std::ldexp(f32(mantissa | (exponent ? 1024 : 0)), int(exponent ? exponent : 1) - 25);
    if (exponent == 31) x = mantissa ? NAN : INFINITY;
    return half >> 15 ? -x : x;
  }
};
struct Tf32 {
  static constexpr int kPerWord = 1;
  static f32 number(b32 word, int) { return bits<f32>(word & ~0x1fffu); }
};

// To the nearest, ties to even. Too large is infinite, and there is one NaN.
inline b16 to_bf16(f32 x) {
  const u32 word = bits<u32>(x);
  return x != x ? 0x7fff : b16((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
inline b16 to_f16(f32 x) {
  const u32 sign = bits<u32>(x) >> 16 & 0x8000;
  const f32 size = std::fabs(x);
  if (x != x) return 0x7fff;
  if (size >= 65520) return b16(sign | 0x7c00);
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  const u32 units = u32(std::nearbyint(std::ldexp(size, 10 - exponent)));  // of the last place
  return b16(sign | (u32(exponent + 14) * 1024 + units));
}

// What a lane has of a product of 16 rows and 8 columns: fragments of a, b and the sums. `line` is
// the instruction's, which all lanes of the warp must have in common.
struct Fragments {
  int line;
  b32 a[4], b[2];
  f32 c[4];
};

struct Shuffled {
  int line;
  b32 value, result;
  u32 source;  // lane
};

// RNNKERN_SIMT_WEAK=1: global memory is that of memory.h.
inline bool is_weak = false;

// A fiber as a thread of PTX.
class Thread {
 public:
  Thread(const void* parameters, simt::Launch& launch)
      : parameters_(reinterpret_cast<u64>(parameters)),
        launch_(launch),
        fiber_(launch.fiber()),
        block_(*fiber_.block),
        tid(fiber_.thread.x) {
    fesetenv(FE_DFL_ENV);  // denormal numbers stay, but for .ftz
    if (is_weak && !block_.memory) block_.memory = std::make_shared<WeakMemory>();
  }
  Thread(const Thread&) = delete;
  ~Thread() {
    if (is_weak && memory().arrive_all()) launch_.progress_later();
  }

 private:
  const u64 parameters_;
  simt::Launch& launch_;
  simt::Fiber& fiber_;
  simt::Block& block_;

 public:
  const u32 tid;
  u32 ntid() const { return launch_.block.x; }
  u32 ctaid() const { return block_.index.x; }
  u32 nctaid() const { return launch_.grid.x; }

  u64 parameters() const { return parameters_; }
  // From addresses of shared memory to generic ones, and back.
  u64 generic(u64 shared) const { return reinterpret_cast<u64>(block_.shared.data()) + shared; }
  u64 shared(u64 generic) const { return generic - reinterpret_cast<u64>(block_.shared.data()); }

  // Memory: V is a std::array of a number or of two or four. Generic addresses of shared memory are
  // found by where they point to.
  template <typename V>
  V load_param(u64 address) const {
    return read<V>(address);
  }
  template <typename V>
  V load_shared(u64 address) const {
    return read<V>(in_shared<V>(address));
  }
  template <typename V>
  V load(u64 address) const {
    if (!is_in_weak_memory(address)) return read<V>(address);
    return with_weak<V>(address, &WeakMemory::load);
  }
  template <typename V>
  V load_l2(u64 address) const {
    if (!is_in_weak_memory(address)) return read<V>(address);
    return with_weak<V>(address, &WeakMemory::load_from_l2);
  }
  // What others may be about to store.
  template <typename V>
  V load_relaxed(u64 address) {
    if (is_weak && memory().look()) launch_.progress_later();
    if (fiber_.waits_at(address)) launch_.park();
    return load_l2<V>(address);
  }
  template <typename V>
  V load_acquire(u64 address) {
    const V loaded = load_relaxed<V>(address);
    fence_acquire();
    return loaded;
  }

  template <typename V>
  void store_shared(u64 address, V value) {
    write(in_shared<V>(address), value);
  }
  template <typename V>
  void store(u64 address, V value) {
    if (!is_in_weak_memory(address)) return write(address, value);
    memory().store(pointer<V>(address), &value, sizeof value);
  }
  template <typename V>
  void store_relaxed(u64 address, V value) {
    if (is_in_weak_memory(address)) {
      memory().store_relaxed(pointer<V>(address), &value, sizeof value);
    } else {
      write(address, value);
    }
    launch_.progress_later();
  }
  template <typename V>
  void store_release(u64 address, V value) {
    fence_release();
    if (is_in_weak_memory(address)) {
      memory().store_to_l2(pointer<V>(address), &value, sizeof value);
    } else {
      write(address, value);
    }
    launch_.progress();
  }

  void fence_acquire() {
    if (is_weak) memory().acquire();
  }
  void fence_release() {
    if (is_weak) memory().release();
  }

  void bar_sync() { launch_.meet(block_.barrier); }
  void bar_warp_sync(int line, u32 mask) {
    want_all(mask);
    struct Own {
      int line;
    } own = {line};
    meet(own, [](auto) {});
  }
  b32 shfl_idx(int line, b32 value, u32 source, u32 clamp, u32 mask) {
    want_all(mask);
    if (clamp != 31) throw std::runtime_error("ptx: shfl within parts of a warp");
    Shuffled own = {line, value, 0, source % simt::kWarp};
    meet(own, [](auto lanes) {
      for (u32 i = 0; i < simt::kWarp; ++i) lanes(i).result = lanes(lanes(i).source).value;
    });
    return own.result;
  }
  b32 shfl_bfly(int line, b32 value, u32 lane_mask, u32 clamp, u32 mask) {
    return shfl_idx(line, value, tid ^ lane_mask, clamp, mask);
  }

  bool vote_any(int line, bool value, u32 mask) {
    want_all(mask);
    struct Own {
      int line;
      bool value;
    } own = {line, value};
    meet(own, [](auto lanes) {
      bool any = false;
      for (u32 i = 0; i < simt::kWarp; ++i) any |= lanes(i).value;
      for (u32 i = 0; i < simt::kWarp; ++i) lanes(i).value = any;
    });
    return own.value;
  }

  // c += a b, by the tables of the ISA. Lane 4 g + q has of a rows g (words 0, 2) and g + 8 (1, 3),
  // of b column g, along k from q kPerWord on (words of a 0, 1 and of b 0) and half of k further
  // (2, 3 and 1); of c rows g (0, 1) and g + 8 (2, 3), columns 2 q and 2 q + 1.
  template <typename E>
  void mma(Fragments& own) {
    meet(own, [](auto lanes) {
      constexpr int kHalf = 4 * E::kPerWord, kDepth = 2 * kHalf;
      f32 a[16][kDepth], b[8][kDepth];
      for (int lane = 0; lane < simt::kWarp; ++lane) {
        const Fragments& of = lanes(lane);
        for (int i = 0; i < E::kPerWord; ++i) {
          const int g = lane / 4, k = lane % 4 * E::kPerWord + i;
          for (int word = 0; word < 4; ++word) {
            a[g + word % 2 * 8][k + word / 2 * kHalf] = E::number(of.a[word], i);
          }
          for (int word = 0; word < 2; ++word) b[g][k + word * kHalf] = E::number(of.b[word], i);
        }
      }
      for (int lane = 0; lane < simt::kWarp; ++lane) {
        for (int i = 0; i < 4; ++i) {
          const int m = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
          f64 sum = 0;  // products are exact in it
          for (int k = 0; k < kDepth; ++k) sum += f64(a[m][k]) * b[n][k];
          lanes(lane).c[i] = f32(lanes(lane).c[i] + sum);
        }
      }
    });
  }

  [[noreturn]] void trap() const { throw std::runtime_error("ptx: a thread has trapped"); }

 private:
  WeakMemory& memory() const { return *static_cast<WeakMemory*>(block_.memory.get()); }

  bool is_in_weak_memory(u64 address) const {
    return is_weak && shared(address) >= block_.shared.size();
  }
  template <typename V>
  u64 in_shared(u64 address) const {
    if (address + sizeof(V) > block_.shared.size()) {
      throw std::runtime_error("ptx: an access to byte " + std::to_string(address) + " of " +
                               std::to_string(block_.shared.size()) + " of shared memory");
    }
    return generic(address);
  }
  template <typename V>
  static void* pointer(u64 address) {
    if (address % sizeof(V)) {
      throw std::runtime_error("ptx: " + std::to_string(sizeof(V)) +
                               " bytes are accessed at an address that is no multiple of it");
    }
    return reinterpret_cast<void*>(address);
  }
  template <typename V>
  static V read(u64 address) {
    V value;
    std::memcpy(&value, pointer<V>(address), sizeof value);
    return value;
  }
  template <typename V>
  static void write(u64 address, V value) {
    std::memcpy(pointer<V>(address), &value, sizeof value);
  }
  template <typename V, typename Load>
  V with_weak(u64 address, Load load) const {
    V value;
    (memory().*load)(&value, pointer<V>(address), sizeof value);
    return value;
  }

  static void want_all(u32 mask) {
    if (mask != ~0u) throw std::runtime_error("ptx: a collective of a part of a warp");
  }
  // f(lanes) once, in the last lane that comes; lanes(i) is what lane i has brought.
  template <typename Own, typename F>
  void meet(Own& own, F f) {
    simt::Warp& warp = block_.warps[tid / simt::kWarp];
    warp.values[tid % simt::kWarp] = reinterpret_cast<uintptr_t>(&own);
    if (int(warp.meeting.waiting.size()) + 1 == warp.meeting.members) {
      const auto lanes = [&](u32 lane) -> Own& {
        return *reinterpret_cast<Own*>(warp.values[lane]);
      };
      for (u32 lane = 0; lane < simt::kWarp; ++lane) {
        if (lanes(lane).line == own.line) continue;
        throw std::runtime_error("ptx: lanes of a warp meet at different instructions");
      }
      f(lanes);
    }
    launch_.meet(warp.meeting);
  }
};

// A kernel, by the name that its entry has in PTX.
struct Kernel {
  const char* entry;
  size_t parameter_bytes;
  simt::Body body;
  int64_t launches = 0;
};

// `run_kernel<...>` without what compilers write differently: spaces, and zeros that end a value.
inline std::string plain(const char* mangled) {
  int status = 0;
  char* const demangled = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  std::string name = demangled ? demangled : mangled;
  std::free(demangled);
  name.erase(std::remove(name.begin(), name.end(), ' '), name.end());
  for (size_t at; (at = name.find(",0}")) != name.npos;) name.erase(at, 2);
  const std::string before = "run_kernel<", after = ">(";
  const size_t begin = name.find(before);
  if (begin == name.npos) return name;
  return name.substr(begin + before.size(), name.find(after) - begin - before.size());
}

// The kernels of a library.
class Kernels {
 public:
  Kernels(std::initializer_list<Kernel> kernels) : kernels_(kernels) {}

  // The kernel of that C++ class, to be launched, or null.
  simt::Body launch(const char* type, size_t argument_bytes) {
    const char* const weak = std::getenv("RNNKERN_SIMT_WEAK");
    is_weak = weak && std::string(weak) == "1";
    const std::string wanted = plain(type);
    for (Kernel& kernel : kernels_) {
      if (plain(kernel.entry) != wanted) continue;
      if (kernel.parameter_bytes != argument_bytes) {
        throw std::runtime_error(
            "ptx: " + wanted + " has " + std::to_string(kernel.parameter_bytes) +
            " bytes of parameters, and is given " + std::to_string(argument_bytes));
      }
      ++kernel.launches;
      return kernel.body;
    }
    return nullptr;
  }

  int64_t launches(const char* entry) const {
    for (const Kernel& kernel : kernels_) {
      if (std::string(kernel.entry) == entry) return kernel.launches;
    }
    return -1;
  }

 private:
  std::vector<Kernel> kernels_;
};

}  // namespace ptx

// What a library offers: to simt::body_of, and to tests of their own.
extern ptx::Kernels kernels;
extern "C" simt::Body find_kernel(const char* type, size_t argument_bytes) {
  return kernels.launch(type, argument_bytes);
}
extern "C" int64_t launches_of_kernel(const char* entry) { return kernels.launches(entry); }

// Launches a kernel; what went wrong, or an empty string.
extern "C" const char* run_kernel(const char* entry, const void* parameters, size_t bytes,
                                  unsigned blocks, unsigned threads, size_t shared_bytes,
                                  unsigned seed) {
  static std::string problem;
  problem = "no such kernel";
  try {
    if (const simt::Body body = kernels.launch(entry, bytes)) {
      simt::Launch(
          {blocks}, {threads}, shared_bytes, [=] { body(parameters, simt::launch()); }, seed)
          .run();
      problem.clear();
    }
  } catch (const std::exception& error) {
    problem = error.what();
  }
  return problem.c_str();
}
