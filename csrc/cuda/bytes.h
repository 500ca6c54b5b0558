// Weights as bytes, for mma.sync.m16n8k32 of u8 times s8: fields as the hash has left them, four at a time.
//
//   C[16, 8] += A[16, 32] B[32, 8], A: weights, B: x, C: sums, all integers; byte i of register h of B, and
//   of registers 2h and 2h + 1 of A, is k = 16h + 4t + i; rows and columns are as in fragment.h
//
// A byte holds two fields of uniform, u + 16v, or eight of rademacher. Sums of integers are exact, so that
// what shares a byte with a field may stay there, and is taken out of the sums again:
//
//   uniform     forward      x * u + y * v = (16x * (u + 16v) + (y - 16x) * 16v) / 16: half of the masks
//               transposed   two outputs, from the sums of u + 16v and of 16v
//   rademacher  forward      a mask for each bit; x takes the factor that four bits differ in, and those of
//                            the upper half of a byte are summed apart
//               transposed   an output from the sum of its bit and those above it, less that of the latter
//
// Transposed, a register has the same byte of a patch's four words. Instructions a weight are 0.125 and 0.375
// for uniform, 0.25 and 0.28 for rademacher, where decode.h's take 1.125 and 1.
// Rejected: all fields by masks, uniform's halves summed apart (0.25); rademacher by shifts (0.34).
#pragma once

#include "decode.h"

namespace nmkern::cuda {

constexpr int kByteColumns = 8;  // of B

template <Family family, bool transposed>
struct PatchBytes {
  static_assert(family != Family::normal);
  static constexpr bool kUniform = family == Family::uniform;
  // A step of a lane: neighbouring patches along the reduction, their indices, B's registers of them.
  static constexpr int kPatches = kUniform || transposed ? 2 : 1;
  static constexpr int kSlots = kPatches * (transposed ? kRowsPerPatch : columns_per_word(family));
  static constexpr int kRegisters = kSlots / 4;
  // Sums apart, those of the second 16 times as large; of each, mmas of a step.
  static constexpr int kSets = !kUniform && !transposed ? 2 : 1;
  static constexpr int kPairs = kRegisters / 2 / kSets;

  // The lane's index of byte i of B's register (set * kPairs + pair) * 2 + h.
  NMKERN_HD static constexpr int slot(int reg, int i) {
    if (transposed) return 4 * reg + i;
    return kUniform ? reg / 2 * 8 + 2 * i + reg % 2 : 8 * i + reg;
  }
  // What B has for a slot: x as integers q. It needs so many bits more than q, and a sum of it is 2^kShift
  // times that of fields times q.
  static constexpr int kMoreBits = transposed ? 0 : kUniform ? 4 : 3;
  static constexpr int kShift = transposed ? 0 : kUniform ? 4 : 7;
  NMKERN_HD static constexpr int scaled(const int (&q)[kSlots], int slot) {
    if (transposed) return q[slot];
    if (!kUniform) return q[slot] * (8 >> slot % 4);
    return slot % 2 ? q[slot] - 16 * q[slot - 1] : 16 * q[slot];
  }

  // A's bytes of an output, of the words of the lane's patches (transposed: of transposed_bytes of them).
  NMKERN_HD static uint32_t bytes(const Words (&words)[kPatches], int set, int pair, int h, int output) {
    if constexpr (transposed) {
      const uint32_t word = words[h].w[output / kByteFields];
      const int below = output % kByteFields * kBits;
      return below == 0 ? word : word & (0xFFu >> below << below) * 0x01010101u;
    } else if constexpr (kUniform) {
      const uint32_t word = words[pair].w[output];
      return h ? word & 0xF0F0F0F0 : word;
    } else {
      return words[0].w[output] & 0x01010101u << (4 * set + 2 * pair + h);
    }
  }
  // The output's sum of fields, times 2^kShift: sum(output, set) are those of bytes.
  template <class Sum>
  NMKERN_HD static int field_sum(const Sum& sum, int output) {
    if constexpr (!transposed)
      return kSets == 1 ? sum(output, 0) : 16 * sum(output, 0) + sum(output, kSets - 1);
    const bool last = output % kByteFields == kByteFields - 1;
    return (sum(output, 0) - (last ? 0 : sum(output + 1, 0))) >> output % kByteFields * kBits;
  }

 private:
  static constexpr int kBits = 32 / columns_per_word(family), kByteFields = 8 / kBits;
};

// A code is kFactor times its field less kOffset.
template <Family kFamily>
struct ByteCode {
  static constexpr int kFactor = 2, kOffset = kFamily == Family::uniform ? 15 : 1;
};

// Byte j of each of four words is word j of the result.
NMKERN_HD Words transposed_bytes(const Words& words) {
  const auto& w = words.w;
  const uint32_t lower[2] = {permute_bytes(w[0], w[1], 0x5140), permute_bytes(w[2], w[3], 0x5140)};
  const uint32_t upper[2] = {permute_bytes(w[0], w[1], 0x7362), permute_bytes(w[2], w[3], 0x7362)};
  return {{low_halves(lower[0], lower[1]), high_halves(lower[0], lower[1]), low_halves(upper[0], upper[1]),
           high_halves(upper[0], upper[1])}};
}

}  // namespace nmkern::cuda
