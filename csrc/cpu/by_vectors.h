// A dense product multiplied by vectors of weights: Kernels::run. x is packed as float32, or as pairs of
// bfloat16 where it is that and the CPU multiplies them.
#pragma once

#include "product.h"

namespace nmkern::cpu {

// Rows of x that a tile is generated for: their share of a run of x (128 KiB) and their sums (32 to 64) stay
// in L2 while the tile sweeps over the runs. All 1024 rows at once: 0 to 2 % slower in float32 on Zen 3; on
// Zen 5 bfloat16 lost a fifth of its speed from M = 256 to 1024. So on Zen 4 M = 256, 512 and 1024 take 78,
// 159 and 320 to 339 ms (8192 x 8192). 128 rows generate more: 5 % slower.
constexpr int64_t kPartRows = 256;

struct ByVectors : Product {
  bool bf16;

  // x * in_gain is no bfloat16: rounding it to one would be a rounding that the exact result does not make,
  // so gains on the input take the float32 kernels (up to twice the time at large M).
  ByVectors(const Dense& c, const Runtime& r)
      : Product(c, r), bf16(k.bf16 && c.x.dtype == Dtype::bfloat16 && !c.in_gain.data) {
    block = c.batch <= 2 * k.max_block ? c.batch : k.tile_block;
  }

  int64_t steps() const { return elements() / (bf16 ? 2 : 1); }
  int64_t run_steps() const { return tile_steps(call.transposed, bf16); }
  int64_t packed_row_bytes() const { return steps() * 4; }
  int64_t padded(int64_t rows) const { return rows; }
  int64_t part_rows() const { return std::max<int64_t>(1, kPartRows / block) * block; }
  int64_t group_tiles(int64_t) const { return 1; }

  bool packed_as_is() const {
    return call.batch == 1 && call.x.dtype == Dtype::float32 && call.x.col_stride == 1 &&
           !call.in_gain.data && padding == 0 && elements() == call.inputs();
  }
  void start_packing(int64_t, int64_t) {}
  void end_packing(int64_t, int64_t, char*) const {}

  // Run number `run` of rows [first, first + rows) of the `all` that are packed together from m0 on.
  void pack(int64_t run, int64_t m0, int64_t first, int64_t rows, int64_t all, char* packed) const {
    const int64_t step = run * run_steps(), count = std::min(run_steps(), steps() - step);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t m = m0 + first + r, at = step * all + first * count + r;
      if (!bf16) {
        float row[tile_steps(false, false)];
        pack_elements(m, step, count, row);
        float* to = reinterpret_cast<float*>(packed) + at;
        for (int64_t s = 0; s < count; ++s) to[s * rows] = row[s];
        continue;
      }
      // A pair: transposed, neighbouring rows; forward, the fields f and f + P / 2 of a word.
      uint16_t row[2 * tile_steps(false, true)];
      pack_elements(m, 2 * step, 2 * count, row);
      uint32_t* to = reinterpret_cast<uint32_t*>(packed) + at;
      const int64_t group = call.transposed ? 1 : unit / 2;
      for (int64_t g = 0; g < count; g += group) {
        const uint16_t* low = row + 2 * g;
        for (int64_t f = 0; f < group; ++f)
          to[(g + f) * rows] = uint32_t{low[f]} | uint32_t{low[group + f]} << 16;
      }
    }
  }

  int64_t tile_bytes() const { return call.batch <= k.fused_block ? 0 : k.scratch_bytes; }
  int64_t scratch_bytes(int64_t rows) const {
    return round_up(k.words_bytes + tile_bytes() + 4 * (sums_floats(rows) + 2 * tile_outputs()), 64);
  }
  Tile tile_in(char* scratch) const {
    Tile tile = Product::tile_in(scratch, k.words_bytes, tile_bytes());
    tile.bf16 = bf16;
    return tile;
  }

  // Rows [m0, m0 + rows) of tiles [first, first + count), in scratch for `part` rows; x is packed from m0 on.
  void run_tiles(Tile& t, int64_t first, int64_t count, int64_t m0, int64_t rows, int64_t part,
                 const char* x) const {
    run_tiles(t, first, count, m0, rows, part, x, k.run, [&](int64_t, int64_t) { return call.factor; });
  }

 protected:
  // The same by `run`; its sums of vector v of row m are multiplied by scale(m, v).
  template <class Scale>
  void run_tiles(Tile& t, int64_t first, int64_t count, int64_t m0, int64_t rows, int64_t part, const char* x,
                 void (*run)(const Tile&), const Scale& scale) const {
    float* row = t.sums + sums_floats(part);
    t.batch = rows;
    for (int64_t tile = first; tile < first + count; ++tile) {
      const uint32_t word = output_word(tile);
      const bool neighbour = t.x == x && word == t.output_word + uint32_t(k.lanes);
      t.ready = neighbour ? std::min<int64_t>(kTileWords, reduction_words) : 0;
      t.output_word = word;
      t.x = x;
      run(t);
      write_tile(tile, m0, rows, rows, t.sums, row,
                 [&](int64_t m, const float* sums, int64_t chunk_stride, int64_t vector_stride, float* to) {
                   for (int64_t v = 0; v < vectors; ++v) {
                     const float* from = sums + v / kVectors * chunk_stride + v % kVectors * vector_stride;
                     const auto times = scale(m, v);
                     for (int64_t lane = 0; lane < k.lanes; ++lane)
                       to[lane * vectors + v] = float(from[lane] * times);
                   }
                 });
    }
  }
};

}  // namespace nmkern::cpu
