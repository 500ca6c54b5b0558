// The dense products on the CPU: what a call is, free of any framework.
//
//   z[m, n] = factor * sum_k (x[m, k] * in_gain[c, k]) * code[n, k]
//   y[m, n] = z[m, n] * out_gain[c, n] + bias[c, n]             (y may be absent)
//   gain_grad[c, n] += other[m, n] * z[m, n], over m in order    (may be absent)
//
// Sizes and strides count elements. Row m reads row c of a bank: see Bank.
#pragma once

#include "../matrix.h"
#include "../stream.h"

namespace nmkern::cpu {

struct Dense {
  Family family;
  Key key;
  int64_t row_offset, col_offset, rows, cols;  // in the stream's orientation
  bool transposed;
  float factor;

  int64_t batch;  // M
  Matrix x;       // [M, K]
  Matrix y;       // [M, N]
  Matrix other;   // [M, N]
  Bank in_gain, out_gain, bias, gain_grad;
  const int64_t* context = nullptr;

  int64_t inputs() const { return transposed ? rows : cols; }
  int64_t outputs() const { return transposed ? cols : rows; }
};

// What the launcher needs from the framework that calls it.
struct Runtime {
  int64_t threads;
  // A 64-byte aligned block that lives until the call ends.
  void* (*allocate)(void* self, int64_t bytes);
  // body(begin, end, context) on ranges that cover [0, size), from PyTorch's own thread pool.
  void (*parallel_for)(int64_t size, int64_t grain, void (*body)(int64_t, int64_t, void*), void*);
  void* self;
};

void dense_product(const Dense& call, const Runtime& runtime);

}  // namespace nmkern::cpu
