// The weights of one direction as the forward pass reads them. They are packed for one call, or
// once for all calls if the layer is frozen. The same code lays out both.
#pragma once

#include "cpu/panels.h"
#include "plan.h"
#include "scan.h"
#include "workspace.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

// Calls f(p) for the thread's part of the panels.
template <typename F>
void for_share(int64_t panels, int thread, int threads, F f) {
  for (int64_t p = thread; p < panels; p += threads) f(p);
}
// Packs the thread's part of a matrix that has room for it.
template <typename Matrix>
void pack_share(const Matrix& w, int thread, int threads) {
  if (w.packed) for_share(w.count(), thread, threads, [&](int64_t p) { w.pack(p); });
}

template <typename T, typename Cell>
struct DirectionWeights {
  using Panels = UnitPanels<T, Cell>;
  using A = Compute<T>;
  static constexpr int64_t kAccWidth = Panels::kAccWidth;

  A* bias = nullptr;  // [panels][kAccWidth]
  StepWeights<T, Cell, Role::kInput> input;
  StepWeights<T, Cell, Role::kRecurrent> recurrent;
  ColumnPanels<T> projection;  // without room if there is none

  DirectionWeights() = default;
  // The plan says which matrices are packed. `w` is not read before `pack`, and not at all if the
  // layer is frozen.
  DirectionWeights(const Sizes& z, const Weights<T>& w, const Plan& plan, Carver& carver)
      : bias(carver.take<A>(Panels{z.H}.count() * kAccWidth)),
        input{
            .panels = {z.H}, .w = w.w_ih, .row_stride = w.w_ih_row, .K = z.I, .scales = w.scale_ih},
        recurrent{
            .panels = {z.H}, .w = w.w_hh, .row_stride = w.w_hh_row, .K = z.O, .scales = w.scale_hh},
        projection{.K = z.H,
                   .width = z.O,
                   .w = w.w_hr,
                   .row_stride = w.w_hr_row,
                   .transposed = true,
                   .scales = w.scale_hr,
                   .frozen = !w.w_ih} {
    if (plan.input == Reading::kPacked) input.take_room(carver);
    if (Cell::kShape.recurrent && plan.recurrent == Reading::kPacked) recurrent.take_room(carver);
    if (z.projected) projection.take_room(carver);
  }

  void pack(const Weights<T>& w, int thread, int threads) const {
    for_share(input.count(), thread, threads,
              [&](int64_t p) { input.panels.pack_bias(p, w, bias + p * kAccWidth); });
    pack_share(input, thread, threads);
    pack_share(recurrent, thread, threads);
    pack_share(projection, thread, threads);
  }

  void unpack(const Matrices<A>& to) const {
    if (to.w_ih) input.unpack(to.w_ih);
    if (to.w_hh) recurrent.unpack(to.w_hh);
    if (to.w_hr) projection.unpack_transposed(to.w_hr);
  }
};

// Calls f(direction, its weights), which are laid out in `memory`, one direction behind the other,
// or only counted if it is null. Returns the bytes that they take.
template <typename T, typename Cell, typename F>
size_t for_frozen_directions(const Sizes& sizes, const Weights<T>* weights, char* memory, F f) {
  Carver carver(memory);
  for (int d = 0; d < sizes.D; ++d) {
    const DirectionWeights<T, Cell> of(sizes, weights ? weights[d] : Weights<T>{}, Plan(), carver);
    if (memory) f(d, of);
  }
  return carver.used();
}

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern
