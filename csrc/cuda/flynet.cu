// The fused FlyNet on the device, and its launcher; flynet_kernel.h has what the kernels compute,
// flynet_plan.h how a call is split.
#include "enqueue.h"
#include "flynet.h"
#include "flynet_plan.h"
#include "machine.h"

namespace nmkern::cuda {
namespace {

constexpr int kFinishThreads = 128;

__global__ void __launch_bounds__(kDrawThreads) draw_kernel(const Drawing p) {
  const Warp warp;
  warp.await_previous();
  draw_block<FlyTile>(p, warp);
}

__global__ void __launch_bounds__(kTileThreads) logits_kernel(const Logits p) {
  extern __shared__ __align__(128) unsigned char shared[];
  Warp warp;
  warp.await_previous();
  logits_block(p, warp, shared);
}

__global__ void __launch_bounds__(kTileThreads) gain_grad_kernel(const GainGrad p) {
  extern __shared__ __align__(128) unsigned char shared[];
  Warp warp;
  warp.await_previous();
  gain_grad_block(p, warp, shared);
}

__global__ void __launch_bounds__(kFinishThreads) finish_logits_kernel(const FinishLogits f) {
  Warp{}.await_previous();
  const int64_t i = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  if (i < f.batch * f.classes) finish_logit<Warp>(f, i / f.classes, i % f.classes);
}

__global__ void __launch_bounds__(kFinishThreads) finish_gain_grad_kernel(const FinishGainGrad f) {
  Warp{}.await_previous();
  const int64_t i = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  if (i < f.values) finish_gain_grad<Warp>(f, i);
}

uint32_t finish_blocks(int64_t values) { return uint32_t((values + kFinishThreads - 1) / kFinishThreads); }

int launch_logits(const FlyNet& net, const FlyPlan& plan, float* partial, cudaStream_t stream) {
  const Logits logits = logits_of(net, plan, partial);
  const dim3 grid(uint32_t(plan.row_groups), uint32_t(plan.splits));
  if (const int error = enqueue(logits_kernel, grid, kTileThreads, plan.shared_bytes, stream, logits))
    return error;
  return enqueue(finish_logits_kernel, finish_blocks(net.batch * net.classes), kFinishThreads, 0, stream,
                 finish_of(net, logits, plan.splits));
}

int launch_gain_grad(const FlyNet& net, const FlyPlan& plan, float* partial, cudaStream_t stream) {
  const GainGrad grad = gain_grad_of(net, plan, partial);
  const int64_t values = grad.rows * net.hidden;
  if (grad.rows > 1 && !grad.each)
    if (const int error = cudaMemsetAsync(grad.result, 0, plan.splits * values * 4, stream)) return error;
  const dim3 grid(uint32_t(plan.splits), uint32_t(plan.unit_groups));
  const int error = enqueue(gain_grad_kernel, grid, kTileThreads, plan.shared_bytes, stream, grad);
  if (error || plan.partial_bytes == 0) return error;
  return enqueue(finish_gain_grad_kernel, finish_blocks(values), kFinishThreads, 0, stream,
                 {partial, plan.splits, values, net.gain_grad.data});
}

}  // namespace

int64_t flynet_scratch(const FlyNet& net, int64_t shared_bytes) { return scratch_of(net, shared_bytes); }

int flynet_sweep(const FlyNet& net, void* scratch, void* stream) {
  if (net.batch == 0) return cudaSuccess;
  const auto queue = static_cast<cudaStream_t>(stream);
  FlyPlan plan = plan_of(net);
  float* partial = plan.place(scratch);
  if (const int error = cudaMemsetAsync(plan.drawing.counts, 0, plan.counts_bytes, queue)) return error;
  if (const int error =
          enqueue(draw_kernel, uint32_t(plan.draw_blocks()), kDrawThreads, 0, queue, plan.drawing))
    return error;
  return is_backward(net) ? launch_gain_grad(net, plan, partial, queue)
                          : launch_logits(net, plan, partial, queue);
}

}  // namespace nmkern::cuda
