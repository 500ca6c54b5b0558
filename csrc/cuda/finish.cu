// The second stage on the device; finish.h and gradient.h have what it computes.
#include "enqueue.h"
#include "gradient.h"
#include "machine.h"

namespace nmkern::cuda {
namespace {

constexpr int kFinishThreads = 256;

// Five blocks a multiprocessor, or three of eight rows a thread: left to choose, ptxas took registers for
// four of the former.
template <int rows>
__global__ void __launch_bounds__(kFinishThreads, rows == 1 ? 5 : 3) finish_kernel(const Finish f) {
  const Warp warp;
  warp.await_previous();
  finish_thread<rows>(f, warp, int64_t{blockIdx.x} * kFinishThreads + threadIdx.x);
}

template <int rows>
int launch_product(const Finish& f, cudaStream_t on) {
  const int64_t threads = (f.batch + rows - 1) / rows * f.outputs;
  const auto blocks = uint32_t((threads + kFinishThreads - 1) / kFinishThreads);
  return enqueue(finish_kernel<rows>, blocks, kFinishThreads, 0, on, f);
}

__global__ void __launch_bounds__(kGradientThreads) index_kernel(const Finish f) {
  __shared__ __align__(16) unsigned char shared[sizeof(IndexShared)];
  Warp warp;
  warp.await_previous();
  index_rows(f, warp, shared);
}

// Three blocks a multiprocessor: left to choose, ptxas aimed at four, and with 64 registers let most loads of
// a turn wait for each other.
template <Gradient kind>
__global__ void __launch_bounds__(kGradientThreads, 3) gradient_kernel(const Finish f) {
  __shared__ __align__(16) unsigned char shared[gradient_shared_bytes(kind) + 16];
  Warp warp;
  warp.await_previous();
  finish_with_gradient<kind>(f, warp, shared);
}

template <Gradient kind>
__global__ void __launch_bounds__(kGradientThreads) gather_kernel(const Finish f, uint32_t blocks_x) {
  const Warp warp;
  warp.await_previous();
  gather<kind>(f, warp, blockIdx.x % blocks_x, blockIdx.x / blocks_x);
}

template <Gradient kind>
int launch_gradient(const Finish& f, cudaStream_t on) {
  const auto chunks = uint32_t(chunks_of(f.batch));
  if (index_bytes(f))
    if (const int error = enqueue(index_kernel, chunks, kGradientThreads, 0, on, f)) return error;
  const dim3 grid(uint32_t((f.outputs + kLanes - 1) / kLanes), chunks);
  if (const int error = enqueue(gradient_kernel<kind>, grid, gradient_threads(f), 0, on, f)) return error;
  if constexpr (kind != Gradient::of_each)
    if (const int64_t rows = gather_rows(f)) {
      const int64_t blocks_x = gather_blocks_x(f);
      return enqueue(gather_kernel<kind>, uint32_t(blocks_x * rows), kGradientThreads, 0, on, f,
                     uint32_t(blocks_x));
    }
  return cudaSuccess;
}

}  // namespace

int launch_finish(const Finish& f, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (!f.gain_grad.data)
    return rows_at_once(f) == 1 ? launch_product<1>(f, on) : launch_product<kRowsAtOnce>(f, on);
  switch (gradient_of(f)) {
    case Gradient::of_one:
      return launch_gradient<Gradient::of_one>(f, on);
    case Gradient::of_each:
      return launch_gradient<Gradient::of_each>(f, on);
    default:
      return launch_gradient<Gradient::by_context>(f, on);
  }
}

}  // namespace nmkern::cuda
