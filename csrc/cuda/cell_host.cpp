// What the extension lends to the libraries of cells, and how it calls them: cell_library.h.
#include <string>

#include "cuda/cell_libraries.h"
#include "cuda/cell_library.h"
#include "cuda/product.h"

namespace rnnkern::cuda {
namespace {

using RNNKERN_NAMESPACE::Queue;

void start_any_product(const Queue& queue, const Product& product) {
  using namespace RNNKERN_NAMESPACE;
  switch (product.operands) {
    case Number::kFloat:
      return start_product<float>(product, queue);
    case Number::kDouble:
      return start_product<double>(product, queue);
    case Number::kBf16:
      return start_product<Bf16>(product, queue);
    case Number::kF16:
      return start_product<F16>(product, queue);
  }
}

constexpr Host kHost = {
    .plan_for = [](const Problem* problem, const Device* device,
                   Plan* plan) { *plan = plan_for(*problem, *device); },
    .window_steps = window_steps,
    .has_library = has_library,
    .library_bytes = library_bytes,
    .begin_products =
        [](int device, void* stream, char* workspace, void** products, Message* message) {
          return caught(message, [&] { *products = begin_products(device, stream, workspace); });
        },
    .multiply =
        [](void* products, const Product* product, bool tf32, Message* message) {
          return caught(message, [&] { multiply(products, *product, tf32); });
        },
    .end_products = end_products,
    .start_product =
        [](const Attempt* attempt, const Product* product, Message* message) {
          return caught(message, [&] { start_any_product(Queue(*attempt), *product); });
        },
    .take_lane =
        [](int device, Lane* lane, Message* message) {
          return caught(message, [&] { *lane = take_lane(device); });
        },
    .give_back_lane = give_back_lane,
    .order = [](void* from, void* to, void* event,
                Message* message) { return caught(message, [&] { order(from, to, event); }); },
    .clear =
        [](char* memory, size_t bytes, void* stream, Message* message) {
          return caught(message, [&] { clear(memory, bytes, stream); });
        },
    .place_to_give_up = [](const char* kernel) { return place_to_give_up(kernel); },
    .with_who_gave_up = [](const char* message,
                           Message* whole) { whole->write(with_who_gave_up(message).c_str()); },
#ifdef RNNKERN_SIMT
    .streams = simt::streams,
#endif
};

template <typename T>
StartScan<Forward<T>> start_of(const CellLibrary<T>& library, const Forward<T>&) {
  return library.forward;
}
template <typename T>
StartScan<Backward<T>> start_of(const CellLibrary<T>& library, const Backward<T>&) {
  return library.backward;
}
template <typename T>
StartScan<SecondOrder<T>> start_of(const CellLibrary<T>& library, const SecondOrder<T>&) {
  return library.second_order;
}

}  // namespace

const Host& host() { return kHost; }

template <typename Scan>
bool start_in_library(const Scan& scan, const Attempt& attempt, size_t* bytes) {
  using T = typename Scan::Element;
  const auto& library = *static_cast<const CellLibrary<T>*>(
      library_of(scan.sizes.cell, place_of_element<T>(), attempt.call->device));
  Message message;
  const Started started = start_of(library, scan)(&scan, &attempt, bytes, &message);
  expect(started != Started::kFailed, message);
  return started == Started::kYes;
}

#define RNNKERN_INSTANTIATE(T)                                                \
  template bool start_in_library(const Forward<T>&, const Attempt&, size_t*); \
  template bool start_in_library(const Backward<T>&, const Attempt&, size_t*);
RNNKERN_INSTANTIATE(float)
RNNKERN_INSTANTIATE(double)
RNNKERN_INSTANTIATE(Bf16)
RNNKERN_INSTANTIATE(F16)
#undef RNNKERN_INSTANTIATE
template bool start_in_library(const SecondOrder<float>&, const Attempt&, size_t*);
template bool start_in_library(const SecondOrder<double>&, const Attempt&, size_t*);

}  // namespace rnnkern::cuda
