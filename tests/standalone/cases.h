// What is run: every cell and type in each of these ways.
#pragma once

#include <cstdint>
#include <optional>

#include "plan.h"

namespace rnnkern {

// How rows lie, and which of them take part.
enum class Form { kTimeFirst, kBatchFirst, kRagged, kPacked };
using enum Form;

// Rows of gradients of the output.
enum class Incoming { kRows, kUniform, kNone };
using enum Incoming;

struct Options {
  Form form = kTimeFirst;
  std::optional<Plan> plan = std::nullopt;  // else that of csrc/plan.cpp, for two threads
  bool resets = false;
  bool has_bias = true;
  bool has_states = true;    // initial ones, and gradients of final ones
  bool has_tangents = true;  // of all operands, for second derivatives; else of some
  bool has_gaps = false;     // between rows
  bool rounds_cells = false;
  bool in_place = false;        // gradients overwrite what forward has saved; no second derivatives
  bool is_special = false;      // NaN and infinity among the inputs; no second derivatives
  bool is_closed_loop = false;  // forward alone
  Incoming dy = kRows;
};

struct Case {
  const char* name;
  int64_t T, N, I, H;
  int D;
  Options options = {};
};

constexpr Plan split_in(int threads, int row_blocks, int unit_blocks, int64_t block_steps = 1) {
  Plan plan;
  plan.threads = threads;
  plan.row_blocks = row_blocks;
  plan.unit_blocks = unit_blocks;
  plan.block_steps = block_steps;
  return plan;
}

constexpr Plan as_they_lie(Reading reading, int64_t block_steps = 1) {
  Plan plan;
  plan.input = plan.recurrent = reading;
  plan.block_steps = block_steps;
  return plan;
}

constexpr Plan with_rows_apart(int64_t rows, int row_blocks) {
  Plan plan = as_they_lie(Reading::kBroadcast);
  plan.input_by_dots = plan.recurrent_by_dots = rows;
  plan.threads = 2;
  plan.row_blocks = row_blocks;
  return plan;
}

// Name, T, N, I, H, D and options. Sizes are multiples of nothing: vectors are 4 float32 or 2
// float64, panels 4 vectors.
constexpr Case kCases[] = {
    {"plain", 5, 3, 5, 7, 1},
    {"one of each", 1, 1, 1, 1, 1},
    {"one unit", 7, 2, 3, 1, 2},
    {"two units", 4, 1, 2, 2, 2, {.has_bias = false}},
    {"one step", 1, 9, 17, 23, 2, {.in_place = true}},
    {"one row", 6, 1, 9, 19, 2, {.rounds_cells = true}},
    {"batch first", 3, 4, 6, 5, 2, {.form = kBatchFirst, .resets = true, .has_gaps = true}},
    {"ragged", 6, 8, 5, 9, 2, {.form = kRagged}},
    {"ragged, reset", 7, 5, 3, 6, 2, {.form = kRagged, .resets = true, .rounds_cells = true}},
    {"packed", 5, 7, 4, 11, 2, {.form = kPacked, .has_gaps = true, .in_place = true}},
    {"no states", 5, 4, 7, 3, 2, {.form = kPacked, .resets = true, .has_states = false}},
    {"some tangents", 4, 3, 5, 6, 2, {.has_tangents = false, .dy = kNone}},
    {"steps at once", 7, 4, 13, 10, 1, {.plan = split_in(1, 1, 1, 3)}},
    {"directions on threads", 4, 2, 6, 13, 2, {.plan = split_in(2, 1, 1, 4), .resets = true}},
    {"rows on threads", 4, 13, 5, 8, 1, {.form = kRagged, .plan = split_in(2, 2, 1, 2)}},
    {"units on threads", 4, 3, 6, 150, 1, {.plan = split_in(2, 1, 2), .rounds_cells = true}},
    {"all on threads", 3, 7, 4, 150, 2, {.form = kPacked, .plan = split_in(4, 2, 2, 2)}},
    {"columns of dx on threads", 3, 7, 150, 20, 2, {.form = kRagged, .plan = split_in(2, 1, 2)}},
    {"weights as they lie",
     2,
     7,
     18,
     21,
     2,
     {.plan = as_they_lie(Reading::kDots), .has_gaps = true}},
    {"weights broadcast",
     3,
     7,
     18,
     21,
     2,
     {.plan = as_they_lie(Reading::kBroadcast, 2), .has_gaps = true}},
    {"weights broadcast, many rows", 1, 37, 5, 19, 1, {.plan = as_they_lie(Reading::kBroadcast)}},
    {"weights broadcast, the last rows apart",
     1,
     19,
     18,
     21,
     1,
     {.plan = with_rows_apart(3, 3), .has_gaps = true}},
    {"weights broadcast, the last of ragged rows apart",
     1,
     19,
     18,
     21,
     2,
     {.form = kRagged, .plan = with_rows_apart(8, 4)}},
    {"weights as they lie, many rows", 1, 17, 70, 67, 1, {.plan = as_they_lie(Reading::kDots)}},
    {"long sums", 2, 3, 261, 5, 1},
    {"many rows", 41, 10, 2, 3, 1, {.dy = kUniform}},
    {"NaN and infinity", 4, 6, 3, 6, 2, {.resets = true, .is_special = true}},
    {"closed loop", 5, 7, 6, 18, 1, {.plan = split_in(2, 1, 2), .is_closed_loop = true}},
};

}  // namespace rnnkern
