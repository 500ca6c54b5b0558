// The sparse projection: columns are drawn chunk by chunk, then gathered (or scattered) for many rows
// of x at once.
//
// x is transposed into blocks [block of 16 rows][input][16], so that an input serves 16 rows of the
// batch with one vector load. Blocks of rows are independent, so tasks are blocks (and, gathering,
// chunks of outputs); within a sum the order is that of the draws, or of the rows.
#include "sparse.h"

#include <algorithm>
#include <vector>

#include "matrix.h"

namespace nmkern::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kChunk = 2048;              // matrix rows whose columns are held at a time
constexpr int64_t kTransposedBytes = 16 << 20;  // bounds the transposed x and y
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

}  // namespace

void sparse_product(const Sparse& call, const Runtime& runtime) {
  if (call.batch == 0) return;
  const int64_t inputs = call.inputs(), outputs = call.outputs();
  const int64_t block_bytes = kLanes * 4 * (inputs + outputs);
  const int64_t blocks_at_once =
      std::min((call.batch + kLanes - 1) / kLanes,
               std::max<int64_t>(runtime.threads, kTransposedBytes / block_bytes));
  auto* x = static_cast<float*>(
      runtime.allocate(runtime.self, blocks_at_once * kLanes * 4 * inputs));
  auto* y = static_cast<float*>(
      runtime.allocate(runtime.self, blocks_at_once * kLanes * 4 * outputs));
  const int64_t chunk = std::min(kChunk, call.rows);
  auto* columns = static_cast<int64_t*>(runtime.allocate(runtime.self, chunk * call.fan_in * 8));

  for (int64_t m0 = 0; m0 < call.batch; m0 += blocks_at_once * kLanes) {
    const int64_t rows = std::min(blocks_at_once * kLanes, call.batch - m0);
    const int64_t blocks = (rows + kLanes - 1) / kLanes;
    const int64_t grain = (1 << 16) / (kLanes * std::max(inputs, outputs)) + 1;
    parallel_for(runtime, blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        float* to = x + b * kLanes * inputs;
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const int64_t m = b * kLanes + lane;
          for (int64_t i = 0; i < inputs; ++i)
            to[i * kLanes + lane] = m < rows ? load(call.x, m0 + m, i) : 0;
        }
        std::fill_n(y + b * kLanes * outputs, kLanes * outputs, 0.0f);
      }
    });
    for (int64_t r0 = 0; r0 < call.rows; r0 += chunk) {
      const int64_t count = std::min(chunk, call.rows - r0);
      parallel_for(runtime, count, 256, [&](int64_t begin, int64_t end) {
        std::vector<int64_t> sorted;
        for (int64_t r = begin; r < end; ++r)
          draw_columns(call, call.row_offset + r0 + r, columns + r * call.fan_in, sorted);
      });
      parallel_for(runtime, blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          const float* from = x + b * kLanes * inputs;
          float* to = y + b * kLanes * outputs;
          for (int64_t r = 0; r < count; ++r) {
            const int64_t* drawn = columns + r * call.fan_in;
            if (call.transposed) {
              const float* value = from + (r0 + r) * kLanes;
              for (int64_t s = 0; s < call.fan_in; ++s) {
                if (drawn[s] < 0) continue;
                float* sum = to + drawn[s] * kLanes;
                for (int lane = 0; lane < kLanes; ++lane) sum[lane] += value[lane];
              }
            } else {
              float sum[kLanes] = {};
              for (int64_t s = 0; s < call.fan_in; ++s) {
                if (drawn[s] < 0) continue;
                const float* value = from + drawn[s] * kLanes;
                for (int lane = 0; lane < kLanes; ++lane) sum[lane] += value[lane];
              }
              std::copy_n(sum, kLanes, to + (r0 + r) * kLanes);
            }
          }
        }
      });
    }
    parallel_for(runtime, blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin * kLanes; m < std::min(rows, end * kLanes); ++m) {
        const float* from = y + m / kLanes * kLanes * outputs + m % kLanes;
        for (int64_t n = 0; n < outputs; ++n)
          store(call.y, m0 + m, n, from[n * kLanes] * call.factor);
      }
    });
  }
}

}  // namespace nmkern::cpu
