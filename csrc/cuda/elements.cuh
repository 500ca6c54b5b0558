// How kernels read and write elements of any dtype, one or several at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../matrix.h"
#include "decode.h"
#include "threads.cuh"

namespace nmkern::cuda {

// The host cannot look at contexts on a device: one out of range is read as the nearest, as Triton's kernels
// do, never out of bounds.
NMKERN_DEVICE int64_t bank_row(const Bank& bank, const int64_t* context, int64_t m) {
  const int64_t row = bank.rows == 1 ? 0 : context ? context[m] : m;
  return row < 0 ? 0 : row < bank.rows ? row : bank.rows - 1;
}

NMKERN_DEVICE float float_of_half(uint16_t bits, Dtype dtype) {
  if (dtype == Dtype::bfloat16) return float_of(uint32_t{bits} << 16);
  return __half2float(__ushort_as_half(bits));
}

NMKERN_DEVICE float read_element(const Matrix& a, int64_t row, int64_t col) {
  const int64_t at = row * a.row_stride + col * a.col_stride;
  if (a.dtype == Dtype::float32) return static_cast<const float*>(a.data)[at];
  return float_of_half(static_cast<const uint16_t*>(a.data)[at], a.dtype);
}

NMKERN_DEVICE uint16_t half_of(float value, Dtype dtype) {
  return dtype == Dtype::float16 ? __half_as_ushort(__float2half_rn(value))
                                 : __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

// Two of them, the first in the low half: an instruction for each dtype, and a choice.
NMKERN_DEVICE uint32_t halves_of(float first, float second, Dtype dtype) {
  const __half2 half = __floats2half2_rn(first, second);
  const __nv_bfloat162 bfloat = __floats2bfloat162_rn(first, second);
  return dtype == Dtype::float16 ? reinterpret_cast<const uint32_t&>(half)
                                 : reinterpret_cast<const uint32_t&>(bfloat);
}

NMKERN_DEVICE void write_element(const Matrix& a, int64_t row, int64_t col, float value) {
  const int64_t at = row * a.row_stride + col * a.col_stride;
  if (a.dtype == Dtype::float32) {
    static_cast<float*>(a.data)[at] = value;
    return;
  }
  static_cast<uint16_t*>(a.data)[at] = half_of(value, a.dtype);
}

// 4 * pieces consecutive elements of 16 bits.
template <int pieces>
NMKERN_DEVICE void load_elements(const uint16_t* x, uint32_t (&element)[pieces][2]) {
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

// Words of shared memory, aligned to all of them.
template <int count>
NMKERN_DEVICE void load_words(const void* from, uint32_t (&word)[count]) {
  static_assert(count == 2 || count == 4);
  if constexpr (count == 4) {
    const uint4 v = *static_cast<const uint4*>(from);
    word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
  } else {
    const uint2 v = *static_cast<const uint2*>(from);
    word[0] = v.x, word[1] = v.y;
  }
}

template <int count>
NMKERN_DEVICE void store_words(void* to, const uint32_t (&word)[count]) {
  static_assert(count == 2 || count == 4);
  if constexpr (count == 4)
    *static_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
  else
    *static_cast<uint2*>(to) = make_uint2(word[0], word[1]);
}

template <int count>
NMKERN_DEVICE void load_floats(const float* from, float (&value)[count]) {
  static_assert(count % 4 == 0);
#pragma unroll
  for (int i = 0; i < count; i += 4) {
    const float4 v = *reinterpret_cast<const float4*>(from + i);
    value[i] = v.x, value[i + 1] = v.y, value[i + 2] = v.z, value[i + 3] = v.w;
  }
}

// To global memory, said so: of a plain assignment the compiler makes four stores of 4 bytes, which write a
// quarter of what each of them touches.
NMKERN_DEVICE void store_four(float* to, float a, float b, float c, float d) {
  __stcg(reinterpret_cast<float4*>(to), make_float4(a, b, c, d));
}
// Of a matrix whose columns are neighbours, from an aligned place on.
NMKERN_DEVICE void store_four(const Matrix& a, int64_t row, int64_t col, const float (&v)[4]) {
  const int64_t at = row * a.row_stride + col;
  if (a.dtype == Dtype::float32) {
    store_four(static_cast<float*>(a.data) + at, v[0], v[1], v[2], v[3]);
  } else {
    const uint2 bits = make_uint2(halves_of(v[0], v[1], a.dtype), halves_of(v[2], v[3], a.dtype));
    __stcg(reinterpret_cast<uint2*>(static_cast<uint16_t*>(a.data) + at), bits);
  }
}

}  // namespace nmkern::cuda
