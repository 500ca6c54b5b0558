// The Machine of products on the device: the loads, stores and the table that they name through it.
#pragma once

#include "pack.h"
#include "threads.h"

namespace nmkern::cuda {

__device__ constexpr NormalTable kNormalTable = normal_table();

struct Warp : Threads {
  NMKERN_DEVICE const NormalTable& table() const { return kNormalTable; }

  // 4 * pieces consecutive elements of x.
  template <int pieces>
  NMKERN_DEVICE void load_elements(const uint16_t* x, uint32_t (&element)[pieces][2]) const {
    if constexpr (pieces % 2 == 0) {
#pragma unroll
      for (int i = 0; i < pieces; i += 2) {
        const uint4 v = reinterpret_cast<const uint4*>(x)[i / 2];
        element[i][0] = v.x, element[i][1] = v.y, element[i + 1][0] = v.z, element[i + 1][1] = v.w;
      }
    } else {
      static_assert(pieces == 1);
      const uint2 v = *reinterpret_cast<const uint2*>(x);
      element[0][0] = v.x, element[0][1] = v.y;
    }
  }

  NMKERN_DEVICE void load_floats(const float* from, float (&value)[kPacked]) const {
#pragma unroll
    for (int i = 0; i < kPacked; i += 4) {
      const float4 v = *reinterpret_cast<const float4*>(from + i);
      value[i] = v.x, value[i + 1] = v.y, value[i + 2] = v.z, value[i + 3] = v.w;
    }
  }
  NMKERN_DEVICE void store_packed(uint16_t* to, const uint32_t (&pair)[kPacked / 2]) const {
    *reinterpret_cast<uint4*>(to) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
  }

  // To global memory, said so: of a plain assignment the compiler makes four stores of 4 bytes, which write a
  // quarter of what each of them touches.
  NMKERN_DEVICE void store(float* to, float a, float b, float c, float d) const {
    __stcg(reinterpret_cast<float4*>(to), make_float4(a, b, c, d));
  }
};

}  // namespace nmkern::cuda
