// What the kernels of the second stage share: sums of the splits, rows of a bank, rows of y.
#pragma once

#include "elements.cuh"
#include "finish.h"

namespace nmkern::cuda {

// z += the splits' sums, `step` of them at a time: all their loads are in flight before the first is added.
// What is past the last split adds 0, which changes no bit: a sum that starts from +0 is never -0.
template <int step, int count>
NMKERN_DEVICE void add_splits(const Finish& f, int64_t first, int rows, int64_t n, float (&z)[count]) {
  for (int64_t s = 0; s < f.splits; s += step) {
    float part[step][count];
#pragma unroll
    for (int j = 0; j < step; ++j) {
      const bool there = step == 1 || s + j < f.splits;
      const float* from = f.partial + ((s + j) * f.batch + first) * f.partial_stride + f.skip + n;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        part[j][i] = there ? *from : 0;
        from += i + 1 < rows ? f.partial_stride : 0;
      }
    }
#pragma unroll
    for (int j = 0; j < step; ++j)
#pragma unroll
      for (int i = 0; i < count; ++i) z[i] = __fadd_rn(z[i], part[j][i]);
  }
}

// z of dense.h for the rows [first, first + rows), at most `count`; the last again in what is left of them.
// Steps are by hand: of a loop unrolled 16 times the compiler made the loads of its rest wait for each other.
template <int count>
NMKERN_DEVICE void unmodulated(const Finish& f, int64_t first, int rows, int64_t n, float (&z)[count]) {
  constexpr int kMost = kLoads / count, kSome = kMost / 2, kFew = kMost >= 8 ? kMost / 8 : 1;
#pragma unroll
  for (int i = 0; i < count; ++i) z[i] = 0;
  if (f.splits > kSome)
    add_splits<kMost>(f, first, rows, n, z);
  else if (f.splits > kFew)
    add_splits<kSome>(f, first, rows, n, z);
  else
    add_splits<kFew>(f, first, rows, n, z);
#pragma unroll
  for (int i = 0; i < count; ++i) z[i] = __fmul_rn(z[i], f.factor);
}

// Output n of a bank, for the rows.
template <int count>
NMKERN_DEVICE void load_vectors(const Finish& f, const Bank& bank, int64_t first, int rows, int64_t n,
                                float (&value)[count]) {
  int64_t row[count];
#pragma unroll
  for (int i = 0; i < count; ++i) row[i] = bank_row(bank, f.context, first + (i < rows ? i : rows - 1));
#pragma unroll
  for (int i = 0; i < count; ++i) value[i] = bank.data[row[i] * f.outputs + n];
}

template <int count>
NMKERN_DEVICE void store_rows(const Matrix& a, int64_t first, int rows, int64_t n,
                              const float (&value)[count]) {
  const int64_t at = first * a.row_stride + n * a.col_stride;
  if (a.dtype == Dtype::float32) {
    float* to = static_cast<float*>(a.data) + at;
#pragma unroll
    for (int i = 0; i < count; ++i, to += a.row_stride)
      if (i < rows) *to = value[i];
  } else {
    uint16_t* to = static_cast<uint16_t*>(a.data) + at;
#pragma unroll
    for (int i = 0; i < count; ++i, to += a.row_stride)
      if (i < rows) *to = half_of(value[i], a.dtype);
  }
}

}  // namespace nmkern::cuda
