// The arguments that kernels take by value, and how they read and write elements of any dtype.
#pragma once

#include "../matrix.h"
#include "decode.h"
#include "hash.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define NMKERN_DEVICE __device__ __forceinline__
#else
#define NMKERN_DEVICE inline
#endif

namespace nmkern::cuda {

// The host cannot look at contexts on a device: one out of range is read as the nearest, as Triton's kernels
// do, never out of bounds.
NMKERN_DEVICE int64_t bank_row(const Bank& bank, const int64_t* context, int64_t m) {
  const int64_t row = bank.rows == 1 ? 0 : context ? context[m] : m;
  return row < 0 ? 0 : row < bank.rows ? row : bank.rows - 1;
}

NMKERN_DEVICE float bank_value(const Bank& bank, const int64_t* context, int64_t m, int64_t features,
                               int64_t feature) {
  return bank.data[bank_row(bank, context, m) * features + feature];
}

NMKERN_DEVICE float float_of_half(uint16_t bits, Dtype dtype) {
  if (dtype == Dtype::bfloat16) return float_of(uint32_t{bits} << 16);
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(bits));
#else
  return from_float16(bits);
#endif
}

NMKERN_DEVICE float read_element(const Matrix& a, int64_t row, int64_t col) {
  const int64_t at = row * a.row_stride + col * a.col_stride;
  if (a.dtype == Dtype::float32) return static_cast<const float*>(a.data)[at];
  return float_of_half(static_cast<const uint16_t*>(a.data)[at], a.dtype);
}

NMKERN_DEVICE uint16_t half_of(float value, Dtype dtype) {
  const bool half = dtype == Dtype::float16;
#if defined(__CUDACC__)
  return half ? __half_as_ushort(__float2half_rn(value)) : __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  return half ? to_float16(value) : to_bfloat16(value);
#endif
}

// Two of them, the first in the low half: an instruction for each dtype, and a choice.
NMKERN_DEVICE uint32_t halves_of(float first, float second, Dtype dtype) {
#if defined(__CUDACC__)
  const __half2 half = __floats2half2_rn(first, second);
  const __nv_bfloat162 bfloat = __floats2bfloat162_rn(first, second);
  return dtype == Dtype::float16 ? reinterpret_cast<const uint32_t&>(half)
                                 : reinterpret_cast<const uint32_t&>(bfloat);
#else
  return half_of(first, dtype) | uint32_t{half_of(second, dtype)} << 16;
#endif
}

NMKERN_DEVICE void write_element(const Matrix& a, int64_t row, int64_t col, float value) {
  const int64_t at = row * a.row_stride + col * a.col_stride;
  if (a.dtype == Dtype::float32) {
    static_cast<float*>(a.data)[at] = value;
    return;
  }
  static_cast<uint16_t*>(a.data)[at] = half_of(value, a.dtype);
}

}  // namespace nmkern::cuda
