// The list of cells: a new one is an include and a name at the end.
#pragma once

#include "cells/elman.h"
#include "cells/gru.h"
#include "cells/lstm.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

// CMakeLists.txt reads this statement, and every comma in it ends a name.
using Cells = CellList<Elman<Tanh>, Elman<Relu>, Lstm, Gru>;

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
