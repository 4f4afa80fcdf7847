// Large buffers in huge pages, if the system has them. In a new buffer of 160 MB, the page faults
// of ordinary pages take longer than the kernel that fills it.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

namespace rnnkern {

constexpr size_t kHugePage = 2 << 20, kCacheLine = 64;

inline bool worth_huge_pages(size_t bytes) { return bytes >= 2 * kHugePage; }

// This only advises the system, and only about the huge pages that are wholly inside. So nothing
// outside is touched, and no memory is wasted.
inline void advise_huge_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  if (!worth_huge_pages(bytes)) return;
  const uintptr_t begin =
      (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Memory that begins at a cache line, and if it is large at a huge page.
struct Block {
  explicit Block(size_t size)
      : bytes(size),
        alignment{worth_huge_pages(size) ? kHugePage : kCacheLine},
        data(static_cast<char*>(::operator new(size, alignment))) {
    advise_huge_pages(data, size);
  }
  ~Block() { ::operator delete(data, alignment); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  size_t bytes;
  std::align_val_t alignment;
  char* data;
};

}  // namespace rnnkern
