// A dense product as the launcher cuts it, however it is multiplied (by_vectors.h, by_unit.h): words and
// tiles of the matrix, rows of x as they go in, sums as they come out.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>

#include "kernels.h"
#include "launch.h"

namespace nmkern::cpu {

constexpr int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }
constexpr int64_t round_up(int64_t n, int64_t multiple) { return blocks_of(n, multiple) * multiple; }

constexpr int64_t kFewWeights = 1 << 18;  // of a matrix: fewer, and packing x does not pay (by_digits.h)

struct Product {
  const Dense& call;
  const Runtime& runtime;
  const Kernels& k;
  int64_t unit;             // reduction elements of a word (forward: columns, transposed: rows)
  int64_t vectors;          // vectors of outputs a tile has, which is also the outputs of a lane
  int64_t reduction_first;  // first word of the reduction
  int64_t reduction_words;
  int64_t padding;  // elements of the first word that lie before the matrix
  int64_t output_first;
  int64_t head;  // outputs of the first tile that lie before the matrix
  int64_t tiles;
  int64_t block = 1;  // rows of x a micro-kernel takes
  // Where given, rows with NaN or infinities are one way's, and all others another's (see ByDigits).
  const bool* finite = nullptr;
  bool finishes_finite = true;

  Product(const Dense& c, const Runtime& r) : call(c), runtime(r), k(kernels()) {
    const int64_t columns = columns_per_word(c.family);
    unit = c.transposed ? kRowsPerPatch : columns;
    vectors = c.transposed ? columns : kRowsPerPatch;
    const int64_t in = c.transposed ? c.row_offset : c.col_offset;
    const int64_t out = c.transposed ? c.col_offset : c.row_offset;
    reduction_first = in / unit;
    padding = in % unit;
    reduction_words = (in + c.inputs() - 1) / unit - reduction_first + 1;
    output_first = out / vectors;
    head = out % vectors;
    tiles = blocks_of(head + c.outputs(), tile_outputs());
  }

  int64_t tile_outputs() const { return vectors * k.lanes; }
  int64_t elements() const { return reduction_words * unit; }  // of a packed row
  int64_t sums_floats(int64_t rows) const { return rows * tile_outputs(); }

  const float* bank(const Bank& bank, int64_t m, int64_t features) const {
    return bank.data + bank_row(bank, m) * features;
  }
  int64_t bank_row(const Bank& bank, int64_t m) const {
    return bank.rows == 1 ? 0 : call.context ? call.context[m] : m;
  }

  // Elements [first, first + count) of the packed row m, in the dtype of x or in float32 with in_gain; zero
  // outside of x.
  template <class Element>
  void pack_elements(int64_t m, int64_t first, int64_t count, Element* to) const {
    const int64_t begin = std::clamp<int64_t>(padding - first, 0, count);
    const int64_t end = std::clamp<int64_t>(padding + call.inputs() - first, begin, count);
    const int64_t i = first + begin - padding;
    std::fill(to, to + begin, Element{});
    std::fill(to + end, to + count, Element{});
    if constexpr (std::is_same_v<Element, uint16_t>) {
      const int64_t at = m * call.x.row_stride + i * call.x.col_stride;
      read(static_cast<const uint16_t*>(call.x.data) + at, call.x.col_stride, end - begin, to + begin,
           [](uint16_t v) { return v; });
    } else {
      read_row(call.x, m, i, end - begin, to + begin);
      if (!call.in_gain.data) return;
      const float* gain = bank(call.in_gain, m, call.inputs()) + i;
      for (int64_t e = begin; e < end; ++e) to[e] *= gain[e - begin];
    }
  }

  // Of every row of x * in_gain the exponent e of the smallest power of two, 2^e, that exceeds all magnitudes. Where
  // rows are not finite, `finite` tells.
  int* sizes(uint32_t (*largest)(const float* row, int64_t count)) {
    constexpr int64_t kSegment = 2048;
    auto* bits = static_cast<uint32_t*>(runtime.allocate(runtime.self, 4 * call.batch));
    std::fill_n(bits, call.batch, 0);
    const int64_t segments = blocks_of(elements(), kSegment);
    parallel_for(runtime, call.batch * segments, grain(kSegment), [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t m = task / segments, first = task % segments * kSegment;
        float row[kSegment];
        const int64_t count = std::min(kSegment, elements() - first);
        pack_elements(m, first, count, row);
        raise(bits[m], largest(row, count));
      }
    });
    bool* is_finite = nullptr;
    for (int64_t m = 0; m < call.batch; ++m) {
      if (bits[m] >= 0x7F800000) {
        if (!is_finite) {
          is_finite = static_cast<bool*>(runtime.allocate(runtime.self, call.batch));
          std::fill_n(is_finite, call.batch, true);
        }
        is_finite[m] = false;
      }
      int size;
      std::frexp(std::bit_cast<float>(bits[m]), &size);
      bits[m] = uint32_t(size);
    }
    finite = is_finite;
    return reinterpret_cast<int*>(bits);
  }

  // A tile but for its rows and place; its sums follow its words and `tile_bytes` of the scratch.
  Tile tile_in(char* scratch, int64_t words_bytes, int64_t tile_bytes) const {
    return {.family = call.family,
            .key = call.key,
            .transposed = call.transposed,
            .reduction_word = uint32_t(reduction_first),
            .reduction_words = reduction_words,
            .block = block,
            .sums = reinterpret_cast<float*>(scratch + words_bytes + tile_bytes),
            .scratch = scratch + words_bytes,
            .words = scratch};
  }
  uint32_t output_word(int64_t tile) const { return uint32_t(output_first + tile * k.lanes); }

  // Rows [m0, m0 + rows) of a tile whose sums are of `all` rows. untile(m, from, chunk_stride, vector_stride,
  // row) makes them outputs in order, times the factor (see MatrixUnit); `row` has room for two.
  template <class Untile>
  void write_tile(int64_t tile, int64_t m0, int64_t rows, int64_t all, const float* sums, float* row,
                  const Untile& untile) const {
    const int64_t first = tile * tile_outputs() - head;  // output of lane 0, vector 0
    const int64_t begin = std::max<int64_t>(0, -first);
    const int64_t end = std::min(tile_outputs(), call.outputs() - first);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t first_row = r / block * block;
      const int64_t block_rows = std::min(block, all - first_row);
      const float* from = sums + (first_row * kVectors + r - first_row) * k.lanes;
      untile(m0 + r, from, all * kVectors * k.lanes, block_rows * k.lanes, row);
      finish(m0 + r, first + begin, end - begin, row + begin, row + tile_outputs());
    }
  }

  // One row of a tile, outputs [n, n + count), times the factor: gains and bias, or the gradient of a gain.
  // `spare` has room for another row.
  void finish(int64_t m, int64_t n, int64_t count, float* sum, float* spare) const {
    if (finite && finite[m] != finishes_finite) return;
    const int64_t n_all = call.outputs();
    if (call.gain_grad.data) {
      float* grad = call.gain_grad.data + bank_row(call.gain_grad, m) * n_all + n;
      read_row(call.other, m, n, count, spare);
      for (int64_t i = 0; i < count; ++i) grad[i] += spare[i] * sum[i];
    }
    if (!call.y.data) return;
    if (call.out_gain.data) {
      const float* gain = bank(call.out_gain, m, n_all) + n;
      for (int64_t i = 0; i < count; ++i) sum[i] *= gain[i];
    }
    if (call.bias.data) {
      const float* bias = bank(call.bias, m, n_all) + n;
      for (int64_t i = 0; i < count; ++i) sum[i] += bias[i];
    }
    write_row(call.y, m, n, count, sum);
  }

 private:
  static void raise(uint32_t& most, uint32_t value) {
    uint32_t now = __atomic_load_n(&most, __ATOMIC_RELAXED);
    while (now < value && !__atomic_compare_exchange_n(&most, &now, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
      continue;
  }
};

}  // namespace nmkern::cpu
