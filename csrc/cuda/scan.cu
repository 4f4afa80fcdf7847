// Lays out a scan on the GPU and starts its kernels. With RNNKERN_SIMT, plain C++ for the stand-in.
#include <string>

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
// run at once.
Teams teams_for(const Sizes& z, int64_t N, const cuda::Device& device) {
  const int64_t blocks = int64_t(device.multiprocessors) * device.blocks_per_multiprocessor;
  const int64_t most = blocks / z.D > 1 ? blocks / z.D : 1;  // of a direction
  const int64_t tiles = (N + kRowTile - 1) / kRowTile;
  const int64_t groups = (z.H + kThreads / kWarp - 1) / (kThreads / kWarp);
  Teams teams;
  teams.row_blocks = int(tiles < most ? (tiles > 1 ? tiles : 1) : most);
  const int64_t left = most / teams.row_blocks;
  teams.unit_blocks = int(groups < left ? groups : left);
  return teams;
}

// Carves the scratch memory of a scan: flags and zeros first, for they begin as zero.
template <typename T>
struct Common {
  Teams teams;
  T* zeros;
  cuda::Workspace size;

  Common(const Sizes& z, int64_t N, const cuda::Device& device, Carver& carver)
      : teams(teams_for(z, N, device)) {
    teams.flags = carver.take<int>(blocks(z));
    zeros = carver.take<T>(z.H > z.O ? z.H : z.O);
    size.zero_bytes = carver.used();
  }
  int blocks(const Sizes& z) const { return z.D * teams.row_blocks * teams.unit_blocks; }
};

std::string name_of(const char* pass, const Sizes& z, const Steps& s) {
  return std::string("plain ") + pass + " of " + kCellModes[int(z.cell)] +
         " (T=" + std::to_string(s.T) + " N=" + std::to_string(s.N) + " I=" + std::to_string(z.I) +
         " H=" + std::to_string(z.H) + ")";
}

template <typename T, typename Cell>
cuda::Workspace forward_of(const Forward<T>& f, const cuda::Device& device, char* memory,
                           void* stream) {
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
  common.size.bytes = carver.used();
  if (memory) {
    launch<Kernel>(name_of("forward", z, f.steps).c_str(), {common.blocks(z), kThreads}, stream,
                   arguments);
  }
  return common.size;
}

template <typename T, typename Cell>
cuda::Workspace backward_of(const Backward<T>& b, const cuda::Device& device, char* memory,
                            void* stream) {
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
  common.size.bytes = carver.used();
  if (memory) {
    launch<Kernel>(name_of("backward", z, b.steps).c_str(), {common.blocks(z), kThreads}, stream,
                   arguments);
    launch<PlainGradients<T, Cell>>(
        name_of("gradients", z, b.steps).c_str(),
        {device.multiprocessors * device.blocks_per_multiprocessor, kThreads}, stream,
        {b, common.zeros});
  }
  return common.size;
}

}  // namespace
}  // namespace RNNKERN_NAMESPACE

namespace cuda {

using namespace RNNKERN_NAMESPACE;

template <typename T>
Workspace forward_workspace(const Forward<T>& scan, const Device& device) {
  return with_cell(scan.sizes.cell, [&](auto cell) {
    return forward_of<T, decltype(cell)>(scan, device, nullptr, nullptr);
  });
}
template <typename T>
Workspace backward_workspace(const Backward<T>& scan, const Device& device) {
  return with_cell(scan.sizes.cell, [&](auto cell) {
    return backward_of<T, decltype(cell)>(scan, device, nullptr, nullptr);
  });
}
template <typename T>
void forward(const Forward<T>& scan, const Device& device, char* workspace, void* stream) {
  with_cell(scan.sizes.cell, [&](auto cell) {
    return forward_of<T, decltype(cell)>(scan, device, workspace, stream);
  });
}
template <typename T>
void backward(const Backward<T>& scan, const Device& device, char* workspace, void* stream) {
  with_cell(scan.sizes.cell, [&](auto cell) {
    return backward_of<T, decltype(cell)>(scan, device, workspace, stream);
  });
}

#define RNNKERN_INSTANTIATE(T)                                                 \
  template Workspace forward_workspace<T>(const Forward<T>&, const Device&);   \
  template Workspace backward_workspace<T>(const Backward<T>&, const Device&); \
  template void forward<T>(const Forward<T>&, const Device&, char*, void*);    \
  template void backward<T>(const Backward<T>&, const Device&, char*, void*);
RNNKERN_INSTANTIATE(float)
RNNKERN_INSTANTIATE(double)
RNNKERN_INSTANTIATE(Bf16)
RNNKERN_INSTANTIATE(F16)
#undef RNNKERN_INSTANTIATE

}  // namespace cuda
}  // namespace rnnkern
