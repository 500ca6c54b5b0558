// The dense product for small batches on CUDA: what a call is, free of any framework.
//
//   y[m, n] = z[m, n] * out_gain[c, n] + bias[c, n]
//   gain_grad[c, n] = sum over the rows m of c: other[m, n] * z[m, n]
//   with z[m, n] = factor * sum_k (x[m, k] * in_gain[c, k]) * code[n, k]
//
// Sizes and strides count elements; every pointer is the device's. The contract is that of cpu/dense.h, but
// for contexts out of range (see product.h).
#pragma once

#include "../matrix.h"
#include "../stream.h"

namespace nmkern::cuda {

struct Skinny {
  Family family;
  Key key;
  int64_t row_offset, col_offset, rows, cols;  // in the stream's orientation
  bool transposed;
  float factor;

  int64_t batch;  // M; 64 rows share what is generated, more are served by generating again
  Matrix x;       // [M, K]
  Matrix y;       // [M, N]
  Bank in_gain, out_gain, bias;
  const int64_t* context = nullptr;

  // Where gain_grad has data, y may be absent and has no bias. Its rows come as zeros where there is a context.
  Matrix other;    // [M, N]
  Bank gain_grad;  // [1, context's range or M, N]

  int64_t inputs() const { return transposed ? rows : cols; }
  int64_t outputs() const { return transposed ? cols : rows; }
};

// Scratch that the call needs, in bytes: at most 64 MiB, or one float for each output where that is more.
int64_t skinny_scratch(const Skinny& call);

// Enqueues the call on a cudaStream_t and waits for nothing; a cudaError_t. `scratch` is 16-byte aligned.
int skinny_product(const Skinny& call, void* scratch, void* stream);

}  // namespace nmkern::cuda
