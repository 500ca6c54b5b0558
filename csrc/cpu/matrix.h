// Element access to a strided matrix of any of the dtypes, as float32.
#pragma once

#include <cstring>

#include "dense.h"

namespace nmkern::cpu {

inline float load(const Matrix& a, int64_t row, int64_t col) {
  const int64_t at = row * a.row_stride + col * a.col_stride;
  switch (a.dtype) {
    case Dtype::float32: return static_cast<const float*>(a.data)[at];
    case Dtype::float16: return float(static_cast<const _Float16*>(a.data)[at]);
    case Dtype::bfloat16: {
      const uint32_t bits = uint32_t(static_cast<const uint16_t*>(a.data)[at]) << 16;
      float value;
      std::memcpy(&value, &bits, 4);
      return value;
    }
  }
  __builtin_unreachable();
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline void store(const Matrix& a, int64_t row, int64_t col, float value) {
  const int64_t at = row * a.row_stride + col * a.col_stride;
  switch (a.dtype) {
    case Dtype::float32: static_cast<float*>(a.data)[at] = value; return;
    case Dtype::float16: static_cast<_Float16*>(a.data)[at] = _Float16(value); return;
    case Dtype::bfloat16: static_cast<uint16_t*>(a.data)[at] = to_bfloat16(value); return;
  }
}

template <class Body>
void parallel_for(const Runtime& runtime, int64_t size, int64_t grain, const Body& body) {
  runtime.parallel_for(
      size, grain,
      [](int64_t begin, int64_t end, void* self) { (*static_cast<const Body*>(self))(begin, end); },
      const_cast<Body*>(&body));
}

}  // namespace nmkern::cpu
