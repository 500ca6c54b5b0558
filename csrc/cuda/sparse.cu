// The sparse projection on the device, and its launcher; sparse_kernel.h has what the kernels compute,
// sparse_plan.h which of them serve a call.
#include "enqueue.h"
#include "sparse.h"
#include "sparse_plan.h"
#include "threads.h"

namespace nmkern::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kTileThreads) forward_kernel(const Forward p) {
  extern __shared__ __align__(128) unsigned char shared[];
  Threads threads;
  threads.await_previous();
  forward_block<T>(p, threads, shared);
}

template <class T>
__global__ void __launch_bounds__(kDrawThreads) draw_kernel(const Drawing p) {
  const Threads threads;
  threads.await_previous();
  draw_block<T>(p, threads);
}

__global__ void __launch_bounds__(kDrawThreads) prepare_kernel(const Prepare p) {
  __shared__ float shared[kPrepareBytes / 4];
  Threads threads;
  threads.await_previous();
  prepare_block(p, threads, shared);
}

__global__ void __launch_bounds__(kColumnThreads) column_kernel(const Columns p) {
  extern __shared__ __align__(128) unsigned char shared[];
  Threads threads;
  threads.await_previous();
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
      if (const int error = enqueue(draw_kernel<T>, uint32_t(blocks), kDrawThreads, 0, stream, plan.drawing))
        return error;
    }
    const dim3 grid(uint32_t(plan.blocks_x), uint32_t(plan.blocks_y));
    return enqueue(forward_kernel<T>, grid, kTileThreads, plan.shared_bytes, stream, plan.forward);
  }
};

int launch_transposed(const Sparse& call, void* scratch, cudaStream_t stream) {
  TransposedPlan plan = transposed_plan_of(call);
  plan.place(scratch);
  if (const int error = cudaMemsetAsync(plan.prepare.bits, 0, plan.bits_bytes, stream)) return error;
  if (const int error =
          enqueue(prepare_kernel, uint32_t(plan.prepare_blocks), kDrawThreads, 0, stream, plan.prepare))
    return error;
  const dim3 grid(uint32_t(plan.blocks_x), uint32_t(plan.blocks_y));
  return enqueue(column_kernel, grid, kColumnThreads, kColumnBytes, stream, plan.columns);
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
