// The list of cells. Adding one: its header, an entry in CellId, a line here, a row in
// rnnkern/cells.py.
#pragma once

#include "cells/elman.h"
#include "cells/gru.h"
#include "cells/lstm.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

// Calls f with the cell of that id as a value, and returns what it returns.
template <typename F>
auto with_cell(CellId id, F f) {
  switch (id) {
    case CellId::kRnnTanh:
      return f(Elman<Tanh>{});
    case CellId::kRnnRelu:
      return f(Elman<Relu>{});
    case CellId::kLstm:
      return f(Lstm{});
    case CellId::kGru:
      break;
  }
  return f(Gru{});
}

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
