// The cases of the sparse projection and their reference: see sparse_device.cpp.
//
// The order of a sum is part of what is promised, so that inputs are any floats, infinities and NaN among
// them.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <random>

#include "../../csrc/cuda/sparse.h"
#include "buffers.h"

namespace {

using namespace nmkern;
using namespace nmkern::cuda;

// Floyd's sampling by the definition.
std::vector<uint32_t> columns_of(Key key, int64_t row, int64_t population, int64_t fan_in) {
  std::vector<uint32_t> chosen;
  for (int64_t s = 0; s < fan_in; ++s) {
    const uint32_t word = philox4x32(uint32_t(s / 4), uint32_t(row), 0, kSparseTag, key).w[s % 4];
    const auto j = uint32_t(population - fan_in + s);
    const auto t = uint32_t((uint64_t{word} * (uint64_t{j} + 1)) >> 32);
    chosen.push_back(std::find(chosen.begin(), chosen.end(), t) == chosen.end() ? t : j);
  }
  return chosen;
}

// A matrix of the case's own: elements of any dtype, rows and columns apart.
struct Held {
  int64_t rows, cols;
  Dtype dtype;
  int64_t row_stride, col_stride;
  Buffer<uint32_t> storage;
  unsigned char* data;

  Held(int64_t rows_, int64_t cols_, Dtype dtype_, int64_t col_stride_ = 1, int64_t padding = 0,
       int shift = 0)
      : rows(rows_),
        cols(cols_),
        dtype(dtype_),
        row_stride(cols_ * col_stride_ + padding),
        col_stride(col_stride_),
        storage(rows * row_stride + 8, 0xFFFFFFFFu) {
    const auto at = (reinterpret_cast<uintptr_t>(storage.data()) + 15) & ~uintptr_t{15};
    data = reinterpret_cast<unsigned char*>(at) + shift * size();
  }
  int size() const { return dtype == Dtype::float32 ? 4 : 2; }
  Matrix matrix() const { return {data, dtype, row_stride, col_stride}; }
  float get(int64_t m, int64_t n) const { return read(matrix(), m, n); }
  void set(int64_t m, int64_t n, float value) { write(matrix(), m, n, value); }
};

float rounded(float value, Dtype dtype) {
  if (dtype == Dtype::float32) return value;
  return dtype == Dtype::bfloat16 ? from_bfloat16(to_bfloat16(value)) : from_float16(to_float16(value));
}

bool same(float a, float b) { return a == b || (a != a && b != b); }

struct SparseCase {
  int64_t row_offset, col_offset, rows, cols, population, fan_in, batch;
  Dtype dtype = Dtype::float32;
  int64_t col_stride = 1, padding = 0;
  int shift = 0;  // elements that x begins after an aligned address
};

// execute(call) leaves the product in call.y.
template <class Execute>
void check_sparse(const SparseCase& c, bool transposed, std::mt19937_64& random, const Execute& execute) {
  Sparse call{};
  call.key = {uint32_t(random()), uint32_t(random())};
  call.row_offset = c.row_offset, call.col_offset = c.col_offset, call.rows = c.rows, call.cols = c.cols;
  call.population = c.population, call.fan_in = c.fan_in;
  call.transposed = transposed;
  call.factor = 0.3f;
  call.batch = c.batch;
  Held x(c.batch, call.inputs(), c.dtype, c.col_stride, c.padding, c.shift),
      y(c.batch, call.outputs(), c.dtype);
  std::normal_distribution<float> normal;
  for (int64_t m = 0; m < c.batch; ++m)
    for (int64_t k = 0; k < call.inputs(); ++k) x.set(m, k, normal(random));
  if (c.batch > 2) {  // rows of their own, so that others show what spreads
    x.set(1, call.inputs() - 1, std::numeric_limits<float>::quiet_NaN());
    x.set(2, 0, std::numeric_limits<float>::infinity());
  }
  call.x = x.matrix();
  call.y = y.matrix();
  execute(call);

  std::vector<float> want(c.batch * call.outputs(), 0.0f);
  for (int64_t n = 0; n < c.rows; ++n)
    for (uint32_t column : columns_of(call.key, c.row_offset + n, c.population, c.fan_in)) {
      const int64_t k = int64_t{column} - c.col_offset;
      if (k < 0 || k >= c.cols) continue;
      for (int64_t m = 0; m < c.batch; ++m) {
        float& sum = want[m * call.outputs() + (transposed ? k : n)];
        sum += x.get(m, transposed ? n : k);
      }
    }
  for (int64_t m = 0; m < c.batch; ++m)
    for (int64_t n = 0; n < call.outputs(); ++n) {
      const float expected = rounded(want[m * call.outputs() + n] * call.factor, c.dtype),
                  found = y.get(m, n);
      if (!same(found, expected))
        fail("rows " + std::to_string(c.rows) + " fan_in " + std::to_string(c.fan_in) + " M " +
             std::to_string(c.batch) + (transposed ? " transposed" : "") + ": y[" + std::to_string(m) + ", " +
             std::to_string(n) + "] is " + std::to_string(found) + ", expected " + std::to_string(expected));
    }
}

// Runs every case both ways. The number of cases.
template <class Execute>
int64_t check_sparse_cases(const Execute& execute) {
  constexpr int64_t kFar = (int64_t{1} << 32) - 400;
  const SparseCase cases[] = {
      {0, 0, 300, 130, 130, 7, 37},                          // ragged everywhere
      {0, 0, 520, 96, 96, 7, 32},                            // whole fours
      {3, 7, 300, 90, 130, 5, 16},                           // a view: draws beside it
      {0, 0, 33, 40, 40, 1, 1},                              // one draw, one row
      {2, 0, 70, 1, 30, 2, 5},                               // one column of many
      {0, 0, 1, 9, 9, 9, 3},                                 // every column is drawn
      {5, 0, 90, 100, 100, 33, 9},                           // draws compared in memory
      {0, 3, 64, 20, 50, 50, 40},                            // all of them, of a view
      {kFar, kFar + 100, 300, 300, int64_t{1} << 32, 8, 4},  // the stream's far end
      {0, 0, 300, 64, 64, 7, 150, Dtype::bfloat16},          // more rows than a slab
      {1, 0, 270, 61, 61, 4, 18, Dtype::float16},            //
      {0, 0, 130, 64, 64, 3, 20, Dtype::bfloat16, 1, 8},     // x with padding
      {0, 0, 130, 64, 64, 3, 20, Dtype::float32, 2, 3},      // every second column of x
      {0, 0, 130, 64, 64, 3, 20, Dtype::float16, 1, 0, 1},   // not aligned
      {0, 0, 130, 61, 61, 3, 20, Dtype::float32, 1, 3},      // fours, and what is left of a row
      {0, 0, 130, 61, 61, 3, 9, Dtype::bfloat16, 1, 3},      //
      {0, 0, 600, 12, 12, 3, 4300, Dtype::float16},          // blocks that take groups in order
      {0, 0, 4200, 12, 12, 2, 9},                            // more rows than a list, read by several lanes
      {0, 0, 200, 2500, 2500, 6, 33},                        // tiles of 16 rows only
      {0, 0, 90, 2400, 2400, 300, 10},                       // draws that no block has room for
  };
  std::mt19937_64 random(1);
  int64_t count = 0;
  for (const SparseCase& c : cases)
    for (bool transposed : {false, true}) {
      check_sparse(c, transposed, random, execute);
      ++count;
    }
  return count;
}

}  // namespace
