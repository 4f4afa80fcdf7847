// The entry points of one instruction set, compiled from the same source each, and the choice among
// them.
#pragma once

#include <cstddef>
#include <string>
#include <tuple>
#include <vector>

#include "plan.h"
#include "scan.h"

namespace rnnkern {

struct Workspace {
  char* data;
  size_t bytes;
};

// The kernels for tensors of T. Given enough workspace they run and return 0; else they do nothing
// and return the bytes they need.
template <typename T>
struct Kernels {
  size_t (*forward)(const Forward<T>&, const Plan&, Workspace);
  size_t (*backward)(const Backward<T>&, const Plan&, Workspace);
  // With a plan of the forward and one of the backward pass; null where T is narrow.
  size_t (*second_order)(const SecondOrder<T>&, const Plan&, const Plan&, Workspace);
  Machine machine;  // what the plan must know of this code
};

// Those for F32ByBf16 are null where the CPU does not multiply bfloat16.
using AllKernels =
    std::tuple<Kernels<float>, Kernels<double>, Kernels<Bf16>, Kernels<F16>, Kernels<F32ByBf16>>;

struct InstructionSet {
  const char* name;
  bool (*supported)();
  AllKernels (*kernels)();
};

// Compiled in, best first.
const std::vector<InstructionSet>& instruction_sets();

// The one in use: the best that the CPU has, or the one named by RNNKERN_ISA. Throws
// std::runtime_error for a name that is unknown or that the CPU lacks, and if the CPU has none of
// those compiled in.
const InstructionSet& instruction_set();

// Throws std::runtime_error if an environment variable has a value that no call can use.
void check_environment();

// One call: plans, allocates the workspace, runs.
template <typename T>
void run(const Forward<T>& scan, int threads, bool deterministic);
template <typename T>
void run(const Backward<T>& scan, int threads, bool deterministic);
template <typename T>
void run(const SecondOrder<T>& scan, int threads, bool deterministic);

const AllKernels& kernels_in_use();

template <typename T>
bool has_kernels() {
  return std::get<Kernels<T>>(kernels_in_use()).forward;
}

template <typename T>
Machine machine_for(int threads);

}  // namespace rnnkern
