// The Machine of every block on the device: who a thread is, whom it waits for.
#pragma once

#include "fragment.h"
#include "product.h"

namespace nmkern::cuda {

struct Threads {
  NMKERN_DEVICE int thread() const { return int(threadIdx.x); }
  NMKERN_DEVICE int lane() const { return int(threadIdx.x) % kLanes; }
  NMKERN_DEVICE uint32_t block_x() const { return blockIdx.x; }
  NMKERN_DEVICE uint32_t block_y() const { return blockIdx.y; }
  NMKERN_DEVICE uint32_t block_z() const { return blockIdx.z; }
  NMKERN_DEVICE void wait() const { __syncthreads(); }
  // Until the kernels enqueued before have ended, and what they wrote can be read (see enqueue.h); the one
  // enqueued next may begin.
  NMKERN_DEVICE void await_previous() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  }
  NMKERN_DEVICE void wait_warp() const { __syncwarp(); }
  // What a lane of the warp has; all lanes ask. A lane out of range is taken modulo 32.
  template <class Value>
  NMKERN_DEVICE Value from_lane(Value value, int lane) const {
    return __shfl_sync(0xFFFFFFFF, value, lane);
  }
  NMKERN_DEVICE void add(uint32_t* to, uint32_t value) const { atomicAdd(to, value); }
  NMKERN_DEVICE void set_bits(uint32_t* to, uint32_t bits) const { atomicOr(to, bits); }
  // All lanes of the warp call it.
  NMKERN_DEVICE void maximum(uint32_t* to, uint32_t value) const {
    value = __reduce_max_sync(0xFFFFFFFF, value);
    if (lane() == 0) atomicMax(to, value);
  }

  // Never contracted into one multiply-add.
  static NMKERN_DEVICE float rounded_sum(float a, float b) { return __fadd_rn(a, b); }
  static NMKERN_DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }
  static NMKERN_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
};

}  // namespace nmkern::cuda
