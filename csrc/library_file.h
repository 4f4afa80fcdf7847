// The file of a library of a user's cell, for the CPU or a GPU. It stays loaded.
#pragma once

#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "known_cells.h"

namespace rnnkern {

class LibraryFile {
 public:
  explicit LibraryFile(std::string path)
      : path_(std::move(path)), library_(dlopen(path_.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (!library_) fail(dlerror());
  }

  [[noreturn]] void fail(const std::string& why) const {
    throw std::runtime_error(path_ + ": " + why);
  }

  // The function of that name, which says what the library has.
  template <typename Entry>
  Entry entry(const char* name) const {
    const auto found = reinterpret_cast<Entry>(dlsym(library_, name));
    if (!found) fail("it is not the library of a cell");
    return found;
  }

  // Checks that a library has the kernels of a cell for an element type, by what it says.
  void expect(const std::string& found_mode, const std::string& found_element,
              const std::string& mode, const std::string& element) const {
    if (found_mode == mode && found_element == element) return;
    fail("it has " + found_mode + " for " + found_element + ", wanted " + mode + " for " + element);
  }

  // Calls f(cell, place of the element type).
  template <typename F>
  void with_cell(const std::string& mode, const std::string& element, F f) const {
    AddedCell* const cell = added_cells().named(mode);
    for (size_t i = 0; cell && i < kElementTypes; ++i) {
      if (element == kElementNames[i]) return f(*cell, i);
    }
    fail("nobody has added that cell, or there is no such element type");
  }

 private:
  const std::string path_;
  void* const library_;
};

}  // namespace rnnkern
