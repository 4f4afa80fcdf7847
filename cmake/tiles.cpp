// Ends with 0 if the system gives a process the tile registers of AMX.
#include "cpu/tile_permission.h"

int main() { return rnnkern::system_gives_tiles() ? 0 : 1; }
