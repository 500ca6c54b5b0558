// What the launchers share: rows of a strided matrix of any dtype as float32, and the parallel loop.
#pragma once

#include <algorithm>

#include "dense.h"

namespace nmkern::cpu {

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
