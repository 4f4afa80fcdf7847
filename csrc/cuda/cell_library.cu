// The CUDA library of a user's cell: cell_library.h. RNNKERN_ELEMENT is its type, RNNKERN_HEADERS
// the digest of these files; cells/list.h, whose only cell is RNNKERN_CELL, is that of the
// generated sources. With RNNKERN_SIMT it is plain C++, for the stand-in.
#include "cuda/cell_library.h"
#include "cuda/product.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

template <>
void start_product<RNNKERN_ELEMENT>(const cuda::Product& product, const Queue& queue);

}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern

#include "cuda/scan.cu"

// These functions of the extension are called through its Host.
namespace rnnkern::cuda {
namespace {

const Host* host = nullptr;

}  // namespace

Plan plan_for(const Problem& problem, const Device& device) {
  Plan plan;
  host->plan_for(&problem, &device, &plan);
  return plan;
}
int64_t window_steps(int64_t T, int64_t bytes_of_step, int buffers) {
  return host->window_steps(T, bytes_of_step, buffers);
}

bool has_library() { return host->has_library(); }
size_t library_bytes() { return host->library_bytes(); }
void* begin_products(int device, void* stream, char* workspace) {
  void* products = nullptr;
  Message message;
  expect(host->begin_products(device, stream, workspace, &products, &message), message);
  return products;
}
void multiply(void* products, const Product& product, bool tf32) {
  Message message;
  expect(host->multiply(products, &product, tf32, &message), message);
}
void end_products(void* products) { host->end_products(products); }

Lane take_lane(int device) {
  Lane lane;
  Message message;
  expect(host->take_lane(device, &lane, &message), message);
  return lane;
}
void give_back_lane(int device, Lane lane, void* main) { host->give_back_lane(device, lane, main); }
void order(void* from, void* to, void* event) {
  Message message;
  expect(host->order(from, to, event, &message), message);
}
void clear(char* memory, size_t bytes, void* stream) {
  Message message;
  expect(host->clear(memory, bytes, stream, &message), message);
}
int* place_to_give_up(const std::string& kernel) { return host->place_to_give_up(kernel.c_str()); }
std::string with_who_gave_up(const std::string& message) {
  Message whole;
  host->with_who_gave_up(message.c_str(), &whole);
  return whole.text;
}

}  // namespace rnnkern::cuda

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

template <>
void start_product<RNNKERN_ELEMENT>(const cuda::Product& product, const Queue& queue) {
  if (!queue.runs()) return;
  cuda::Call call = queue.call();
  call.stream = queue.stream();
  const cuda::Attempt attempt = {&call, &queue.device, queue.memory(), queue.what()};
  cuda::Message message;
  cuda::expect(cuda::host->start_product(&attempt, &product, &message), message);
}

namespace {

template <typename Scan>
cuda::Started start_here(const Scan* scan, const cuda::Attempt* attempt, size_t* bytes,
                         cuda::Message* message) {
  bool started = false;
  const bool done = cuda::caught(message, [&] {
    Queue queue(*attempt);
    started = start<RNNKERN_CELL>(*scan, queue);
    *bytes = queue.bytes();
  });
  return !done     ? cuda::Started::kFailed
         : started ? cuda::Started::kYes
                   : cuda::Started::kTooManyBlocks;
}

void connect(const cuda::Host* host) {
  cuda::host = host;
#ifdef RNNKERN_SIMT
  simt::streams_of_host = host->streams;
#endif
}

}  // namespace
}  // namespace RNNKERN_NAMESPACE
}  // namespace rnnkern

#define RNNKERN_TEXT_OF(name) #name
#define RNNKERN_TEXT(name) RNNKERN_TEXT_OF(name)

extern "C" __attribute__((visibility("default"))) const void* rnnkern_cuda_cell_library() {
  using namespace rnnkern;
  using T = RNNKERN_ELEMENT;
  static constexpr cuda::CellLibrary<T> library = {RNNKERN_HEADERS,
                                                   RNNKERN_NAMESPACE::RNNKERN_CELL::kMode,
                                                   RNNKERN_TEXT(RNNKERN_ELEMENT),
                                                   RNNKERN_NAMESPACE::connect,
                                                   RNNKERN_NAMESPACE::start_here<Forward<T>>,
                                                   RNNKERN_NAMESPACE::start_here<Backward<T>>,
                                                   RNNKERN_NAMESPACE::start_here<SecondOrder<T>>};
  return &library;
}
