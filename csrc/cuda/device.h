// The devices of this machine.
#pragma once

#include <cstddef>
#include <string>

#include "cuda/plan.h"

namespace rnnkern::cuda {

// The device of this machine with that number. Throws std::runtime_error if it does not answer.
const Device& device(int id);

// Makes a device the current one for a while.
class Current {
 public:
  explicit Current(int device);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int before_, device_;
};

// A stream, and an event that says how far it or another one is.
struct Lane {
  void *stream = nullptr, *event = nullptr;
};
// Takes a stream for the caller alone, until it is given back. Then `main` waits for what is queued
// in it.
Lane take_lane(int device);
void give_back_lane(int device, Lane lane, void* main);
// What is queued in `to` from now on waits for what was queued in `from` before.
void order(void* from, void* to, void* event);

// A second stream beside `main`, the stream of a call. No other call has it while this object
// lives.
class SideStream {
 public:
  SideStream(int device, void* main) : device_(device), main_(main), lane_(take_lane(device)) {}
  ~SideStream() { give_back_lane(device_, lane_, main_); }
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;

  void* stream() const { return lane_.stream; }
  // What is queued here from now on waits for what was queued in main before.
  void wait_for_main() { order(main_, lane_.stream, lane_.event); }
  // The other way round.
  void main_waits() { order(lane_.stream, main_, lane_.event); }

 private:
  const int device_;
  void* const main_;
  const Lane lane_;
};

// Queues the writing of zeros.
void clear(char* memory, size_t bytes, void* stream);

// The number that a kernel of that name sets if a block has waited too long for another one, before
// it ends the launch with an error. It is in the host's memory, because that outlives the error.
// Null if there is none.
int* place_to_give_up(const std::string& kernel);
// The message of an error, and which kernel has given up before, if one has.
std::string with_who_gave_up(const std::string& message);

}  // namespace rnnkern::cuda
