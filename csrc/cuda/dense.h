// The dense product on CUDA: what a call is, free of any framework.
//
//   y[m, n] = z[m, n] * out_gain[c, n] + bias[c, n]
//   gain_grad[c, n] = sum over the rows m of c: other[m, n] * z[m, n]
//   with z[m, n] = factor * sum_k (x[m, k] * in_gain[c, k]) * code[n, k]
//
// Sizes and strides count elements; every pointer is the device's. The contract is that of cpu/dense.h, but
// for contexts out of range (see bank_row).
#pragma once

#include "../matrix.h"
#include "../stream.h"

namespace nmkern::cuda {

struct Dense {
  Family family;
  Key key;
  int64_t row_offset, col_offset, rows, cols;  // in the stream's orientation
  bool transposed;
  float factor;

  int64_t batch;  // M
  Matrix x;       // [M, K]
  Matrix y;       // [M, N]
  Bank in_gain, out_gain, bias;
  const int64_t* context = nullptr;

  // Where gain_grad has data, y may be absent and has no bias. Its rows come as zeros where there is a
  // context.
  Matrix other;    // [M, N]
  Bank gain_grad;  // [1, context's range or M, N]

  bool fixed_point = true;  // whether few rows may be multiplied as integers: see fixed.cu

  int64_t most_scratch = int64_t{64} << 20;  // bytes, where a call can be taken in parts

  int64_t inputs() const { return transposed ? rows : cols; }
  int64_t outputs() const { return transposed ? cols : rows; }
};

// Kernels for small batches compute it on every GPU since sm_80 (skinny.cu, and for the smallest fixed.cu),
// and one for large batches on sm_90a (wide.cu).

// Scratch that the call needs, in bytes: at most most_scratch, or where that is more half of it and what all
// rows (skinny), or 128 of them (wide), take: two float16 for each element of x, a float for each row and for
// each output. A gain_grad by context, of more than 128 rows, takes 384 bytes and a byte for each context for
// each 128 rows: skinny's on top of its limit.
int64_t skinny_scratch(const Dense& call);
int64_t wide_scratch(const Dense& call);

// Enqueues the call on a cudaStream_t and waits for nothing; a cudaError_t. `scratch` is 64-byte aligned.
int skinny_product(const Dense& call, void* scratch, void* stream);
int wide_product(const Dense& call, void* scratch, void* stream);

}  // namespace nmkern::cuda
