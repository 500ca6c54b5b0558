// A dense product multiplied by a matrix unit: MatrixUnit::run. An element of x is a sum of parts, of which
// the unit takes a row each: bfloat16 (by_parts.h) or digits of integers (by_digits.h). This is what both
// share.
#pragma once

#include "product.h"

namespace nmkern::cpu {

// x comes from L2 or nothing keeps up with the unit: so many rows and so much of the reduction at a time that
// x takes 1 MiB, for as many tiles as half of that holds the sums of. A row costs a sixteenth of what it does
// in vectors, so that weights may be generated for fewer.
constexpr int64_t kUnitPartRows = 128;
constexpr int64_t kUnitBlockBytes = 1 << 20, kUnitSumsBytes = 1 << 19;
constexpr int64_t kUnitChain = 8192;  // elements that are summed in one chain, see add_sums in tile.h

// Way is ByParts or ByDigits:
//   keeps_words()         whether words are hashed ahead (Panels)
//   stacked()             whether the parts of all of a block's rows are rows of one tile register
//   pack_run(run, m, to)  run number `run` of row m to its place in a block
//   fixed_rows(...)       where kIntegers: what Tile::fixed tells of the rows
//   rescale(m, outputs)   a tile's of a row, before gains
template <class Way>
struct ByUnit : Product {
  const int parts;          // of an element
  const int step_elements;  // of the reduction

  ByUnit(const Dense& c, const Runtime& r, int parts, int step_elements, int block_rows)
      : Product(c, r), parts(parts), step_elements(step_elements) {
    reduction_words = round_up(reduction_words, std::max<int64_t>(1, step_elements * kUnitSteps / unit));
    block = blocks_of(c.batch, blocks_of(c.batch, block_rows));  // all much the same, none empty
  }
  const Way& self() const { return static_cast<const Way&>(*this); }

  int64_t steps() const { return elements() / step_elements; }
  int64_t run_steps() const { return panel_steps(call.transposed, step_elements); }
  int64_t row_bytes(int64_t elements) const { return elements / step_elements * 4 * parts; }
  int64_t packed_row_bytes() const { return row_bytes(elements()); }
  int64_t padded(int64_t rows) const { return round_up(rows, block); }
  int64_t part_rows() const { return std::max<int64_t>(1, kUnitPartRows / block) * block; }

  // Words of the reduction that are gone through with one tile after the other.
  int64_t block_words(int64_t rows) const {
    const int64_t fit = kUnitBlockBytes / (padded(rows) * row_bytes(unit));
    return std::max<int64_t>(1, std::min(fit, kUnitChain / unit) / kTileWords) * kTileWords;
  }
  bool chained(int64_t rows) const { return block_words(rows) < reduction_words || self().stacked(); }
  // Tiles that share a block of the reduction while it is in L2.
  int64_t group_tiles(int64_t rows) const {
    if (block_words(rows) >= reduction_words) return 1;
    const int64_t shares = blocks_of(call.batch, rows);
    const int64_t fit = kUnitSumsBytes / 4 / sums_floats(padded(rows));
    return std::clamp<int64_t>(tiles * shares / (4 * runtime.threads), 1, std::max<int64_t>(1, fit));
  }

  bool packed_as_is() const { return false; }

  // As ByVectors::pack: a whole block.
  void pack(int64_t run, int64_t m0, int64_t first, int64_t rows, int64_t all, char* packed) const {
    for (int64_t r = 0; r < block; ++r) {
      uint32_t* to = place(run, first + r, padded(all), packed);
      if (r < rows) {
        self().pack_run(run, m0 + first + r, to);
      } else {
        for (int64_t i = 0; i < count(run) / kUnitSteps * parts; ++i)
          std::fill_n(to + i * block * kUnitSteps, kUnitSteps, 0);
      }
    }
  }

  int64_t count(int64_t run) const { return std::min(run_steps(), steps() - run * run_steps()); }
  uint32_t* place(int64_t run, int64_t row, int64_t all, char* packed) const {
    const int64_t first = row / block * block;
    return reinterpret_cast<uint32_t*>(packed) + (run * run_steps() * all + first * count(run)) * parts +
           (row - first) * kUnitSteps;
  }

  // No more than a small call needs: its scratch is part of a frame (bindings.cpp), or else an allocation.
  int64_t words_bytes() const { return self().keeps_words() ? k.words_bytes : 0; }
  int64_t panels_bytes() const {
    const bool one = !call.transposed && steps() <= run_steps();
    return one ? steps() * kVectors * k.lanes * 4 : k.scratch_bytes;
  }

  int64_t scratch_bytes(int64_t rows) const {
    const int64_t sums = sums_floats(padded(rows));
    const int64_t chain = chained(rows) ? (self().stacked() ? parts : 1) * sums : 0;
    const int64_t floats = group_tiles(rows) * sums + 2 * tile_outputs() + chain;
    const int64_t fixed = Way::kIntegers ? padded(rows) * int64_t{sizeof(FixedRow)} : 0;
    return round_up(words_bytes() + panels_bytes() + 4 * floats + fixed, 64);
  }
  Tile tile_in(char* scratch) const {
    Tile tile = Product::tile_in(scratch, words_bytes(), panels_bytes());
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
    float* behind = row + 2 * tile_outputs();
    if (chained(part)) t.chain = behind;
    if (self().stacked()) behind += parts * sums_floats(padded(part));
    for (int64_t begin = 0; begin < reduction_words; begin += words) {
      t.reduction_word = uint32_t(reduction_first + begin);
      t.reduction_words = std::min(words, reduction_words - begin);
      t.more = begin > 0;
      if constexpr (Way::kIntegers)
        t.fixed = self().fixed_rows(m0, rows, begin, t.reduction_words, reinterpret_cast<FixedRow*>(behind));
      for (int64_t tile = 0; tile < count; ++tile) {
        t.output_word = output_word(first + tile);
        t.x = x;
        t.sums = sums + tile * tile_sums;
        k.matrix_unit->run(t);
      }
      x += words * row_bytes(unit) * all;
    }
    t.sums = sums;
    for (int64_t tile = 0; tile < count; ++tile)
      write_tile(first + tile, m0, rows, all, sums + tile * tile_sums, row,
                 [&](int64_t m, const float* from, int64_t chunk_stride, int64_t vector_stride, float* to) {
                   k.matrix_unit->untile(from, chunk_stride, vector_stride, vectors, call.factor, to);
                   self().rescale(m, to);
                 });
  }
};

}  // namespace nmkern::cpu
