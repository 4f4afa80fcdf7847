// Ends with 0 if the system gives a process the tile registers of AMX.
#include <sys/syscall.h>
#include <unistd.h>

int main() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : 1;
}
