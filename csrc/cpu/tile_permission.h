// A process has to ask Linux for the tile registers of AMX before it uses them.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

namespace rnnkern {

// Whether the system gives them. The configuration of a native build asks too (cmake/tiles.cpp).
inline bool system_gives_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace rnnkern
