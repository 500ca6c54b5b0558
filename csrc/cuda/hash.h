// Philox4x32-7 of a grid of patches, one call a patch, split by what a round depends on.
//
//   RowPart(c1), ColumnPart(c0)   what depends on one counter word alone
//   patch(row, column)            the four words of the patch (c0, c1)
//
// c2 is 0 and c3 the family's tag, so the first three rounds half fall apart: of 14 multiplies, one
// depends on the row, three on the column and one follows from c2 = 0. A loop over one counter word
// keeps the other's part in registers: 9 wide multiplies and 11 three-way xors a patch are left, and 1
// and 1 (rows) or 3 and 2 (columns) for a step of the loop, shared by all patches of the step.
// Invariant: patch(RowPart(c1), ColumnPart(c0)) = philox4x32(c0, c1, 0, tag).
#pragma once

#include "../stream.h"

namespace nmkern::cuda {

// The key of every round, and the tag xored into the first one's, where it would be xored anyway. It is a
// kernel's parameter, so that xors read it from the constant bank.
struct RoundKeys {
  uint32_t k0[kRounds], k1[kRounds];
};

inline RoundKeys round_keys(Key key, Family family) {
  RoundKeys keys;
  for (int round = 0; round < kRounds; ++round) {
    keys.k0[round] = key.k0 + uint32_t(round) * kWeyl0;
    keys.k1[round] = key.k1 + uint32_t(round) * kWeyl1;
  }
  keys.k1[0] ^= uint32_t(family);
  return keys;
}

struct Wide {
  uint32_t high, low;
};

NMKERN_HD Wide multiply(uint32_t a, uint32_t b) {
  const uint64_t product = uint64_t{a} * b;
  return {uint32_t(product >> 32), uint32_t(product)};
}

struct RowPart {
  Wide p2;  // round 2's first product
};

NMKERN_HD RowPart row_part(uint32_t c1, const RoundKeys& keys) {
  return {multiply(c1 ^ keys.k0[0], kMultiplier0)};
}

struct ColumnPart {
  uint32_t low1, low2;  // of round 1's first and round 2's second product
  Wide p3;              // round 3's first product
};

NMKERN_HD ColumnPart column_part(uint32_t c0, const RoundKeys& keys) {
  const Wide p1 = multiply(c0, kMultiplier0);
  const Wide p2 = multiply(p1.high ^ keys.k1[0], kMultiplier1);
  return {p1.low, p2.low, multiply(p2.high ^ keys.k0[1], kMultiplier0)};
}

NMKERN_HD Words patch(const RowPart& row, const ColumnPart& column, const RoundKeys& keys) {
  const Wide p = multiply(row.p2.high ^ column.low1 ^ keys.k1[1], kMultiplier1);
  uint32_t c0 = p.high ^ column.low2 ^ keys.k0[2], c1 = p.low;
  uint32_t c2 = column.p3.high ^ row.p2.low ^ keys.k1[2], c3 = column.p3.low;
#pragma unroll
  for (int round = 3; round < kRounds; ++round) {
    const Wide p0 = multiply(c0, kMultiplier0), p1 = multiply(c2, kMultiplier1);
    c0 = p1.high ^ c1 ^ keys.k0[round];
    c1 = p1.low;
    c2 = p0.high ^ c3 ^ keys.k1[round];
    c3 = p0.low;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace nmkern::cuda
