// The contract between the extension and the library of a cell that a user has written
// (rnnkern/own_cells). A library has the kernels of one cell for one element type, compiled from
// the headers of this folder for the instruction set in use. It knows neither Python nor OpenMP:
// threads are the extension's.
#pragma once

#include <cstddef>

#include "plan.h"
#include "scan.h"

namespace rnnkern {

// Calls part(f, thread, number of threads) on at most `threads` threads.
using RunOnThreads = void (*)(int threads, void (*part)(const void* f, int thread, int granted),
                              const void* f);

struct CellLibrary {
  const char* mode;
  const char* element;
  const void* kernels;  // Kernels<T> of cpu/kernels.h
};

// What a library exports.
constexpr const char* kEntryOfLibrary = "rnnkern_cell_library";
using EntryOfLibrary = const CellLibrary* (*)(RunOnThreads);

#ifdef RNNKERN_CELL_LIBRARY
// Set when the library is loaded.
inline RunOnThreads run_on_threads = nullptr;
#endif

}  // namespace rnnkern
