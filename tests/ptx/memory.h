// Global memory as a block may see it at the worst. What the block stores is seen by others only
// after it has released it, or when its kernel has ended. Relaxed stores arrive before that, but in
// any order, and late: while the block looks at what others store. What it loads comes from sectors
// of its first-level cache, which stay as they were when they came, until it acquires.
//
// This is weaker than any GPU and weaker in one respect than the memory model of PTX: no plain
// store ever becomes visible by itself. In another respect it is stronger: loads are in order.
// Within the block all threads see the same, at once.
#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <unordered_map>
#include <utility>
#include <vector>

namespace ptx {

class WeakMemory {
 public:
  WeakMemory() = default;
  WeakMemory(const WeakMemory&) = delete;
  ~WeakMemory() { release(); }

  // All accesses are aligned, and at most 16 bytes: each is within one sector.
  void load(void* to, const void* at, size_t bytes) {
    const auto [found, is_new] = cached_.try_emplace(sector(at));
    if (is_new) {
      std::memcpy(found->second.bytes, place(sector(at)), kSector);
      lay_stored_over(found->second.bytes, sector(at));
    }
    std::memcpy(to, found->second.bytes + offset(at), bytes);
  }
  // Past the first-level cache.
  void load_from_l2(void* to, const void* at, size_t bytes) const {
    char fresh[kSector];
    std::memcpy(fresh, place(sector(at)), kSector);
    lay_stored_over(fresh, sector(at));
    std::memcpy(to, fresh + offset(at), bytes);
  }
  void store(void* at, const void* from, size_t bytes) {
    Stored& stored = stored_[sector(at)];
    std::memcpy(stored.bytes + offset(at), from, bytes);
    stored.mask |= mask(at, bytes);
    update_cached(at, from, bytes);
  }
  // At once, for all.
  void store_to_l2(void* at, const void* from, size_t bytes) {
    const auto found = stored_.find(sector(at));
    if (found != stored_.end()) found->second.mask &= ~mask(at, bytes);
    std::memcpy(at, from, bytes);
    update_cached(at, from, bytes);
  }
  void store_relaxed(void* at, const void* from, size_t bytes) {
    store(at, from, bytes);
    on_their_way_.emplace_back(at, bytes);
  }
  // The block looks at what others may store. Returns whether one of its relaxed stores arrives
  // then.
  bool look() {
    if (on_their_way_.empty() || random_() % 256 > 0) return false;
    arrive();
    return true;
  }
  bool arrive_all() {
    const bool any = !on_their_way_.empty();
    while (!on_their_way_.empty()) arrive();
    return any;
  }

  void release() {
    for (const auto& [sector, stored] : stored_) copy_stored(place(sector), stored);
    stored_.clear();
    on_their_way_ = {};
  }
  void acquire() { cached_.clear(); }

 private:
  static constexpr size_t kSector = 32;
  struct Sector {
    char bytes[kSector];
  };
  struct Stored : Sector {
    uint32_t mask = 0;  // a bit for each byte that has been stored
  };

  // Most often the last relaxed store arrives first, so that some stay behind for several steps.
  void arrive() {
    if (random_() % 4 == 0)
      std::swap(on_their_way_[random_() % on_their_way_.size()], on_their_way_.back());
    const auto [at, bytes] = on_their_way_.back();
    on_their_way_.pop_back();
    Stored& stored = stored_[sector(at)];
    Stored arrived = stored;
    arrived.mask &= mask(at, bytes);
    copy_stored(place(sector(at)), arrived);
    stored.mask &= ~mask(at, bytes);
  }

  static uintptr_t sector(const void* at) { return reinterpret_cast<uintptr_t>(at) / kSector; }
  static size_t offset(const void* at) { return reinterpret_cast<uintptr_t>(at) % kSector; }
  static uint32_t mask(const void* at, size_t bytes) { return ((1u << bytes) - 1) << offset(at); }
  static char* place(uintptr_t sector) { return reinterpret_cast<char*>(sector * kSector); }

  static void copy_stored(char* to, const Stored& stored) {
    for (size_t i = 0; i < kSector; ++i) {
      if (stored.mask >> i & 1) to[i] = stored.bytes[i];
    }
  }
  void lay_stored_over(char* bytes, uintptr_t sector) const {
    const auto found = stored_.find(sector);
    if (found != stored_.end()) copy_stored(bytes, found->second);
  }
  void update_cached(const void* at, const void* from, size_t bytes) {
    const auto found = cached_.find(sector(at));
    if (found != cached_.end()) std::memcpy(found->second.bytes + offset(at), from, bytes);
  }

  std::unordered_map<uintptr_t, Stored> stored_;
  std::vector<std::pair<void*, size_t>> on_their_way_;
  inline static std::minstd_rand random_;
  std::unordered_map<uintptr_t, Sector> cached_;
};

}  // namespace ptx
