#include "cuda/plan.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <string_view>

#include "cuda/kinds.h"
#include "known_cells.h"

namespace rnnkern::cuda {
namespace {

// What one multiprocessor does in one clock.
constexpr double kSharedBytesPerClock = 128, kL2BytesPerClock = 64;
constexpr double kTensorFlops = 2048;  // of 16-bit operands; half of TF32
constexpr double kPlainFlops = 256;    // of float; 1/2 to 1/64 of double
// What one pass of one group costs besides reading and multiplying: two barriers, the cell, and the
// latency of the first load of each kind. It was counted in the machine code (docs/gpu-notes.md).
constexpr double kItemClocks = 440;
// Estimates for the stepwise tier: what cuBLAS adds to a launch, the time of a kernel besides
// moving and multiplying, and the share of the cache in which weights stay from step to step.
constexpr double kLibraryUs = 0.8, kKernelUs = 2, kShareOfL2 = 0.8;
constexpr double kOwnProductSpeed = 0.2;  // of the library's
// Between two passes, outputs are stored and inputs loaded. This counts in full even if a hand-off
// may hide it, because it has not been measured yet how well it does.
constexpr double kBetweenPassesUs = 0.4;
// Before the first step of a launch of the resident tier: memory is cleared, and a cooperative
// launch waits until the device is empty. Then weights are packed: a trip to memory for the chunks
// that are read at once, and instructions for each number, four of which a multiprocessor begins in
// a clock.
constexpr double kSetUpUs = 5, kPackTripClocks = 900, kPackInstructions = 12;
constexpr double kPackedAtOnce = 64;  // loads of a lane

// Operations of one multiprocessor in one clock.
double flops_per_clock(const Numbers& numbers) {
  return (numbers.tensor_cores ? kTensorFlops * 2 : kPlainFlops * 4) / numbers.operand_bytes;
}

// The number of steps of a window of the forward pass.
int64_t window_of(const Problem& p, bool resident) {
  if (p.backward || p.inputs_are_saved) return p.T;
  const int64_t inputs = p.sizes.D * known_shape(p.sizes.cell).gates * p.sizes.H;
  const int64_t gathered = p.gathers_input ? p.sizes.I : 0;
  return window_steps(
      p.T, p.N * (inputs * p.numbers.computed_bytes + gathered * p.numbers.operand_bytes),
      resident ? 2 : 1);
}

Plan stepwise(const Problem& p, const Device& device) {
  const CellShape cell = known_shape(p.sizes.cell);
  const double D = p.sizes.D, N = double(p.N), H = double(p.sizes.H), O = double(p.sizes.O);
  const double weights = D * H * O * (cell.gates + (p.sizes.projected ? 1 : 0));
  const double cells = D * N * H;
  Plan plan;
  plan.window = window_of(p, false);
  plan.bytes_per_step = int64_t(weights * p.numbers.operand_bytes);
  const bool stay = double(plan.bytes_per_step) <= kShareOfL2 * device.l2_mb * 1e6;
  const double bytes_per_us = (stay ? device.l2_tb_per_s : device.memory_tb_per_s) * 1e6;
  const double rate = flops_per_clock(p.numbers) * device.multiprocessors * device.clock_ghz * 1e3;
  const double speed = p.own_products() ? kOwnProductSpeed : 1;
  const double rounds = p.sizes.projected ? 2 : 1;  // of products and a kernel
  // Sums, inputs, slots and cell states of each cell are read or written once.
  const double cell_bytes = cells * p.numbers.computed_bytes * (3 * cell.slots + 4);
  const double on_device =
      rounds * (D + 1) * kKernelUs +
      std::max(double(plan.bytes_per_step) / bytes_per_us, 2 * N * weights / rate) / speed +
      cell_bytes / (device.l2_tb_per_s * 1e6);
  const double on_host = rounds * (D * (device.launch_us + kLibraryUs) + device.launch_us);
  plan.us_per_step = std::max(on_device, on_host) + device.launch_us / double(p.T);
  return plan;
}

// Predicts the bytes and the time of a step of a layout.
void predict(const Problem& p, const Device& device, Plan& plan) {
  const double K = double(p.sizes.H) * (p.backward ? known_shape(p.sizes.cell).gates : 1);
  const double state_bytes = double(plan.chunks) * kChunkBytes * plan.columns();
  const double warp_bytes = double(kChunkBytes) * plan.rows() * plan.working_warps;
  const double in_shared = plan.shared_chunks * warp_bytes;
  const double streamed = (plan.warp_chunks - plan.held_chunks - plan.shared_chunks) * warp_bytes;
  const double flops = 2.0 * plan.rows() * plan.columns() * K;
  const double rate = flops_per_clock(p.numbers);
  const double blocks_used = double(plan.blocks(p.sizes.D));
  const double l2_bytes_per_us =
      std::min(kL2BytesPerClock * device.clock_ghz * 1e3, device.l2_tb_per_s * 1e6 / blocks_used);
  plan.bytes_per_step =
      int64_t(double(plan.passes) * plan.groups * (state_bytes + streamed) * blocks_used);
  const double sum_bytes =
      double(sum_count(plan.rows(), plan.columns())) * p.numbers.computed_bytes;
  const double clocks_per_us = device.clock_ghz * 1e3;
  const double pass_us =
      plan.groups *
      ((state_bytes + streamed) / l2_bytes_per_us +
       (kItemClocks + (in_shared + 2 * sum_bytes) / kSharedBytesPerClock + flops / rate) /
           clocks_per_us);
  // While the results of one pass are on their way to the other blocks, the next pass goes on.
  const double between_us = (plan.passes - 1) * kBetweenPassesUs;
  const double step_us = std::max(device.hand_off_us + pass_us, plan.passes * pass_us) + between_us;
  const double packed = double(plan.rows()) * K * plan.groups;
  const double of_a_lane = packed / (32.0 * plan.working_warps);
  const double pack_us =
      (quotient_up(int64_t(of_a_lane), int64_t(kPackedAtOnce)) * kPackTripClocks +
       packed / 32 * kPackInstructions / 4) /
      clocks_per_us;
  plan.us_per_step = (kSetUpUs + pack_us) / double(plan.window) + step_us;
}

Plan laid_out(const Problem& p, const Device& device, TileShape shape, int row_teams) {
  const CellShape cell = known_shape(p.sizes.cell);
  const int64_t H = p.sizes.H, D = p.sizes.D;
  Plan plan;
  plan.resident = true;
  plan.window = window_of(p, true);
  plan.tile = shape;
  plan.row_teams = row_teams;
  plan.passes = int(quotient_up(quotient_up(p.N, plan.columns()), row_teams));
  const int64_t blocks = std::max<int64_t>(1, device.blocks_at_once / (D * row_teams));
  const int64_t most_units = plan.rows() / (p.backward ? 1 : cell.gates);
  plan.groups = int(quotient_up(H, blocks * most_units));
  plan.units = int(quotient_up(H, blocks * plan.groups));
  // Fill whole tiles with rows, because fewer blocks read less.
  const int64_t per_tile = std::max<int64_t>(1, kTileRows / (p.backward ? 1 : cell.gates));
  plan.units = int(std::min(most_units, quotient_up(plan.units, per_tile) * per_tile));
  plan.unit_blocks = int(quotient_up(H, int64_t(plan.units) * plan.groups));
  const int64_t K = p.backward ? cell.gates * H : H;
  plan.chunks = int(quotient_up(K * p.numbers.operand_bytes, kChunkBytes));
  // With several passes the last warp does not multiply, because it sets the flags, and the fence
  // of a flag takes as long as a pass.
  const int multiplying = kResidentWarps - (plan.passes > 1 ? 1 : 0);
  plan.warp_chunks = int(quotient_up(plan.chunks, multiplying));
  plan.working_warps = int(quotient_up(plan.chunks, plan.warp_chunks));
  // Registers cannot be indexed, so they hold the weights of one group only.
  plan.held_chunks = plan.groups == 1 ? std::min(shape.held_chunks, plan.warp_chunks) : 0;

  const int64_t other = p.numbers.computed_bytes * (sum_count(plan.rows(), plan.columns()) +
                                                    kept_count(plan, p.backward ? 0 : cell.slots));
  // One chunk of every warp.
  const int64_t chunk_bytes = int64_t(plan.rows()) * kChunkBytes * plan.working_warps * plan.groups;
  const int64_t room = device.shared_bytes - other;
  plan.resident = room >= 0;
  plan.shared_chunks =
      int(std::clamp<int64_t>(room / chunk_bytes, 0, plan.warp_chunks - plan.held_chunks));
  plan.shared_bytes = other + plan.shared_chunks * chunk_bytes;
  predict(p, device, plan);
  return plan;
}

}  // namespace

Device device_of_kind(int major, int minor) {
  const Kind* found = std::begin(kKinds);
  for (const Kind& kind : kKinds) {
    if (kind.major < major || (kind.major == major && kind.minor <= minor)) found = &kind;
  }
  Device device;
  device.clock_ghz = found->clock_ghz;
  device.l2_tb_per_s = found->l2_tb_per_s;
  device.l2_mb = found->l2_mb;
  device.memory_tb_per_s = found->memory_tb_per_s;
  device.hand_off_us = kExchangesByValue ? found->by_value_us : found->hand_off_us;
  device.launch_us = found->launch_us;
  return device;
}

namespace {

// RNNKERN_CUDA_TIER names one, for tests and comparisons.
bool is_forced(const char* tier) {
  const char* const forced = std::getenv("RNNKERN_CUDA_TIER");
  return forced && std::string_view(forced) == tier;
}

// Why only the stepwise tier can run the problem, or null.
const char* why_stepwise(const Problem& p) {
  if (p.sizes.projected) return "the layer has a projection";
  if (!known_shape(p.sizes.cell).fits_resident())
    return "the cell is none that the resident tier knows";
  // Whether the resident tier has a layout, and which, depends on the number of rows.
  if (p.has_fixed_order()) return "deterministic algorithms";
  return is_forced("stepwise") ? "RNNKERN_CUDA_TIER" : nullptr;
}

}  // namespace

int64_t window_steps(int64_t T, int64_t bytes_of_step, int buffers) {
  const char* const named = std::getenv("RNNKERN_CUDA_WINDOW_BYTES");
  const int64_t limit = named ? std::atoll(named) : kWindowBytes;
  const auto fit = [&](int64_t bytes) {
    return std::max<int64_t>(1, limit / std::max<int64_t>(1, bytes));
  };
  if (T <= fit(bytes_of_step)) return T;
  return quotient_up(T, quotient_up(T, fit(buffers * bytes_of_step)));
}

int blocks_of(int multiprocessors) {
  const char* const named = std::getenv("RNNKERN_CUDA_LEAVE_FREE");
  return std::clamp(multiprocessors - (named ? std::atoi(named) : 0), 0, multiprocessors);
}

Plan plan_for(const Problem& p, const Device& device) {
  const Plan in_steps = stepwise(p, device);
  Plan best;
  if (why_stepwise(p) || p.N <= 0 || p.T <= 0 || device.blocks_at_once < p.sizes.D) return in_steps;
  const auto try_all = [&](const auto& shapes) {
    for (const TileShape& shape : shapes) {
      const int64_t parts = quotient_up(p.N, shape.column_tiles * kTileColumns);
      const int64_t most = device.blocks_at_once / p.sizes.D;
      for (int64_t passes = quotient_up(parts, most);; passes *= 2) {
        const int64_t teams = quotient_up(parts, passes);
        const Plan plan = laid_out(p, device, shape, int(teams));
        if (plan.resident && (!best.resident || plan.us_per_step < best.us_per_step)) best = plan;
        if (teams == 1) break;
      }
    }
  };
  if (p.numbers.tensor_cores) {
    p.backward ? try_all(kBackwardTiles) : try_all(forward_tiles(known_shape(p.sizes.cell).gates));
  } else {
    p.backward ? try_all(kOneByOneBackwardTiles) : try_all(kOneByOneForwardTiles);
  }
  if (!best.resident) return in_steps;
  return is_forced("resident") || best.us_per_step <= in_steps.us_per_step ? best : in_steps;
}

std::string describe(const Plan& plan, const Problem& p, const Device& device) {
  char text[640], own[160];
  std::snprintf(own, sizeof own, "%s", p.own_products() ? ", products by a kernel of our own" : "");
  if (plan.window < p.T) {
    const size_t used = std::strlen(own);
    std::snprintf(own + used, sizeof own - used, ", input products in windows of %lld steps",
                  static_cast<long long>(plan.window));
  }
  if (!plan.resident) {
    const char* const reason = why_stepwise(p);
    std::snprintf(text, sizeof text,
                  "stepwise tier: a product and a kernel of cells in each step; %.0f KB of weights "
                  "a step, %.1f us expected%s; because %s",
                  double(plan.bytes_per_step) / 1e3, plan.us_per_step, own,
                  reason ? reason : "the resident tier would be slower, or asks for more memory");
    return text;
  }
  const double share = 100.0 / plan.warp_chunks;
  std::snprintf(text, sizeof text,
                "resident tier: %lld blocks of %d at once, %d team(s) of %d in a direction, "
                "%d units each in %d group(s), %d rows in %d pass(es); %.0f %% of the weights in "
                "registers, %.0f %% in shared memory (%lld KiB a block); %.0f KB a step through "
                "the L2, %.1f us expected%s",
                static_cast<long long>(plan.blocks(p.sizes.D)), device.blocks_at_once,
                plan.row_teams, plan.unit_blocks, plan.units * plan.groups, plan.groups,
                plan.columns(), plan.passes, share * plan.held_chunks, share * plan.shared_chunks,
                static_cast<long long>(plan.shared_bytes >> 10), double(plan.bytes_per_step) / 1e3,
                plan.us_per_step, own);
  return text;
}

}  // namespace rnnkern::cuda
