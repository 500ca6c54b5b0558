// Packing on the device, and its launcher; pack.h has what it computes.
#include "enqueue.h"
#include "machine.h"
#include "pack.h"

namespace nmkern::cuda {
namespace {

__global__ void __launch_bounds__(kPackThreads) pack_copy_kernel(const Pack p) {
  const Warp warp;
  warp.await_previous();
  const int64_t at = int64_t{blockIdx.x} * kPackThreads + threadIdx.x;
  if (at < p.count()) pack_copy(p, warp, at);
}

// One block a multiprocessor is enough: left to choose, ptxas aimed at three and spilled.
__global__ void __launch_bounds__(kPackThreads, 1) pack_row_kernel(const Pack p) {
  __shared__ uint32_t largest;
  Warp warp;
  warp.await_previous();
  pack_row(p, warp, &largest);
}

}  // namespace

int launch_pack(const Pack& pack, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (pack.scaled) return enqueue(pack_row_kernel, uint32_t(pack.batch), kPackThreads, 0, on, pack);
  const int64_t blocks = (pack.count() + kPackThreads - 1) / kPackThreads;
  return enqueue(pack_copy_kernel, uint32_t(blocks), kPackThreads, 0, on, pack);
}

}  // namespace nmkern::cuda
