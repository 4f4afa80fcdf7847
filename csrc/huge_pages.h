// Large buffers in huge pages, where the system has them: of a fresh buffer of 160 MB the page
// faults of ordinary pages take longer than the kernel that fills it.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace rnnkern {

constexpr size_t kHugePage = 2 << 20;

inline bool worth_huge_pages(size_t bytes) { return bytes >= 2 * kHugePage; }

// Only advice, and only for the huge pages that lie wholly inside: nothing outside is touched, no
// memory is wasted.
inline void advise_huge_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  if (!worth_huge_pages(bytes)) return;
  const uintptr_t begin =
      (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace rnnkern
