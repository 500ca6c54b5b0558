// The second stage on the device; finish.h and gradient.h have what it computes.
#include <cuda_runtime_api.h>

#include "gradient.h"
#include "machine.h"

namespace nmkern::cuda {
namespace {

constexpr int kFinishThreads = 256;

// Five blocks a multiprocessor, or three of eight rows a thread: left to choose, ptxas took registers for
// four of the former.
template <int rows>
__global__ void __launch_bounds__(kFinishThreads, rows == 1 ? 5 : 3) finish_kernel(const Finish f) {
  finish_thread<rows>(f, Warp{}, int64_t{blockIdx.x} * kFinishThreads + threadIdx.x);
}

template <int rows>
void launch_product(const Finish& f, cudaStream_t on) {
  const int64_t threads = (f.batch + rows - 1) / rows * f.outputs;
  const auto blocks = uint32_t((threads + kFinishThreads - 1) / kFinishThreads);
  finish_kernel<rows><<<blocks, kFinishThreads, 0, on>>>(f);
}

__global__ void __launch_bounds__(kGradientThreads) index_kernel(const Finish f) {
  __shared__ __align__(16) unsigned char shared[sizeof(IndexShared)];
  Warp warp;
  index_rows(f, warp, shared);
}

// Three blocks a multiprocessor: left to choose, ptxas aimed at four, and with 64 registers let most loads of
// a turn wait for each other.
template <Gradient kind>
__global__ void __launch_bounds__(kGradientThreads, 3) gradient_kernel(const Finish f) {
  __shared__ __align__(16) unsigned char shared[gradient_shared_bytes(kind) + 16];
  Warp warp;
  finish_with_gradient<kind>(f, warp, shared);
}

template <Gradient kind>
__global__ void __launch_bounds__(kGradientThreads) gather_kernel(const Finish f, uint32_t blocks_x) {
  gather<kind>(f, Warp{}, blockIdx.x % blocks_x, blockIdx.x / blocks_x);
}

template <Gradient kind>
void launch_gradient(const Finish& f, cudaStream_t on) {
  const auto chunks = uint32_t(chunks_of(f.batch));
  if (index_bytes(f)) index_kernel<<<chunks, kGradientThreads, 0, on>>>(f);
  const dim3 grid(uint32_t((f.outputs + kLanes - 1) / kLanes), chunks);
  gradient_kernel<kind><<<grid, gradient_threads(f), 0, on>>>(f);
  if constexpr (kind != Gradient::of_each)
    if (const int64_t rows = gather_rows(f)) {
      const int64_t blocks_x = gather_blocks_x(f);
      gather_kernel<kind><<<uint32_t(blocks_x * rows), kGradientThreads, 0, on>>>(f, uint32_t(blocks_x));
    }
}

}  // namespace

int launch_finish(const Finish& f, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (f.gain_grad.data) {
    switch (gradient_of(f)) {
      case Gradient::of_one:
        launch_gradient<Gradient::of_one>(f, on);
        break;
      case Gradient::of_each:
        launch_gradient<Gradient::of_each>(f, on);
        break;
      case Gradient::by_context:
        launch_gradient<Gradient::by_context>(f, on);
        break;
    }
  } else if (rows_at_once(f) == 1) {
    launch_product<1>(f, on);
  } else {
    launch_product<kRowsAtOnce>(f, on);
  }
  return cudaGetLastError();
}

}  // namespace nmkern::cuda
