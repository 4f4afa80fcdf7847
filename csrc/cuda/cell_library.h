// The contract between the extension and the CUDA library of a cell that a user has written: what
// cpu/library.h is for the CPU. A library has the kernels of one cell for one element type, the
// code that lays them out and launches them (scan.cu), and a CUDA runtime of its own. It asks the
// extension for what a process has only once: plans, cuBLAS and its lock, our own products,
// streams, and the record of kernels that have given up. Both sides may come from different
// compilers. So plain data and functions cross, and no exception does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <stdexcept>

#include "cuda/device.h"
#include "cuda/library.h"
#include "cuda/plan.h"
#include "cuda/queue.h"

#ifdef RNNKERN_SIMT
#include "simt.h"
#endif

namespace rnnkern::cuda {

// The text of an exception, whose end may be cut off.
struct Message {
  char text[1024] = "";

  void write(const char* what) { std::snprintf(text, sizeof text, "%s", what); }
};
// Calls f, and keeps the text of what it throws. Returns whether it has thrown nothing.
template <typename F>
bool caught(Message* message, F f) noexcept {
  try {
    f();
    return true;
  } catch (const std::exception& error) {
    message->write(error.what());
  } catch (...) {
    message->write("an unknown exception");
  }
  return false;
}
// Throws on this side what was caught on the other side.
inline void expect(bool is_done, const Message& message) {
  if (!is_done) throw std::runtime_error(message.text);
}

// What a library calls: the functions of device.h, library.h, plan.h and product.h that scan.cu and
// queue.h need. Functions with a message return false if they fail.
struct Host {
  void (*plan_for)(const Problem*, const Device*, Plan*);
  int64_t (*window_steps)(int64_t T, int64_t bytes_of_step, int buffers);
  bool (*has_library)();
  size_t (*library_bytes)();
  bool (*begin_products)(int device, void* stream, char* workspace, void** products, Message*);
  bool (*multiply)(void* products, const Product*, bool tf32, Message*);
  void (*end_products)(void* products);
  bool (*start_product)(const Attempt*, const Product*, Message*);  // by Product::operands
  bool (*take_lane)(int device, Lane*, Message*);
  void (*give_back_lane)(int device, Lane, void* main);
  bool (*order)(void* from, void* to, void* event, Message*);
  bool (*clear)(char* memory, size_t bytes, void* stream, Message*);
  int* (*place_to_give_up)(const char* kernel);
  void (*with_who_gave_up)(const char* message, Message* whole);
#ifdef RNNKERN_SIMT
  simt::Streams& (*streams)();
#endif
};

// The result of `start` in start.h: kTooManyBlocks is its false.
enum class Started : int { kYes, kTooManyBlocks, kFailed };

// Does what `start` does, for a Queue that it makes of the attempt, and gives the bytes of the
// Queue.
template <typename Scan>
using StartScan = Started (*)(const Scan*, const Attempt*, size_t* bytes, Message*);

template <typename T>
struct CellLibrary {
  const char* headers;  // their digest: first, because the rest means something only if it fits
  const char* mode;
  const char* element;
  void (*connect)(const Host*);  // called once, before the others
  StartScan<Forward<T>> forward;
  StartScan<Backward<T>> backward;
  StartScan<SecondOrder<T>> second_order;  // not of narrow T
};

// What a library exports: a function that returns a pointer to its CellLibrary.
constexpr const char* kEntryOfLibrary = "rnnkern_cuda_cell_library";

}  // namespace rnnkern::cuda
