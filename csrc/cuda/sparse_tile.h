// What the kernels of the sparse projection and of FlyNet take of a matrix and of x, and how x lies in shared
// memory: sparse_tile.cuh has their code.
//
// A row of the tile is R floats, R / 4 chunks of 16 bytes. A lane reads one chunk of a drawn column at once;
// R / 4 lanes read the whole row of the tile. With R = 32 the 8 lanes that a 16-byte load serves at once read
// 128 consecutive bytes, whatever is drawn: no bank conflicts. With 16 and 8 rows 2 and 4 columns share them,
// 1.5 and 2.1 loads on average. Chunks are swizzled by bits of the column, so that storing what was read
// along columns is free of conflicts too (R = 32).
// Invariant: a sum is taken in the order of the draws.
#pragma once

#include "../matrix.h"
#include "fragment.h"

namespace nmkern::cuda {

constexpr int kTileWarps = 16;
constexpr int kTileThreads = kTileWarps * kLanes;
constexpr int kEach = 4;  // units of a lane, rows of a lane, columns that are staged at once

NMKERN_HD constexpr int64_t whole(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// A row's draws are columns of [0, population); what lies outside of the view is column `cols`, of zeros.
struct Draws {
  Key key;
  uint32_t first_row, population, fan_in, col_offset, cols;

  NMKERN_HD uint32_t lowest() const { return population - fan_in; }  // j of the first draw
  NMKERN_HD uint32_t in_view(uint32_t column) const {
    const uint32_t k = column - col_offset;
    return k < cols ? k : cols;
  }
};

// Draws of a row that are compared in registers; those beyond, in memory.
constexpr uint32_t kHeld = 8;

template <int rows>
struct Tile {
  static constexpr int kRows = rows;
  static constexpr int kChunks = rows / kEach;  // of a column, a lane each
  static constexpr int kWarpUnits = kLanes / kChunks * kEach;
  static constexpr int kUnits = kTileWarps * kWarpUnits;  // of a block
  static_assert(rows == 8 || rows == 16 || rows == 32);

  // One column more, of zeros; whole groups of 4.
  NMKERN_HD static constexpr int64_t columns(int64_t cols) { return (cols + kEach) / kEach * kEach; }
  NMKERN_HD static constexpr int64_t bytes(int64_t cols) { return columns(cols) * kRows * 4; }
  // Where a column begins, to be xored with 16 * chunk.
  NMKERN_HD static constexpr uint32_t offset(uint32_t column) {
    return column * (kRows * 4) + column / kEach % kChunks * 16;
  }
  NMKERN_HD static constexpr int chunk_of(int lane) { return lane % kChunks; }
  // The first of a lane's units, among the block's.
  NMKERN_HD static constexpr int unit_of(int thread) {
    return thread / kLanes * kWarpUnits + thread % kLanes / kChunks * kEach;
  }
};

// Whether four neighbouring columns of a row, from a multiple of 4 on, can be read or written at once.
inline bool takes_four(const Matrix& a) {
  const uintptr_t bytes = a.dtype == Dtype::float32 ? 16 : 8;
  return a.col_stride == 1 && a.row_stride % kEach == 0 && reinterpret_cast<uintptr_t>(a.data) % bytes == 0;
}

struct TileSource {
  Matrix x;
  bool fours;  // takes_four(x)
  int64_t batch, cols;
};

constexpr int kDrawThreads = 128;

// Draws as Tile offsets, once for all blocks, and how often each column of the view is drawn by a row.
struct Drawing {
  Draws draws;
  int64_t rows;
  uint32_t* columns;  // [fan_in][stride]
  int64_t stride;     // at least `rows`: what follows is drawn too, and not counted
  uint32_t* counts;   // [cols] or null; added to
};

}  // namespace nmkern::cuda
