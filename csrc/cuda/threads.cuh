// What every kernel of the library begins with: who a thread is, and when it may touch memory.
#pragma once

#include "fragment.h"

#define NMKERN_DEVICE __device__ __forceinline__

namespace nmkern::cuda {

NMKERN_DEVICE int thread_id() { return int(threadIdx.x); }
NMKERN_DEVICE int lane_id() { return int(threadIdx.x) % kLanes; }

// Until the kernels enqueued before have ended, and what they wrote can be read (see enqueue.h); the one
// enqueued next may begin.
NMKERN_DEVICE void await_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// What a lane of the warp has; all lanes ask. A lane out of range is taken modulo 32.
template <class Value>
NMKERN_DEVICE Value from_lane(Value value, int lane) {
  return __shfl_sync(0xFFFFFFFF, value, lane);
}

}  // namespace nmkern::cuda
