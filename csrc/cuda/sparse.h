// The sparse projection on CUDA: what a call is, free of any framework.
//
//   y[m, n] = factor * sum over the ones k of row n: x[m, k]             (or of column n: transposed)
//
// Sizes and strides count elements; every pointer is the device's. The contract is that of cpu/sparse.h.
#pragma once

#include "../matrix.h"
#include "../stream.h"

namespace nmkern::cuda {

struct Sparse {
  Key key;
  int64_t row_offset, col_offset, rows, cols;  // in the stream's orientation
  int64_t population, fan_in;
  bool transposed;
  float factor;

  int64_t batch;
  Matrix x;  // [M, K]
  Matrix y;  // [M, N], contiguous

  int64_t inputs() const { return transposed ? rows : cols; }
  int64_t outputs() const { return transposed ? cols : rows; }
};

// Scratch that the call needs, in bytes, at most 64 MiB; -1 where the kernels have no room for it in so much,
// or in the shared memory that a block may have. Neither pointers nor strides matter.
int64_t sparse_scratch(const Sparse& call, int64_t shared_bytes);

// Enqueues the call on a cudaStream_t and waits for nothing; a cudaError_t. `scratch` is 16-byte aligned.
// The bits of y do not depend on `shared_bytes`.
int sparse_product(const Sparse& call, int64_t shared_bytes, void* scratch, void* stream);

}  // namespace nmkern::cuda
