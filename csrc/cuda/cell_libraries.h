// Cells that a user has written, whose kernels are in libraries (cell_library.h).
#pragma once

#include <cstddef>
#include <string>

#include "scan.h"

namespace rnnkern::cuda {

struct Attempt;
struct Host;

// What the extension lends to libraries.
const Host& host();

bool is_in_library(CellId id);
// The CellLibrary<T> of the cell for the element type of that place and a device. Throws
// std::runtime_error if it is not loaded.
const void* library_of(CellId id, int place, int device);
const char* mode_of(CellId id);

// Does what `start` of start.h does, for a Queue that it makes of the attempt, and gives the bytes
// of the Queue.
template <typename Scan>
bool start_in_library(const Scan& scan, const Attempt& attempt, size_t* bytes);

}  // namespace rnnkern::cuda
