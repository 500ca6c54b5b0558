// What the launchers share: rows of a strided matrix of any dtype as float32, and the parallel loop.
#pragma once

#include <algorithm>
#include <atomic>

#include "dense.h"

namespace nmkern::cpu {

template <class T, class Element, class Convert>
inline void read(const T* from, int64_t stride, int64_t count, Element* to, Convert convert) {
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

// How many threads a loop over `size` tasks has use for; each is told apart by a number below that.
inline int64_t workers(const Runtime& runtime, int64_t size, int64_t grain) {
  return std::max<int64_t>(1, std::min(runtime.threads, (size + grain - 1) / grain));
}

// body(begin, end, worker) on ranges that cover [0, size), several a worker: half of an even share of what is left,
// at least one task, to whichever asks next. Cores are not alike (other programs, efficiency cores), and with
// equal shares the slowest one sets the time.
template <class Body>
void parallel_for(const Runtime& runtime, int64_t size, int64_t grain, const Body& body) {
  struct Loop {
    const Body& body;
    const int64_t size, workers;
    std::atomic<int64_t> next{0}, arrived{0};

    void run() {
      const int64_t worker = arrived.fetch_add(1);
      for (int64_t begin = next.load(); begin < size;) {
        const int64_t end = begin + std::max<int64_t>(1, (size - begin) / (2 * workers));
        if (!next.compare_exchange_weak(begin, end)) continue;
        body(begin, end, worker);
        begin = next.load();
      }
    }
  } loop{body, size, workers(runtime, size, grain)};
  if (loop.workers == 1) {
    if (size > 0) body(0, size, 0);
    return;
  }
  runtime.parallel_for(
      loop.workers, 1, [](int64_t, int64_t, void* self) { static_cast<Loop*>(self)->run(); }, &loop);
}

}  // namespace nmkern::cpu
