// normal's table of codes on the device, and in a block's shared memory.
#pragma once

#include "decode.h"
#include "threads.cuh"

namespace nmkern::cuda {

__device__ constexpr NormalTable kNormalTable = normal_table();

// A thread loads an entry and stores its 32 copies, four at a time; neighbours begin at different ones, so
// that no bank is met twice. (A copy at a time, every load waited for the device's memory: 16 times in turn.)
template <Dtype kOperand, int threads>
NMKERN_DEVICE void stage_table(unsigned char* shared) {
  struct alignas(16) Copies {
    uint32_t code[4];
  };
  constexpr int kStores = kLanes / 4;
  for (int u = thread_id(); u < 256; u += threads) {
    const uint32_t code = kNormalTable.code<kOperand>(u);
#pragma unroll
    for (int i = 0; i < kStores; ++i)
      *reinterpret_cast<Copies*>(shared + u * kEntryBytes + (i + u) % kStores * 16) = {code, code, code,
                                                                                       code};
  }
}

}  // namespace nmkern::cuda
