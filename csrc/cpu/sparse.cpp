// The sparse projection: columns are drawn chunk by chunk, then gathered (or scattered) for many rows
// of x at once.
//
// x is transposed into blocks [block of 16 rows][input][16], so that an input serves 16 rows of the
// batch with one vector load. A task is a block; within a sum the order is that of the draws, or of the
// rows.
#include "sparse.h"

#include <algorithm>
#include <vector>

#include "matrix.h"

namespace nmkern::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kChunk = 2048;              // matrix rows whose columns are held at a time
constexpr int64_t kTransposedBytes = 16 << 20;  // bounds the transposed x and y
constexpr int64_t kRun = 64;    // inputs or outputs that are transposed at a time
constexpr int64_t kScanned = 64;  // draws that are checked for repeats by scanning; beyond, by sorting

// The distinct columns of a row in drawing order, relative to the view; -1 outside of it.
void draw_columns(const Sparse& call, int64_t row, int64_t* columns, std::vector<int64_t>& sorted) {
  sorted.clear();
  Words words{};
  for (int64_t s = 0; s < call.fan_in; ++s) {
    if (s % 4 == 0) words = philox4x32(uint32_t(s / 4), uint32_t(row), 0, kSparseTag, call.key);
    const int64_t j = call.population - call.fan_in + s;
    int64_t t = sparse_draw(words.w[s % 4], uint32_t(j));
    if (call.fan_in <= kScanned) {
      if (std::find(columns, columns + s, t) != columns + s) t = j;
      columns[s] = t;
    } else {
      auto at = std::lower_bound(sorted.begin(), sorted.end(), t);
      if (at != sorted.end() && *at == t) at = std::lower_bound(sorted.begin(), sorted.end(), t = j);
      sorted.insert(at, t);
      columns[s] = t;
    }
  }
  for (int64_t s = 0; s < call.fan_in; ++s) {
    columns[s] -= call.col_offset;
    if (columns[s] < 0 || columns[s] >= call.cols) columns[s] = -1;
  }
}

// `Lanes` rows of the batch: x and y are [inputs or outputs][Lanes].
template <int Lanes>
void gather(const Sparse& call, const int64_t* columns, int64_t count, const float* x, float* y) {
  for (int64_t r = 0; r < count; ++r, columns += call.fan_in, y += Lanes) {
    float sum[Lanes] = {};
    for (int64_t s = 0; s < call.fan_in; ++s) {
      if (columns[s] < 0) continue;
      const float* value = x + columns[s] * Lanes;
      for (int lane = 0; lane < Lanes; ++lane) sum[lane] += value[lane];
    }
    std::copy_n(sum, Lanes, y);
  }
}

template <int Lanes>
void scatter(const Sparse& call, const int64_t* columns, int64_t count, const float* x, float* y) {
  for (int64_t r = 0; r < count; ++r, columns += call.fan_in, x += Lanes) {
    for (int64_t s = 0; s < call.fan_in; ++s) {
      if (columns[s] < 0) continue;
      float* sum = y + columns[s] * Lanes;
      for (int lane = 0; lane < Lanes; ++lane) sum[lane] += x[lane];
    }
  }
}

template <int Lanes>
void product(const Sparse& call, const Runtime& runtime) {
  const int64_t inputs = call.inputs(), outputs = call.outputs();
  const int64_t block_bytes = Lanes * 4 * (inputs + outputs);
  const int64_t at_once = std::min((call.batch + Lanes - 1) / Lanes,
                                   std::max(runtime.threads, kTransposedBytes / block_bytes));
  const auto allocate = [&](int64_t bytes) { return runtime.allocate(runtime.self, bytes); };
  auto* x = static_cast<float*>(allocate(at_once * Lanes * 4 * inputs));
  auto* y = static_cast<float*>(allocate(at_once * Lanes * 4 * outputs));
  const int64_t chunk = std::min(kChunk, call.rows);
  auto* columns = static_cast<int64_t*>(allocate(chunk * call.fan_in * 8));

  for (int64_t m0 = 0; m0 < call.batch; m0 += at_once * Lanes) {
    const int64_t rows = std::min(at_once * Lanes, call.batch - m0);
    const int64_t blocks = (rows + Lanes - 1) / Lanes;
    const int64_t grain = (1 << 16) / (Lanes * std::max(inputs, outputs)) + 1;
    parallel_for(runtime, blocks, grain, [&](int64_t begin, int64_t end) {
      float row[kRun];
      for (int64_t b = begin; b < end; ++b) {
        float* to = x + b * Lanes * inputs;
        const int64_t lanes = std::min<int64_t>(Lanes, rows - b * Lanes);
        if (lanes < Lanes) std::fill_n(to, Lanes * inputs, 0.0f);
        for (int64_t i = 0; i < inputs; i += kRun) {
          const int64_t count = std::min(kRun, inputs - i);
          for (int64_t lane = 0; lane < lanes; ++lane) {
            read_row(call.x, m0 + b * Lanes + lane, i, count, row);
            for (int64_t j = 0; j < count; ++j) to[(i + j) * Lanes + lane] = row[j];
          }
        }
        if (call.transposed) std::fill_n(y + b * Lanes * outputs, Lanes * outputs, 0.0f);
      }
    });
    for (int64_t r0 = 0; r0 < call.rows; r0 += chunk) {
      const int64_t count = std::min(chunk, call.rows - r0);
      parallel_for(runtime, count, 256, [&](int64_t begin, int64_t end) {
        std::vector<int64_t> sorted;
        for (int64_t r = begin; r < end; ++r)
          draw_columns(call, call.row_offset + r0 + r, columns + r * call.fan_in, sorted);
      });
      const int64_t adds = Lanes * count * call.fan_in;
      parallel_for(runtime, blocks, (1 << 17) / adds + 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          const float* from = x + b * Lanes * inputs;
          float* to = y + b * Lanes * outputs;
          if (call.transposed) scatter<Lanes>(call, columns, count, from + r0 * Lanes, to);
          else gather<Lanes>(call, columns, count, from, to + r0 * Lanes);
        }
      });
    }
    parallel_for(runtime, blocks, grain, [&](int64_t begin, int64_t end) {
      float row[kRun];
      for (int64_t b = begin; b < end; ++b) {
        const float* from = y + b * Lanes * outputs;
        const int64_t lanes = std::min<int64_t>(Lanes, rows - b * Lanes);
        for (int64_t n = 0; n < outputs; n += kRun) {
          const int64_t count = std::min(kRun, outputs - n);
          for (int64_t lane = 0; lane < lanes; ++lane) {
            for (int64_t j = 0; j < count; ++j) row[j] = from[(n + j) * Lanes + lane] * call.factor;
            write_row(call.y, m0 + b * Lanes + lane, n, count, row);
          }
        }
      }
    });
  }
}

}  // namespace

void sparse_product(const Sparse& call, const Runtime& runtime) {
  if (call.batch == 0) return;
  // Up to 4 rows a scalar loop is faster than 16 lanes that are mostly padding.
  if (call.batch <= 4) product<1>(call, runtime);
  else product<kLanes>(call, runtime);
}

}  // namespace nmkern::cpu
