// The launcher of the sparse projection: draws columns chunk by chunk, then gathers or scatters.
//
// x is transposed into blocks [block of 16 rows][input][16], so that a drawn column serves 16 rows of the
// batch with one load; a batch of few rows goes row by row. A task is a block (and, gathering, a group of
// 64 outputs); within a sum the order is that of the draws, or of the matrix rows.
#include "sparse.h"

#include <algorithm>
#include <unordered_set>

#include "kernels.h"
#include "launch.h"

namespace nmkern::cpu {
namespace {

constexpr int64_t kColumnBytes = 4 << 20;  // bounds the drawn columns that are held at a time
constexpr int64_t kBlockBytes = 16 << 20;  // bounds the transposed x and sums
constexpr int64_t kFewRows = 4;            // of the batch: row by row beats 16 lanes of mostly padding
constexpr int64_t kCompared = 1024;  // draws that are checked for repeats by comparing; beyond, by a set

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

struct Launch {
  const Sparse& call;
  const Runtime& runtime;
  const Kernels& k = kernels();

  int64_t groups() const { return (call.rows + kSparseRows - 1) / kSparseRows; }
  int64_t group_columns() const { return kSparseRows * call.fan_in; }
  void* allocate(int64_t bytes) const { return runtime.allocate(runtime.self, bytes); }

  // The columns of group g, as SparseKernels lays them out.
  void draw(int64_t g, uint32_t* columns) const {
    const SparseRows rows{call.key,
                          uint32_t(call.row_offset + g * kSparseRows),
                          uint32_t(call.population),
                          uint32_t(call.fan_in),
                          uint32_t(call.col_offset),
                          uint32_t(call.cols)};
    if (call.fan_in <= kCompared) return k.sparse.draw(rows, columns);
    for (int64_t r = 0; r < kSparseRows; ++r) {
      std::unordered_set<uint32_t> chosen;
      Words words{};
      for (uint32_t s = 0; s < rows.fan_in; ++s) {
        if (s % 4 == 0)
          words = philox4x32(s / 4, rows.first_row + uint32_t(r), 0, kSparseTag, call.key);
        const uint32_t j = rows.population - rows.fan_in + s;
        uint32_t t = sparse_draw(words.w[s % 4], j);
        if (!chosen.insert(t).second) chosen.insert(t = j);
        const int64_t at = (r / k.lanes * call.fan_in + s) * k.lanes + r % k.lanes;
        columns[at] = std::min(t - rows.col_offset, rows.cols);
      }
    }
  }

  void write_scaled(int64_t m, int64_t n, int64_t count, float* sums) const {
    for (int64_t i = 0; i < count; ++i) sums[i] *= call.factor;
    write_row(call.y, m, n, count, sums);
  }

  void forward(int64_t groups_at_once, uint32_t* columns) const;
  void transposed(int64_t groups_at_once, uint32_t* columns) const;
  void forward_rows(int64_t groups_at_once, uint32_t* columns) const;
};

void Launch::forward(int64_t groups_at_once, uint32_t* columns) const {
  const int64_t blocks = (call.batch + kBatch - 1) / kBatch;
  const int64_t block_floats = (call.cols + 1) * kBatch;
  const int64_t at_once = std::clamp<int64_t>(kBlockBytes / 4 / block_floats, 1, blocks);
  auto* x = static_cast<float*>(allocate(at_once * block_floats * 4));
  for (int64_t b0 = 0; b0 < blocks; b0 += at_once) {
    const int64_t count = std::min(at_once, blocks - b0);
    parallel_for(runtime, count, grain(block_floats), [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t m = (b0 + b) * kBatch;
        transpose_rows(call.x, m, std::min<int64_t>(kBatch, call.batch - m), call.cols,
                       x + b * block_floats);
      }
    });
    for (int64_t g0 = 0; g0 < groups(); g0 += groups_at_once) {
      const int64_t now = std::min(groups_at_once, groups() - g0);
      draw_columns(call, runtime, g0, now, columns);
      const int64_t cost = kSparseRows * (call.fan_in + 12);
      parallel_for(runtime, count * now, grain(cost), [&](int64_t begin, int64_t end, int64_t) {
        alignas(64) float tile[kBatch * kSparseRows];
        for (int64_t task = begin; task < end; ++task) {
          const int64_t b = task / now, g = task % now;
          const int64_t m = (b0 + b) * kBatch, n = (g0 + g) * kSparseRows;
          const int64_t rows = std::min<int64_t>(kBatch, call.batch - m);
          const int64_t outputs = std::min<int64_t>(kSparseRows, call.rows - n);
          const bool in_place = rows == kBatch && outputs == kSparseRows &&
                                call.y.dtype == Dtype::float32 && call.y.col_stride == 1;
          float* to = in_place ? static_cast<float*>(call.y.data) + m * call.y.row_stride + n : tile;
          k.sparse.gather(columns + g * group_columns(), call.fan_in, x + b * block_floats, call.factor,
                          to, in_place ? call.y.row_stride : kSparseRows);
          if (in_place) continue;
          for (int64_t lane = 0; lane < rows; ++lane)
            write_row(call.y, m + lane, n, outputs, tile + lane * kSparseRows);
        }
      });
    }
  }
}

void Launch::forward_rows(int64_t groups_at_once, uint32_t* columns) const {
  auto* x = static_cast<float*>(allocate((call.cols + 1) * 4 * call.batch));
  for (int64_t m = 0; m < call.batch; ++m) {
    float* row = x + m * (call.cols + 1);
    read_row(call.x, m, 0, call.cols, row);
    row[call.cols] = 0;
  }
  for (int64_t g0 = 0; g0 < groups(); g0 += groups_at_once) {
    const int64_t now = std::min(groups_at_once, groups() - g0);
    draw_columns(call, runtime, g0, now, columns);
    const int64_t cost = kSparseRows * call.fan_in * call.batch;
    parallel_for(runtime, now, grain(cost), [&](int64_t begin, int64_t end, int64_t) {
      alignas(64) float sums[kSparseRows];
      for (int64_t g = begin; g < end; ++g) {
        const int64_t n = (g0 + g) * kSparseRows;
        for (int64_t m = 0; m < call.batch; ++m) {
          k.sparse.gather_one(columns + g * group_columns(), call.fan_in,
                              x + m * (call.cols + 1), sums);
          write_scaled(m, n, std::min<int64_t>(kSparseRows, call.rows - n), sums);
        }
      }
    });
  }
}

void Launch::transposed(int64_t groups_at_once, uint32_t* columns) const {
  const int64_t blocks = (call.batch + kBatch - 1) / kBatch;
  const int64_t in_floats = (call.rows + 1) * kBatch;
  // Whole runs, so that the last one can be transposed like the others.
  const int64_t out_floats = (round_up(call.cols, kSparseRows) + 1) * kBatch;
  const int64_t at_once =
      std::clamp<int64_t>(kBlockBytes / 4 / (in_floats + out_floats), 1, blocks);
  auto* x = static_cast<float*>(allocate(at_once * in_floats * 4));
  auto* y = static_cast<float*>(allocate(at_once * out_floats * 4));
  for (int64_t b0 = 0; b0 < blocks; b0 += at_once) {
    const int64_t count = std::min(at_once, blocks - b0);
    parallel_for(runtime, count, grain(in_floats), [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t m = (b0 + b) * kBatch;
        transpose_rows(call.x, m, std::min<int64_t>(kBatch, call.batch - m), call.rows,
                       x + b * in_floats);
        std::fill_n(y + b * out_floats, out_floats, 0.0f);
      }
    });
    for (int64_t g0 = 0; g0 < groups(); g0 += groups_at_once) {
      const int64_t now = std::min(groups_at_once, groups() - g0);
      draw_columns(call, runtime, g0, now, columns);
      const int64_t cost = now * group_columns() * 2;
      parallel_for(runtime, count, grain(cost), [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t b = begin; b < end; ++b) {
          for (int64_t g = 0; g < now; ++g) {
            const int64_t r = (g0 + g) * kSparseRows;
            k.sparse.scatter(columns + g * group_columns(), call.fan_in,
                             std::min<int64_t>(kSparseRows, call.rows - r),
                             x + b * in_floats + r * kBatch, y + b * out_floats);
          }
        }
      });
    }
    parallel_for(runtime, count, grain(out_floats), [&](int64_t begin, int64_t end, int64_t) {
      alignas(64) float tile[kBatch * kSparseRows];
      for (int64_t b = begin; b < end; ++b) {
        const float* from = y + b * out_floats;
        const int64_t m = (b0 + b) * kBatch;
        for (int64_t n = 0; n < call.cols; n += kSparseRows) {
          const int64_t outputs = std::min<int64_t>(kSparseRows, call.cols - n);
          k.sparse.from_lanes(from + n * kBatch, tile);
          for (int64_t lane = 0; lane < std::min<int64_t>(kBatch, call.batch - m); ++lane)
            write_scaled(m + lane, n, outputs, tile + lane * kSparseRows);
        }
      }
    });
  }
}

}  // namespace

void draw_columns(const Sparse& call, const Runtime& runtime, int64_t first, int64_t count,
                  uint32_t* columns) {
  const Launch launch{call, runtime};
  const int64_t cost = kSparseRows / launch.k.lanes * call.fan_in * (20 + call.fan_in);
  parallel_for(runtime, count, grain(cost), [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t g = begin; g < end; ++g)
      launch.draw(first + g, columns + g * launch.group_columns());
  });
}

void transpose_rows(const Matrix& a, int64_t m, int64_t rows, int64_t cols, float* to) {
  const Kernels& k = kernels();
  alignas(64) float tile[kBatch * kSparseRows] = {}, last[kSparseRows * kBatch];
  for (int64_t i = 0; i < cols; i += kSparseRows) {
    const int64_t count = std::min<int64_t>(kSparseRows, cols - i);
    for (int64_t lane = 0; lane < rows; ++lane) read_row(a, m + lane, i, count, tile + lane * kSparseRows);
    if (count == kSparseRows) {
      k.sparse.to_lanes(tile, to + i * kBatch);
    } else {
      k.sparse.to_lanes(tile, last);
      std::copy_n(last, count * kBatch, to + i * kBatch);
    }
  }
  std::fill_n(to + cols * kBatch, kBatch, 0.0f);
}

void sparse_product(const Sparse& call, const Runtime& runtime) {
  if (call.batch == 0) return;
  const Launch launch{call, runtime};
  const int64_t groups_at_once = std::clamp<int64_t>(
      kColumnBytes / 4 / launch.group_columns(), 1, launch.groups());
  auto* columns = static_cast<uint32_t*>(launch.allocate(
      round_up(groups_at_once * launch.group_columns() * 4, 64)));
  if (call.transposed) launch.transposed(groups_at_once, columns);
  else if (call.batch <= kFewRows && call.cols < INT32_MAX) launch.forward_rows(groups_at_once, columns);
  else launch.forward(groups_at_once, columns);
}

}  // namespace nmkern::cpu
