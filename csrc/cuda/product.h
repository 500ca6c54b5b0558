// The arguments that kernels take by value, and how they read and write elements of any dtype.
#pragma once

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

enum class Dtype { float32, bfloat16, float16 };

struct Matrix {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t row_stride = 0, col_stride = 0;
};

// A bank of float32 vectors [rows, features], contiguous. Row m reads row 0 of a bank of one row, else
// context[m], else m.
struct Bank {
  const float* data = nullptr;
  int64_t rows = 0;
};

NMKERN_DEVICE float bank_value(const Bank& bank, const int64_t* context, int64_t m, int64_t features,
                               int64_t feature) {
  const int64_t row = bank.rows == 1 ? 0 : context ? context[m] : m;
  return bank.data[row * features + feature];
}

NMKERN_DEVICE float read_element(const Matrix& a, int64_t row, int64_t col) {
  const int64_t at = row * a.row_stride + col * a.col_stride;
  if (a.dtype == Dtype::float32) return static_cast<const float*>(a.data)[at];
  const uint16_t bits = static_cast<const uint16_t*>(a.data)[at];
  if (a.dtype == Dtype::bfloat16) return float_of(uint32_t{bits} << 16);
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(bits));
#else
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return float(half);
#endif
}

NMKERN_DEVICE uint16_t round_to_bfloat16(float value) {
#if defined(__CUDACC__)
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return uint16_t(value == value ? rounded : bits >> 16 | 0x40);
#endif
}

NMKERN_DEVICE void write_element(const Matrix& a, int64_t row, int64_t col, float value) {
  const int64_t at = row * a.row_stride + col * a.col_stride;
  if (a.dtype == Dtype::float32) {
    static_cast<float*>(a.data)[at] = value;
    return;
  }
  uint16_t bits = round_to_bfloat16(value);
  if (a.dtype == Dtype::float16) {
#if defined(__CUDACC__)
    bits = __half_as_ushort(__float2half_rn(value));
#else
    const _Float16 half = _Float16(value);
    std::memcpy(&bits, &half, 2);
#endif
  }
  static_cast<uint16_t*>(a.data)[at] = bits;
}

}  // namespace nmkern::cuda
