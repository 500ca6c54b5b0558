// How kernels read a call's x.
#pragma once

#include "elements.cuh"
#include "pack_plan.h"

namespace nmkern::cuda {

// Elements first - skip and on of row m, times those of `gain`; zeros outside of it.
NMKERN_DEVICE void input_values(const Input& p, int64_t m, const float* gain, int64_t first,
                                float (&v)[kPacked]) {
  if (p.vectors && first + kPacked <= p.reduction) {
    float factor[kPacked] = {1, 1, 1, 1, 1, 1, 1, 1};
    if (gain) load_floats(gain + first, factor);  // in flight before x is waited for
    if (p.x.dtype == Dtype::float32) {
      load_floats(static_cast<const float*>(p.x.data) + m * p.x.row_stride + first, v);
    } else {
      uint32_t pair[kPacked / 4][2];
      load_elements(static_cast<const uint16_t*>(p.x.data) + m * p.x.row_stride + first, pair);
#pragma unroll
      for (int i = 0; i < kPacked; ++i)
        v[i] = float_of_half(uint16_t(pair[i / 4][i / 2 % 2] >> (i % 2 * 16)), p.x.dtype);
    }
#pragma unroll
    for (int i = 0; i < kPacked; ++i) v[i] = __fmul_rn(v[i], factor[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kPacked; ++i) {
      const int64_t k = first + i - p.skip;
      const bool inside = k >= 0 && k < p.reduction;
      v[i] = inside ? read_element(p.x, m, k) : 0.0f;
      if (inside && gain) v[i] = __fmul_rn(v[i], gain[k]);
    }
  }
}

}  // namespace nmkern::cuda
