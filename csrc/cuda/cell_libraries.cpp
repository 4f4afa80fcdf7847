// Loads the CUDA libraries of cells, and finds them by cell, element type and device.
#include "cuda/cell_libraries.h"

#include <stdexcept>
#include <string>

#include "cuda/cell_library.h"
#include "cuda/kernels.h"
#include "known_cells.h"
#include "library_file.h"

namespace rnnkern::cuda {

bool is_in_library(CellId id) { return added_cells().at(id); }

const char* mode_of(CellId id) { return known_cell(id).mode; }

const void* library_of(CellId id, int place, int device) {
  const AddedCell& cell = *added_cells().at(id);
  const void* const loaded =
      cell.cuda_libraries[size_t(place)][size_t(device)].load(std::memory_order_acquire);
  if (!loaded) {
    throw std::runtime_error("the CUDA kernels of the cell " + cell.mode + " are not loaded");
  }
  return loaded;
}

void load_library(const std::string& path, const std::string& mode, const std::string& element,
                  const std::string& headers, int device) {
  const LibraryFile file(path);
  const void* const found = file.entry<const void* (*)()>(kEntryOfLibrary)();
  // The fields are the same for all element types.
  const auto& library = *static_cast<const CellLibrary<float>*>(found);
  if (library.headers != headers) {
    file.fail("it was compiled from the headers of another version of rnnkern");
  }
  file.expect(library.mode, library.element, mode, element);
  file.with_cell(mode, element, [&](AddedCell& cell, size_t place) {
    library.connect(&host());
    cell.cuda_libraries[place].at(size_t(device)).store(found, std::memory_order_release);
  });
}

}  // namespace rnnkern::cuda
