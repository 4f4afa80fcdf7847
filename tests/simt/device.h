// The device of the stand-in for a GPU, and the functions of csrc/cuda/device.h for it. Each
// program has one source that includes this.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda/device.h"
#include "simt.h"

namespace rnnkern::cuda {

// RNNKERN_SIMT_DEVICE=MULTIPROCESSORS,BYTES names another one, and with ,MAJOR,MINOR its kind. Few
// multiprocessors, of an odd number, and little shared memory, so that small layers are split in
// every way.
const Device& device(int) {
  static Device stand_in;
  const char* const named = std::getenv("RNNKERN_SIMT_DEVICE");
  int multiprocessors = 13, major = 0, minor = 0;
  long long bytes = 20 << 10;
  if (named) std::sscanf(named, "%d,%lld,%d,%d", &multiprocessors, &bytes, &major, &minor);
  stand_in = major ? device_of_kind(major, minor) : Device{};
  stand_in.multiprocessors = multiprocessors;
  stand_in.blocks_at_once = blocks_of(stand_in.multiprocessors);
  stand_in.shared_bytes = bytes;
  return stand_in;
}
Current::Current(int device) : before_(device), device_(device) {}
Current::~Current() = default;

// A lane is one number, of which there are as many as streams have been taken.
Lane take_lane(int) {
  static thread_local uintptr_t taken = 0;
  void* const lane = reinterpret_cast<void*>(++taken);
  return {lane, lane};
}
void give_back_lane(int, Lane lane, void* main) { order(lane.stream, main, lane.event); }
void order(void* from, void* to, void* event) {
  if (!simt::left_out(to == event ? "wait_for_main" : "main_waits")) {
    simt::streams().order(from, to);
  }
}

void clear(char* memory, size_t bytes, void* stream) {
  simt::streams().add(stream, [=] { std::memset(memory, 0, bytes); });
}
int* place_to_give_up(const std::string&) { return nullptr; }
std::string with_who_gave_up(const std::string& message) { return message; }

}  // namespace rnnkern::cuda
