// Where the elements of mma.sync.m16n8k16 (bf16 or f16, A row-major, B column-major, C float32) lie in a
// warp's registers, and which weights of a patch a lane generates for them.
//
//   C[16, 8] += A[16, 16] B[16, 8],  A: weights, B: x, C: sums; the rows of C are outputs n, its columns
//   rows m of the batch, the inner index the reduction k
//
// Lane 4 * g + t hashes one patch: its four reduction slots of a k16 step are 2t, 2t + 1, 2t + 8, 2t + 9
// of A's columns, its two outputs A's rows g and g + 8. A patch (4 rows x P columns) fills
//
//   forward     2 m16 tiles (output 2 * tile + half is row 4 * c1 + that) and P / 4 k16 steps (fields)
//   transposed  P / 2 m16 tiles (output 2 * tile + half is that field) and 1 k16 step (the four rows)
//
// so each hashed bit is used by the lane that drew it. Rows of the tile and the reduction index stand in
// any order as long as x and the sums are read and written alike, which they are, by the functions below.
// A register holds two slots: forward, fields p and p + P / 2 of a word, which lie 16 bits apart and so
// are decoded together; transposed, the same field of two words.
#pragma once

#include "../stream.h"

namespace nmkern::cuda {

constexpr int kLanes = 32;
constexpr int kQuads = 8;      // lanes that share t: g = 0..7
constexpr int kQuadLanes = 4;  // lanes that share g: t = 0..3

NMKERN_HD constexpr int quad_of(int lane) { return lane / kQuadLanes; }
NMKERN_HD constexpr int place_of(int lane) { return lane % kQuadLanes; }

// The instruction's layout: register `reg`, of A and B with its elements e = 0 (low half) and 1.
NMKERN_HD constexpr int a_row(int lane, int reg) { return quad_of(lane) + 8 * (reg & 1); }
NMKERN_HD constexpr int a_col(int lane, int reg, int e) { return 2 * place_of(lane) + 8 * (reg >> 1) + e; }
NMKERN_HD constexpr int b_row(int lane, int reg, int e) { return 2 * place_of(lane) + 8 * reg + e; }
NMKERN_HD constexpr int b_col(int lane) { return quad_of(lane); }
NMKERN_HD constexpr int c_row(int lane, int reg) { return quad_of(lane) + 8 * (reg >> 1); }
NMKERN_HD constexpr int c_col(int lane, int reg) { return 2 * place_of(lane) + (reg & 1); }

// The patch on those registers. `fields`: transposed, how many fields of a word a lane takes.
template <Family family, bool transposed, int fields = columns_per_word(family)>
struct PatchLayout {
  static constexpr Family kFamily = family;
  static constexpr bool kTransposed = transposed;
  static constexpr int kFields = fields;
  static constexpr int kColumns = columns_per_word(family);
  static constexpr int kReduction = kTransposed ? kRowsPerPatch : kColumns;  // indices of a patch
  static constexpr int kOutputs = kTransposed ? kFields : kRowsPerPatch;
  static constexpr int kDepth = kReduction / 4;  // k16 steps
  static constexpr int kTiles = kOutputs / 2;    // m16 tiles

  // The patch's output in row g (half 0) or g + 8 (half 1) of a tile.
  NMKERN_HD static constexpr int output(int tile, int half) { return 2 * tile + half; }

  // The patch's reduction index in element e of B's register h (A's registers 2h and 2h + 1).
  NMKERN_HD static constexpr int reduction(int depth, int h, int e) {
    return kTransposed ? 2 * h + e : 2 * depth + h + e * kColumns / 2;
  }
};

}  // namespace nmkern::cuda
