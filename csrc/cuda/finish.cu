// The second stage on the device; finish.h has what it computes.
#include "finish.h"

#include <cuda_runtime_api.h>

#include "machine.h"

namespace nmkern::cuda {
namespace {

constexpr int kFinishThreads = 256;

__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const Finish f) {
  const int64_t i = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  if (i >= f.batch * f.outputs) return;
  const int64_t m = i / f.outputs, n = i % f.outputs;
  finish_one<Warp>(f, m, n, unmodulated<Warp>(f, m, n));
}

// Eight blocks a multiprocessor at least: left to choose, ptxas spilled on sm_80.
__global__ void __launch_bounds__(kThreads, 8) finish_gradient_kernel(const Finish f) {
  __shared__ float shared[kFinishRows * kLanes];
  Warp warp;
  finish_with_gradient(f, warp, shared);
}

}  // namespace

int launch_finish(const Finish& f, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (f.gain_grad.data)
    finish_gradient_kernel<<<uint32_t((f.outputs + kLanes - 1) / kLanes), kThreads, 0, on>>>(f);
  else
    finish_kernel<<<uint32_t((f.batch * f.outputs + kFinishThreads - 1) / kFinishThreads), kFinishThreads, 0,
                    on>>>(f);
  return cudaGetLastError();
}

}  // namespace nmkern::cuda
