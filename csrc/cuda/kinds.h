// The costs with which the plan compares layouts, for each kind of GPU. Rows that say "published"
// have published figures and estimates; benchmarks/gpu/kinds.py writes measured ones.
#pragma once

namespace rnnkern::cuda {

struct Kind {
  int major, minor;  // compute capability
  double clock_ghz;
  double l2_tb_per_s;      // read by all multiprocessors, all the same
  double l2_mb;            //
  double memory_tb_per_s;  //
  double hand_off_us;      // from a block's write to the others' having read it, by flags
  double by_value_us;      // the same by values (plan.h)
  double launch_us;        // of one kernel after the other in a stream
};

constexpr Kind kKinds[] = {
    {8, 0, 1.41, 4.0, 40, 2.0, 1.6, 1.0, 2.2},    // A100, published
    {8, 9, 2.52, 5.0, 72, 1.0, 1.3, 0.8, 2.2},    // RTX 4090, published
    {9, 0, 1.83, 5.5, 50, 4.0, 1.3, 0.8, 2.2},    // H100 and H200, published
    {10, 0, 1.85, 9.0, 126, 7.0, 1.3, 0.8, 2.2},  // B200, published
    {12, 0, 2.40, 7.0, 96, 1.6, 1.3, 0.8, 2.2},   // RTX 50, published
};

}  // namespace rnnkern::cuda
