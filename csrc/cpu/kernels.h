// The entry points of one instruction set, and the choice among instruction sets. All of them are
// compiled from the same source.
#pragma once

#include <cstddef>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/library.h"
#include "plan.h"
#include "scan.h"

namespace rnnkern {

struct Workspace {
  char* data;
  size_t bytes;
};

// The kernels for tensors of T. If the workspace is large enough, they run and return 0. If not,
// they do nothing and return the bytes that they need.
template <typename T>
struct Kernels {
  size_t (*forward)(const Forward<T>&, const Plan&, Workspace);
  size_t (*backward)(const Backward<T>&, const Plan&, Workspace);
  // With a plan of the forward and one of the backward pass. Null unless T is float or double.
  size_t (*second_order)(const SecondOrder<T>&, const Plan&, const Plan&, Workspace);
  // Forward with weights that `pack` has packed.
  size_t (*frozen)(const Forward<T>&, const Plan&, Workspace);
  // Packs the weights of all directions of a layer into memory, which is aligned to a cache line,
  // for `frozen`. Returns the bytes that they take. If memory is null, it does only that.
  size_t (*pack)(const Sizes&, const Weights<T>* weights, char* memory);
  // The inverse, without biases. Integers are written without their scales.
  void (*unpack)(const Sizes&, const char* memory, const Matrices<Compute<T>>* to);
  Machine machine;  // what the plan needs to know about this code
};

// Some are null. F32ByI8 has only `frozen`, `pack` and `unpack`; so has F32ByBf16 if the CPU does
// not multiply bfloat16. F32By3Bf16 has none without AMX.
using AllKernels = std::tuple<Kernels<float>, Kernels<double>, Kernels<Bf16>, Kernels<F16>,
                              Kernels<F32ByBf16>, Kernels<F32By3Bf16>, Kernels<F32ByI8>>;

struct InstructionSet {
  const char* name;
  bool (*supported)();
  AllKernels (*kernels)();
};

// The compiled ones, best first.
const std::vector<InstructionSet>& instruction_sets();

// The one in use: the best that the CPU has, or the one that RNNKERN_ISA names. Throws
// std::runtime_error if the name is unknown or the CPU lacks that set, and if the CPU has none of
// the compiled sets.
const InstructionSet& instruction_set();

// Throws std::runtime_error if an environment variable has a value that no call can use.
void check_environment();

// Loads the library of a cell that Python has added, for its element type; csrc/known_cells.h.
// Throws std::runtime_error if the file is no such library.
void load_library(const std::string& path, const std::string& mode, const std::string& element);

// One call: makes a plan, allocates the workspace and runs the pass.
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
