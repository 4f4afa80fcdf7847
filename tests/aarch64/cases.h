// What is run: every cell and type in each of these ways.
#pragma once

#include <cstdint>
#include <optional>

#include "plan.h"

namespace rnnkern {

// How rows lie, and which of them take part.
enum class Form { kTimeFirst, kBatchFirst, kRagged, kPacked };

enum class Incoming { kRows, kUniform, kNone };

struct Case {
  const char* name;
  int64_t T, N, I, H;
  int D = 1;
  Form form = Form::kTimeFirst;
  bool resets = false;
  std::optional<Plan> plan = std::nullopt;  // else that of csrc/plan.cpp, for two threads
  bool has_bias = true;
  bool has_states = true;    // initial ones, and gradients of final ones
  bool has_tangents = true;  // of all operands, for second derivatives; else of some
  bool has_gaps = false;     // between rows
  bool rounds_cells = false;
  bool in_place = false;        // gradients overwrite what forward has saved
  bool is_special = false;      // NaN and infinity among the inputs; no second derivatives
  bool is_closed_loop = false;  // forward alone
  Incoming dy = Incoming::kRows;
};

constexpr Plan split_in(int threads, int row_blocks, int unit_blocks, int64_t block_steps = 1) {
  Plan plan;
  plan.threads = threads;
  plan.row_blocks = row_blocks;
  plan.unit_blocks = unit_blocks;
  plan.block_steps = block_steps;
  return plan;
}

constexpr Plan reading_weights_as_they_lie() {
  Plan plan;
  plan.packs_input = plan.packs_recurrent = false;
  return plan;
}

// Sizes are multiples of nothing: vectors are 4 float32 or 2 float64, panels 4 vectors.
constexpr Case kCases[] = {
    {.name = "plain", .T = 5, .N = 3, .I = 5, .H = 7},
    {.name = "one of each", .T = 1, .N = 1, .I = 1, .H = 1},
    {.name = "one unit", .T = 7, .N = 2, .I = 3, .H = 1, .D = 2},
    {.name = "two units", .T = 4, .N = 1, .I = 2, .H = 2, .D = 2, .has_bias = false},
    {.name = "one step", .T = 1, .N = 9, .I = 17, .H = 23, .D = 2, .in_place = true},
    {.name = "one row", .T = 6, .N = 1, .I = 9, .H = 19, .D = 2, .rounds_cells = true},
    {.name = "batch first",
     .T = 3,
     .N = 4,
     .I = 6,
     .H = 5,
     .D = 2,
     .form = Form::kBatchFirst,
     .resets = true,
     .has_gaps = true},
    {.name = "ragged", .T = 6, .N = 8, .I = 5, .H = 9, .D = 2, .form = Form::kRagged},
    {.name = "ragged, reset",
     .T = 7,
     .N = 5,
     .I = 3,
     .H = 6,
     .D = 2,
     .form = Form::kRagged,
     .resets = true,
     .plan = split_in(2, 1, 1, 4),
     .rounds_cells = true},
    {.name = "packed",
     .T = 5,
     .N = 7,
     .I = 4,
     .H = 11,
     .D = 2,
     .form = Form::kPacked,
     .has_gaps = true},
    {.name = "packed, no states",
     .T = 5,
     .N = 4,
     .I = 7,
     .H = 3,
     .D = 2,
     .form = Form::kPacked,
     .resets = true,
     .has_states = false,
     .in_place = true,
     .dy = Incoming::kUniform},
    {.name = "some tangents",
     .T = 4,
     .N = 3,
     .I = 5,
     .H = 6,
     .D = 2,
     .has_tangents = false,
     .dy = Incoming::kNone},
    {.name = "steps at once", .T = 7, .N = 4, .I = 13, .H = 10, .plan = split_in(1, 1, 1, 3)},
    {.name = "directions on threads",
     .T = 4,
     .N = 2,
     .I = 6,
     .H = 13,
     .D = 2,
     .plan = split_in(2, 1, 1)},
    {.name = "rows on threads",
     .T = 4,
     .N = 13,
     .I = 5,
     .H = 8,
     .form = Form::kRagged,
     .plan = split_in(2, 2, 1, 2)},
    {.name = "units on threads",
     .T = 4,
     .N = 3,
     .I = 6,
     .H = 37,
     .plan = split_in(2, 1, 2),
     .rounds_cells = true},
    {.name = "rows and units on threads",
     .T = 3,
     .N = 7,
     .I = 4,
     .H = 21,
     .D = 2,
     .form = Form::kPacked,
     .resets = true,
     .plan = split_in(4, 2, 2, 2)},
    {.name = "weights as they lie",
     .T = 2,
     .N = 7,
     .I = 18,
     .H = 21,
     .D = 2,
     .plan = reading_weights_as_they_lie(),
     .has_gaps = true},
    {.name = "long sums", .T = 2, .N = 3, .I = 261, .H = 5},
    {.name = "many rows", .T = 41, .N = 10, .I = 2, .H = 3, .dy = Incoming::kUniform},
    {.name = "NaN and infinity",
     .T = 4,
     .N = 6,
     .I = 3,
     .H = 6,
     .D = 2,
     .form = Form::kRagged,
     .is_special = true},
    {.name = "closed loop",
     .T = 5,
     .N = 7,
     .I = 6,
     .H = 18,
     .plan = split_in(2, 1, 2),
     .is_closed_loop = true},
};

}  // namespace rnnkern
