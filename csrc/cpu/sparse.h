// The sparse projection on the CPU, free of any framework.
//
//   y[m, n] = factor * sum over the ones k of row n: x[m, k]             (or of column n: transposed)
#pragma once

#include "dense.h"

namespace nmkern::cpu {

struct Sparse {
  Key key;
  int64_t row_offset, col_offset, rows, cols;  // in the stream's orientation
  int64_t population, fan_in;
  bool transposed;
  float factor;

  int64_t batch;
  Matrix x, y;

  int64_t inputs() const { return transposed ? rows : cols; }
  int64_t outputs() const { return transposed ? cols : rows; }
};

void sparse_product(const Sparse& call, const Runtime& runtime);

// Columns of groups [first, first + count) of kSparseRows rows, as SparseKernels lays them out.
void draw_columns(const Sparse& call, const Runtime& runtime, int64_t first, int64_t count,
                  uint32_t* columns);

// Rows [m, m + rows) of a[., cols], transposed: to[cols + 1][kBatch]; what lies outside is zero.
void transpose_rows(const Matrix& a, int64_t m, int64_t rows, int64_t cols, float* to);

}  // namespace nmkern::cpu
