// The sparse projection on the device, and its launcher; sparse_kernel.h has what the kernels compute,
// sparse_plan.h which of them serve a call.
#include "sparse.h"

#include <cuda_runtime_api.h>

#include "sparse_plan.h"
#include "threads.h"

namespace nmkern::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kTileThreads) forward_kernel(const Forward p) {
  extern __shared__ __align__(128) unsigned char shared[];
  Threads threads;
  forward_block<T>(p, threads, shared);
}

template <class T>
__global__ void __launch_bounds__(kDrawThreads) draw_kernel(const Drawing p) {
  draw_block<T>(p, Threads{});
}

__global__ void __launch_bounds__(kDrawThreads) prepare_kernel(const Prepare p) {
  __shared__ float shared[kPrepareBytes / 4];
  Threads threads;
  prepare_block(p, threads, shared);
}

__global__ void __launch_bounds__(kColumnThreads) column_kernel(const Columns p) {
  extern __shared__ __align__(128) unsigned char shared[];
  Threads threads;
  column_block(p, threads, shared);
}

struct LaunchForward {
  void* scratch;
  cudaStream_t stream;

  template <class T>
  int operator()(ForwardPlan plan) const {
    if (plan.scratch_bytes) {
      plan.forward.columns = plan.drawing.columns = static_cast<uint32_t*>(scratch);
      const int64_t blocks = (plan.drawing.stride + kDrawThreads - 1) / kDrawThreads;
      draw_kernel<T><<<uint32_t(blocks), kDrawThreads, 0, stream>>>(plan.drawing);
      if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
    }
    const auto kernel = forward_kernel<T>;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared_bytes));
    if (error != cudaSuccess) return error;
    const dim3 grid(uint32_t(plan.blocks_x), uint32_t(plan.blocks_y));
    kernel<<<grid, kTileThreads, plan.shared_bytes, stream>>>(plan.forward);
    return cudaGetLastError();
  }
};

int launch_transposed(const Sparse& call, void* scratch, cudaStream_t stream) {
  TransposedPlan plan = transposed_plan_of(call);
  plan.place(scratch);
  cudaError_t error = cudaMemsetAsync(plan.prepare.bits, 0, plan.bits_bytes, stream);
  if (error != cudaSuccess) return error;
  prepare_kernel<<<uint32_t(plan.prepare_blocks), kDrawThreads, 0, stream>>>(plan.prepare);
  if (error = cudaGetLastError(); error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(column_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kColumnBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(uint32_t(plan.blocks_x), uint32_t(plan.blocks_y));
  column_kernel<<<grid, kColumnThreads, kColumnBytes, stream>>>(plan.columns);
  return cudaGetLastError();
}

}  // namespace

int64_t sparse_scratch(const Sparse& call, int64_t shared_bytes) { return scratch_of(call, shared_bytes); }

int sparse_product(const Sparse& call, int64_t shared_bytes, void* scratch, void* stream) {
  if (call.batch == 0 || call.rows == 0 || call.cols == 0) return cudaSuccess;
  const auto queue = static_cast<cudaStream_t>(stream);
  if (call.transposed) return launch_transposed(call, scratch, queue);
  return with_plan(call, shared_bytes, LaunchForward{scratch, queue},
                   [] { return int(cudaErrorInvalidValue); });
}

}  // namespace nmkern::cuda
