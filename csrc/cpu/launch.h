// What the launchers share: rows of a strided matrix of any dtype as float32, and the parallel loop.
#pragma once

#include <algorithm>
#include <bit>

#include "dense.h"

namespace nmkern::cpu {

inline float from_bfloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
inline uint16_t to_bfloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return uint16_t(value == value ? rounded : bits >> 16 | 0x40);
}

// float16 by hand: GCC has no _Float16 in C++ before 12 (AArch64: 13), and where the CPU is not known to
// convert, _Float16 is a call of a libgcc of GCC 12 for each element, which older systems have not.
inline float from_float16(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = bits & 0x7FFF;
  const uint32_t subnormal = std::bit_cast<uint32_t>(float(int(magnitude)) * 0x1p-24f);
  const uint32_t normal = (magnitude << 13) + ((127 - 15) << 23);
  const uint32_t special = (magnitude << 13) | 0x7F800000;
  return std::bit_cast<float>(sign | (magnitude < 0x400    ? subnormal
                                      : magnitude < 0x7C00 ? normal
                                                           : special));
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
inline uint16_t to_float16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  // 0.5 has 2^-24 as its unit in the last place, as subnormals of float16 have.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - std::bit_cast<uint32_t>(0.5f);
  // The carry of a mantissa that rounds up goes into the exponent, at the end of the range to infinity.
  const uint32_t normal = (magnitude - ((127 - 15) << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  const uint32_t special = magnitude > 0x7F800000 ? 0x7E00 | (magnitude >> 13 & 0x3FF) : 0x7C00;
  return uint16_t(sign | (magnitude < 0x38800000   ? subnormal
                          : magnitude < 0x47800000 ? normal
                                                   : special));
}

template <class T, class Convert>
inline void read(const T* from, int64_t stride, int64_t count, float* to, Convert convert) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = convert(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = convert(from[i * stride]);
  }
}

template <class T, class Convert>
inline void write(T* to, int64_t stride, int64_t count, const float* from, Convert convert) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = convert(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i * stride] = convert(from[i]);
  }
}

// a[row, first : first + count] -> to
inline void read_row(const Matrix& a, int64_t row, int64_t first, int64_t count, float* to) {
  const int64_t at = row * a.row_stride + first * a.col_stride;
  switch (a.dtype) {
    case Dtype::float32:
      return read(static_cast<const float*>(a.data) + at, a.col_stride, count, to,
                  [](float v) { return v; });
    case Dtype::float16:
      return read(static_cast<const uint16_t*>(a.data) + at, a.col_stride, count, to, from_float16);
    case Dtype::bfloat16:
      return read(static_cast<const uint16_t*>(a.data) + at, a.col_stride, count, to, from_bfloat16);
  }
}

// from -> a[row, first : first + count]
inline void write_row(const Matrix& a, int64_t row, int64_t first, int64_t count, const float* from) {
  const int64_t at = row * a.row_stride + first * a.col_stride;
  switch (a.dtype) {
    case Dtype::float32:
      return write(static_cast<float*>(a.data) + at, a.col_stride, count, from,
                   [](float v) { return v; });
    case Dtype::float16:
      return write(static_cast<uint16_t*>(a.data) + at, a.col_stride, count, from, to_float16);
    case Dtype::bfloat16:
      return write(static_cast<uint16_t*>(a.data) + at, a.col_stride, count, from, to_bfloat16);
  }
}

// Tasks, of `cost` vector operations each, that are worth waking a thread for: about 20 us of them.
inline int64_t grain(int64_t cost) { return (1 << 16) / std::max<int64_t>(1, cost) + 1; }

template <class Body>
void parallel_for(const Runtime& runtime, int64_t size, int64_t grain, const Body& body) {
  runtime.parallel_for(
      size, grain,
      [](int64_t begin, int64_t end, void* self) { (*static_cast<const Body*>(self))(begin, end); },
      const_cast<Body*>(&body));
}

}  // namespace nmkern::cpu
