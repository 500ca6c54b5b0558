// The second stage of a dense product: sums of the splits and the modulation. gradient.h has the same with
// the gradient of a gain.
//
//   z[m, n] = factor * sum_s partial[s, m, n]                                      (unmodulated)
//   y[m, n] = z[m, n] * out_gain[c, n] + bias[c, n]                                (finish_rows)
//
// Invariant: each step rounds on its own, and the splits are summed upward.
#pragma once

#include "product.h"

namespace nmkern::cuda {

constexpr int kLoads = 16;      // of partial sums that a thread has in flight
constexpr int kRowsAtOnce = 8;  // of a large batch

struct Finish {
  float* partial;                        // the gradient's stages write sums over the one that they have read
  int64_t splits, partial_stride, skip;  // skip: outputs of the first patch before the matrix
  int64_t batch, outputs;
  float factor;
  Bank out_gain, bias;
  const int64_t* context;
  Matrix y;
  Matrix other;
  Bank gain_grad;
  bool add;              // to a gain_grad of one row, instead of overwriting it
  unsigned char* index;  // of index_bytes in gradient.h
};

// z += the splits' sums, `step` of them at a time: all their loads are in flight before the first is added.
// What is past the last split adds 0, which changes no bit: a sum that starts from +0 is never -0.
template <int step, class Machine, int count>
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
      for (int i = 0; i < count; ++i) z[i] = Machine::rounded_sum(z[i], part[j][i]);
  }
}

// z of dense.h for the rows [first, first + rows), at most `count`; the last again in what is left of them.
// Steps are by hand: of a loop unrolled 16 times the compiler made the loads of its rest wait for each other.
template <class Machine, int count>
NMKERN_DEVICE void unmodulated(const Finish& f, int64_t first, int rows, int64_t n, float (&z)[count]) {
  constexpr int kMost = kLoads / count, kSome = kMost / 2, kFew = kMost >= 8 ? kMost / 8 : 1;
#pragma unroll
  for (int i = 0; i < count; ++i) z[i] = 0;
  if (f.splits > kSome)
    add_splits<kMost, Machine>(f, first, rows, n, z);
  else if (f.splits > kFew)
    add_splits<kSome, Machine>(f, first, rows, n, z);
  else
    add_splits<kFew, Machine>(f, first, rows, n, z);
#pragma unroll
  for (int i = 0; i < count; ++i) z[i] = Machine::rounded_product(z[i], f.factor);
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

// y for the rows.
template <class Machine, int count>
NMKERN_DEVICE void finish_rows(const Finish& f, int64_t first, int rows, int64_t n) {
  const bool modulated = f.out_gain.data, biased = f.bias.data;
  float gain[count] = {}, bias[count] = {}, z[count];
  if (modulated) load_vectors(f, f.out_gain, first, rows, n, gain);
  if (biased) load_vectors(f, f.bias, first, rows, n, bias);
  unmodulated<Machine>(f, first, rows, n, z);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if (modulated) z[i] = Machine::rounded_product(z[i], gain[i]);
    if (biased) z[i] = Machine::rounded_sum(z[i], bias[i]);
  }
  store_rows(f.y, first, rows, n, z);
}

// Thread `at` of the kernel without a gradient: rows run slowest.
template <int count, class Machine>
NMKERN_DEVICE void finish_thread(const Finish& f, const Machine&, int64_t at) {
  const int64_t first = at / f.outputs * count;
  if (first >= f.batch) return;
  const int rows = int(f.batch - first < count ? f.batch - first : count);
  finish_rows<Machine, count>(f, first, rows, at % f.outputs);
}

// Rows that a thread takes there: one where splits keep loads in flight enough, or where eight a thread would
// leave multiprocessors of an H100 idle (132 of 768 threads).
inline int rows_at_once(const Finish& f) {
  const bool many = f.batch >= kRowsAtOnce && f.batch * f.outputs >= int64_t{1} << 20;
  return many && f.splits <= kLoads / kRowsAtOnce ? kRowsAtOnce : 1;
}

// Enqueues it, with the gradient where there is one; a cudaError_t.
int launch_finish(const Finish& finish, void* stream);

}  // namespace nmkern::cuda
