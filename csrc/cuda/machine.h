// The device's machine: who a thread is, and the instructions that kernels name through it.
#pragma once

#include "product.h"

namespace nmkern::cuda {

__device__ constexpr NormalTable kNormalTable = normal_table();

struct Warp {
  NMKERN_DEVICE int thread() const { return int(threadIdx.x); }
  NMKERN_DEVICE int lane() const { return int(threadIdx.x) % kLanes; }
  NMKERN_DEVICE uint32_t block_x() const { return blockIdx.x; }
  NMKERN_DEVICE uint32_t block_y() const { return blockIdx.y; }
  NMKERN_DEVICE uint32_t block_z() const { return blockIdx.z; }
  NMKERN_DEVICE const NormalTable& table() const { return kNormalTable; }
  NMKERN_DEVICE void wait() const { __syncthreads(); }

  // 4 * pieces consecutive elements of x.
  template <int pieces>
  NMKERN_DEVICE void load_elements(const uint16_t* x, uint32_t (&element)[pieces][2]) const {
    if constexpr (pieces % 2 == 0) {
#pragma unroll
      for (int i = 0; i < pieces; i += 2) {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(x) + i / 2);
        element[i][0] = v.x, element[i][1] = v.y, element[i + 1][0] = v.z, element[i + 1][1] = v.w;
      }
    } else {
      static_assert(pieces == 1);
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(x));
      element[0][0] = v.x, element[0][1] = v.y;
    }
  }

  NMKERN_DEVICE void store(float* to, float a, float b, float c, float d) const {
    *reinterpret_cast<float4*>(to) = make_float4(a, b, c, d);
  }

  // Never contracted into one multiply-add.
  static NMKERN_DEVICE float rounded_sum(float a, float b) { return __fadd_rn(a, b); }
  static NMKERN_DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }
};

}  // namespace nmkern::cuda
