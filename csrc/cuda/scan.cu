// Lays out a scan of tensors of RNNKERN_ELEMENT on the GPU and starts its kernels. With
// RNNKERN_SIMT plain C++, for the stand-in.
#include <string>

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/plain_backward.cuh"
#include "cuda/plain_forward.cuh"
#include "workspace.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {
namespace {

#ifdef RNNKERN_SIMT
constexpr int kThreads = 64;  // fibers are dear
#else
constexpr int kThreads = kPlainThreads;
#endif

// Batch rows first, for their teams need not wait for each other; then units, as many blocks as
// run at once, one a multiprocessor.
Teams teams_for(const Sizes& z, int64_t N, const cuda::Device& device) {
  const int64_t most = device.multiprocessors / z.D > 1 ? device.multiprocessors / z.D : 1;
  const int64_t tiles = (N + kRowTile - 1) / kRowTile;
  const int64_t groups = (z.H + kThreads / kWarp - 1) / (kThreads / kWarp);
  Teams teams;
  teams.row_blocks = int(tiles < most ? (tiles > 1 ? tiles : 1) : most);
  const int64_t left = most / teams.row_blocks;
  teams.unit_blocks = int(groups < left ? groups : left);
  return teams;
}

// What a scan needs of scratch memory, its first bytes zero.
struct Layout {
  size_t zero_bytes = 0, bytes = 0;
};

// Carves the scratch memory of a scan: flags and zeros first, for they begin as zero.
template <typename T>
struct Common {
  Teams teams;
  T* zeros;
  Layout layout;

  Common(const Sizes& z, int64_t N, const cuda::Device& device, Carver& carver)
      : teams(teams_for(z, N, device)) {
    teams.flags = carver.take<int>(blocks(z));
    zeros = carver.take<T>(z.H > z.O ? z.H : z.O);
    layout.zero_bytes = carver.used();
  }
  int blocks(const Sizes& z) const { return z.D * teams.row_blocks * teams.unit_blocks; }
};

std::string name_of(const char* pass, const Sizes& z, const Steps& s) {
  return std::string("plain ") + pass + " of " + kCellModes[int(z.cell)] +
         " (T=" + std::to_string(s.T) + " N=" + std::to_string(s.N) + " I=" + std::to_string(z.I) +
         " H=" + std::to_string(z.H) + ")";
}

// A scan laid out for a device: plan(memory) says what it needs, and given that much memory starts
// the kernels; false where a launch asks for more blocks at once than the device runs.
template <typename T, typename Cell>
bool start(const Forward<T>& f, const cuda::Device& device, char* memory, void* stream,
           Layout* layout) {
  using Kernel = PlainForward<T, Cell>;
  const Sizes& z = f.sizes;
  Carver carver(memory);
  Common<T> common(z, f.steps.N, device, carver);
  typename Kernel::Arguments arguments = {f, common.teams, common.zeros, nullptr, nullptr};
  const int64_t rows = z.D * f.steps.N;
  if (z.projected && !f.unprojected) arguments.unprojected = carver.take<T>(rows * z.H);
  if (Cell::kShape.cell_state && kNarrow<T>) {
    arguments.carried = carver.take<Compute<T>>(rows * z.H);
  }
  common.layout.bytes = carver.used();
  *layout = common.layout;
  if (!memory) return true;
  clear(memory, layout->zero_bytes, stream);
  return launch<Kernel>(name_of("forward", z, f.steps), {common.blocks(z), kThreads}, stream,
                        arguments);
}

template <typename T, typename Cell>
bool start(const Backward<T>& b, const cuda::Device& device, char* memory, void* stream,
           Layout* layout) {
  using Kernel = PlainBackward<T, Cell>;
  using A = Compute<T>;
  const Sizes& z = b.sizes;
  Carver carver(memory);
  Common<T> common(z, b.steps.N, device, carver);
  const int64_t rows = z.D * b.steps.N;
  typename Kernel::Arguments arguments = {b, common.teams, common.zeros, nullptr, nullptr, nullptr};
  arguments.dh = carver.take<A>(rows * z.O);
  if (Cell::kShape.cell_state) arguments.dc = carver.take<A>(rows * z.H);
  if (z.projected) arguments.dm = carver.take<A>(rows * z.H);
  common.layout.bytes = carver.used();
  *layout = common.layout;
  if (!memory) return true;
  clear(memory, layout->zero_bytes, stream);
  return launch<Kernel>(name_of("backward", z, b.steps), {common.blocks(z), kThreads}, stream,
                        arguments) &&
         launch<PlainGradients<T, Cell>>(name_of("gradients", z, b.steps),
                                         {device.multiprocessors, kThreads}, stream,
                                         {b, common.zeros});
}

template <typename Scan>
bool start_any(const Scan& scan, const cuda::Device& device, char* memory, void* stream,
               Layout* layout) {
  return with_cell(scan.sizes.cell, [&](auto cell) {
    return start<typename Scan::Element, decltype(cell)>(scan, device, memory, stream, layout);
  });
}

template <typename Scan>
size_t bytes_of(const Scan& scan, const cuda::Call& call) {
  Layout layout;
  start_any(scan, cuda::device(call.device), nullptr, nullptr, &layout);
  return layout.bytes;
}

// Where other work holds a part of the device, fewer blocks run at once: then a smaller plan, which
// needs no more memory.
template <typename Scan>
void run_any(const Scan& scan, const cuda::Call& call, char* workspace) {
  const cuda::Current current(call.device);
  cuda::Device device = cuda::device(call.device);
  Layout layout;
  while (!start_any(scan, device, workspace, call.stream, &layout)) device.multiprocessors /= 2;
}

}  // namespace
}  // namespace RNNKERN_NAMESPACE

namespace cuda {

using namespace RNNKERN_NAMESPACE;

template <>
size_t workspace_bytes(const Forward<RNNKERN_ELEMENT>& scan, const Call& call) {
  return bytes_of(scan, call);
}
template <>
size_t workspace_bytes(const Backward<RNNKERN_ELEMENT>& scan, const Call& call) {
  return bytes_of(scan, call);
}
template <>
void run(const Forward<RNNKERN_ELEMENT>& scan, const Call& call, char* workspace) {
  run_any(scan, call, workspace);
}
template <>
void run(const Backward<RNNKERN_ELEMENT>& scan, const Call& call, char* workspace) {
  run_any(scan, call, workspace);
}

}  // namespace cuda
}  // namespace rnnkern
