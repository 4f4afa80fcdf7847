// The library of a user's cell: library.h. RNNKERN_ELEMENT is its type, RNNKERN_NAMESPACE its
// instruction set; cells/list.h, the only cell, is that of the generated sources.
#include "cpu/library.h"

#include "cpu/kernels.cpp"

#define RNNKERN_TEXT_OF(name) #name
#define RNNKERN_TEXT(name) RNNKERN_TEXT_OF(name)

extern "C" __attribute__((visibility("default"))) const rnnkern::CellLibrary* rnnkern_cell_library(
    rnnkern::RunOnThreads run_on_threads) {
  using rnnkern::Bf16, rnnkern::F16, rnnkern::F32ByBf16, rnnkern::F32By3Bf16;
  rnnkern::run_on_threads = run_on_threads;
  static const auto kernels = rnnkern::RNNKERN_NAMESPACE::kernels<RNNKERN_ELEMENT>();
  static const rnnkern::CellLibrary library = {rnnkern::RNNKERN_NAMESPACE::kCellInfos[0].mode,
                                               RNNKERN_TEXT(RNNKERN_ELEMENT), &kernels};
  return &library;
}
