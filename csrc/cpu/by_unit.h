// A dense product multiplied by a matrix unit: MatrixUnit::run. An element of x is packed as one, two or
// three bfloat16, its parts, that sum to it exactly.
//
// Rows that are tiny throughout would lose their last parts, as the unit counts subnormal bfloat16 as zero:
// they are packed larger, by a power of two, and their sums made smaller again.
#pragma once

#include "product.h"

namespace nmkern::cpu {

// x comes from L2 or nothing keeps up with the unit: so many rows and so much of the reduction at a time that
// x takes 1 MiB, for as many tiles as half of that holds the sums of. A row costs a sixteenth of what it does
// in vectors, so that weights may be generated for fewer.
constexpr int64_t kUnitPartRows = 128;
constexpr int64_t kUnitBlockBytes = 1 << 20, kUnitSumsBytes = 1 << 19;
constexpr int64_t kUnitChain = 8192;  // elements that are summed in one chain, see add_sums in tile.h

struct ByUnit : Product {
  int parts;  // of an element
  // What MatrixUnit::pack says of the packed rows, of which the first is packed_from.
  uint8_t* sizes = nullptr;
  int64_t packed_from = 0;

  // How many parts an element takes; 0 where vectors are faster, or there is no unit.
  static int parts_of(const Dense& c) {
    if (!kernels().matrix_unit) return 0;
    // One row of float32, 8192 x 8192 on 2 threads, on the unit and fused: uniform 2.4 and 1.9 ms
    // (transposed 2.3 and 1.9), rademacher 1.1 and 1.7 (1.8 and 1.8). Two rows of uniform: 2.0 and 2.4.
    const bool floats = c.x.dtype == Dtype::float32 || c.in_gain.data;
    if (floats && c.batch == 1 && !(c.family == Family::rademacher && !c.transposed)) return 0;
    if (floats) return 3;
    return c.x.dtype == Dtype::float16 ? 2 : 1;
  }

  ByUnit(const Dense& c, const Runtime& r, int parts) : Product(c, r), parts(parts) {
    reduction_words = round_up(reduction_words, std::max<int64_t>(1, 2 * kUnitSteps / unit));
    block = blocks_of(c.batch, blocks_of(c.batch, kUnitRows));  // all much the same, none empty
  }

  int64_t steps() const { return elements() / 2; }
  int64_t run_steps() const { return kPanelSteps; }
  int64_t packed_row_bytes() const { return steps() * 4 * parts; }
  int64_t padded(int64_t rows) const { return round_up(rows, block); }
  int64_t part_rows() const { return std::max<int64_t>(1, kUnitPartRows / block) * block; }

  // Words of the reduction that are gone through with one tile after the other.
  int64_t block_words(int64_t rows) const {
    const int64_t fit = kUnitBlockBytes / (padded(rows) * parts * unit * 2);
    return std::max<int64_t>(1, std::min(fit, kUnitChain / unit) / kTileWords) * kTileWords;
  }
  // Whether the parts of all rows are rows of one tile register.
  bool stacked() const { return call.batch == block && parts > 1 && parts * block <= kUnitRows; }
  bool chained(int64_t rows) const { return block_words(rows) < reduction_words || stacked(); }
  // Tiles that share a block of the reduction while it is in L2.
  int64_t group_tiles(int64_t rows) const {
    if (block_words(rows) >= reduction_words) return 1;
    const int64_t shares = blocks_of(call.batch, rows);
    const int64_t fit = kUnitSumsBytes / 4 / sums_floats(padded(rows));
    return std::clamp<int64_t>(tiles * shares / (4 * runtime.threads), 1, std::max<int64_t>(1, fit));
  }

  bool packed_as_is() const { return false; }
  void start_packing(int64_t m0, int64_t rows) {
    if (!sizes)
      sizes = static_cast<uint8_t*>(runtime.allocate(runtime.self, rows));  // no later chunk is larger
    std::fill_n(sizes, rows, 0);
    packed_from = m0;
  }

  // As ByVectors::pack: a whole block.
  void pack(int64_t run, int64_t m0, int64_t first, int64_t rows, int64_t all, char* packed) const {
    for (int64_t r = 0; r < block; ++r) {
      const int64_t m = m0 + first + r;
      uint32_t* to = place(run, first + r, padded(all), packed);
      if (r >= rows) {
        for (int64_t i = 0; i < count(run) / kUnitSteps * parts; ++i)
          std::fill_n(to + i * block * kUnitSteps, kUnitSteps, 0);
      } else {  // other threads pack other runs of the row
        __atomic_fetch_or(&sizes[m - packed_from], pack_run(run, m, 1, to), __ATOMIC_RELAXED);
      }
    }
  }
  // The `rows` that are packed together from m0 on: the tiny ones again, larger.
  void end_packing(int64_t m0, int64_t rows, char* packed) const {
    for (int64_t r = 0; r < rows; ++r) {
      if (!tiny(m0 + r)) continue;
      for (int64_t run = 0; run < blocks_of(steps(), run_steps()); ++run)
        pack_run(run, m0 + r, 1 / kTiny, place(run, r, padded(rows), packed));
    }
  }
  bool tiny(int64_t m) const { return sizes[m - packed_from] == kNonzero; }

  int64_t count(int64_t run) const { return std::min(run_steps(), steps() - run * run_steps()); }
  uint32_t* place(int64_t run, int64_t row, int64_t all, char* packed) const {
    const int64_t first = row / block * block;
    return reinterpret_cast<uint32_t*>(packed) + (run * run_steps() * all + first * count(run)) * parts +
           (row - first) * kUnitSteps;
  }
  // Run number `run` of row m, times `scale`, to its place in a block.
  uint8_t pack_run(int64_t run, int64_t m, float scale, uint32_t* to) const {
    float row[2 * kPanelSteps];
    pack_elements(m, 2 * run * run_steps(), 2 * count(run), row);
    return k.matrix_unit->pack(row, count(run), call.transposed ? 1 : int(unit / 2), parts, scale, to, block);
  }

  int64_t scratch_bytes(int64_t rows) const {
    const int64_t sums = sums_floats(padded(rows));
    const int64_t chain = chained(rows) ? (stacked() ? parts : 1) * sums : 0;
    const int64_t floats = group_tiles(rows) * sums + 2 * tile_outputs() + chain;
    return round_up(k.words_bytes + k.scratch_bytes + 4 * floats, 64);
  }
  Tile tile_in(char* scratch) const {
    Tile tile = Product::tile_in(scratch, k.scratch_bytes);
    tile.parts = parts;
    return tile;
  }

  // As ByVectors::run_tiles: a block of the reduction for all of the tiles, then the next one.
  void run_tiles(Tile& t, int64_t first, int64_t count, int64_t m0, int64_t rows, int64_t part,
                 const char* x) const {
    const int64_t words = block_words(part), all = padded(rows), tile_sums = sums_floats(all);
    float* sums = t.sums;
    float* row = sums + group_tiles(part) * sums_floats(padded(part));
    t.batch = all;
    if (chained(part)) t.chain = row + 2 * tile_outputs();
    for (int64_t begin = 0; begin < reduction_words; begin += words) {
      t.reduction_word = uint32_t(reduction_first + begin);
      t.reduction_words = std::min(words, reduction_words - begin);
      t.more = begin > 0;
      for (int64_t tile = 0; tile < count; ++tile) {
        t.output_word = output_word(first + tile);
        t.x = x;
        t.sums = sums + tile * tile_sums;
        k.matrix_unit->run(t);
      }
      x += words * unit * 2 * parts * all;
    }
    t.sums = sums;
    for (int64_t tile = 0; tile < count; ++tile)
      write_tile(first + tile, m0, rows, all, sums + tile * tile_sums, row,
                 [&](int64_t m, const float* from, int64_t chunk_stride, int64_t vector_stride, float* to) {
                   k.matrix_unit->untile(from, chunk_stride, vector_stride, vectors, call.factor, to);
                   if (!tiny(m)) return;
                   for (int64_t i = 0; i < tile_outputs(); ++i) to[i] *= kTiny;
                 });
  }
};

}  // namespace nmkern::cpu
