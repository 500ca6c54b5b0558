// From hashed words to the registers of A: two codes as bfloat16 or float16, whichever x is, in as few
// instructions as the machine has.
//
//   rademacher  shift, one LOP3: the two bits onto the signs of (-1, -1)               1     a weight
//   uniform     one LOP3, one multiply-add; two pairs share a shift                    1.125
//   normal      PRMT: the byte beside the lane's number is an address; a load from the
//               table; half a multiply-add to join two codes                           2.5
//
// uniform: alone, the eight lowest bits of a bfloat16 or float16 are an integer in units of the smallest
// subnormal number, for the normal numbers go on in its steps. Two fields are such integers in place, u and
// 16 u; a multiply-add, which PTX defines for subnormal numbers too, makes them (2u - 15) * unit(), without a
// rounding. Sums in that unit lose nothing until they are below 2^-119 (float16: 2^-116).
// Transposed, a register's two codes come from two words: a PRMT joins bytes (uniform, for 4 codes) or halves
// (rademacher, for 32) first.
// Rejected for uniform: 128 + 2u by a shift and a LOP3, and an addition: 1.5 a weight (128 + u in place would
// leave -135.5 to add, which bfloat16 does not have). For normal: an entry every 128 bytes (32 KiB instead of
// 64) puts the byte where PRMT does not reach: a shift and a LOP3, 3.5 a weight; one entry for all lanes: a
// load of 32 random words waits for the fullest of 32 banks, three to four times as long.
// Invariant: the codes are those of stream.h, exactly, times unit().
#pragma once

#include <bit>
#include <cstring>

#include "../matrix.h"
#include "fragment.h"

namespace nmkern::cuda {

// Byte i of the result is byte (selector >> 4i) & 7 of the eight bytes (b, a), a's first.
NMKERN_HD uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(a, b, selector);
#else
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= uint32_t(bytes >> (8 * ((selector >> (4 * i)) & 7)) & 0xFF) << (8 * i);
  return result;
#endif
}

NMKERN_HD uint32_t low_halves(uint32_t a, uint32_t b) { return permute_bytes(a, b, 0x5410); }
NMKERN_HD uint32_t high_halves(uint32_t a, uint32_t b) { return permute_bytes(a, b, 0x7632); }

NMKERN_HD float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

NMKERN_HD uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
#endif
}

// What the tensor cores multiply, in both halves of a register: -1; and for uniform the factors of a field in
// bits 0 to 3 and 4 to 7, and -15 units.
template <Dtype kOperand>
struct Numbers {
  static_assert(kOperand != Dtype::float32);
  static constexpr bool kBf16 = kOperand == Dtype::bfloat16;
  static constexpr uint32_t kMinusOne = kBf16 ? 0xBF80BF80 : 0xBC00BC00;
  static constexpr uint32_t kLower = kBf16 ? 0x7F007F00 : 0x78007800,
                            kUpper = kBf16 ? 0x7D007D00 : 0x68006800;
  static constexpr uint32_t kOffset = kBf16 ? 0xBDF0BDF0 : 0xA380A380;
};

// What a code of 1 is in A's registers.
template <Family kFamily, Dtype kOperand>
NMKERN_HD constexpr float unit() {
  return kFamily != Family::uniform ? 1.0f : kOperand == Dtype::bfloat16 ? 0x1p-7f : 0x1p-10f;
}

// a * b + c in both halves, for what the operand's dtype holds exactly.
template <Dtype kOperand>
NMKERN_HD uint32_t multiply_add_exact(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  if constexpr (kOperand == Dtype::float16)
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
#else
  const auto one = [&](int bit) -> uint32_t {
    const auto value = [&](uint32_t bits) {
      return kOperand == Dtype::float16 ? from_float16(uint16_t(bits >> bit))
                                        : from_bfloat16(uint16_t(bits >> bit));
    };
    const float result = value(a) * value(b) + value(c);
    return kOperand == Dtype::float16 ? to_float16(result) : to_bfloat16(result);
  };
  return one(0) | one(16) << 16;
#endif
}

// (a & mask) ^ flip as one LOP3: left to itself, the compiler takes two where mask and flip are constants,
// half an instruction a weight more.
template <uint32_t mask, uint32_t flip>
NMKERN_HD uint32_t masked(uint32_t a) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(result) : "r"(a), "r"(mask), "r"(flip));
  return result;
#else
  return (a & mask) ^ flip;
#endif
}

// rademacher: the codes of fields p (low half) and p + 16 of a word.
template <Dtype kOperand>
NMKERN_HD uint32_t decode_signs(uint32_t word, int p) {
  return masked<0x80008000, Numbers<kOperand>::kMinusOne>(word << (15 - p));
}

// uniform: the codes, times the unit, of the lower or upper field in the lowest byte of either half.
template <Dtype kOperand>
NMKERN_HD uint32_t decode_levels(uint32_t bytes, int upper) {
  using N = Numbers<kOperand>;
  return upper ? multiply_add_exact<kOperand>(bytes & 0x00F000F0, N::kUpper, N::kOffset)
               : multiply_add_exact<kOperand>(bytes & 0x000F000F, N::kLower, N::kOffset);
}

// normal's table in shared memory: entry u holds the code in its low half, 0 above, for each of the 32 lanes
// a copy in the lane's own bank, so that no lookup waits for another. Entries are 256 bytes apart, so that
// one PRMT makes the address; the odd 128-byte lines between the copies hold x (see skinny_config.h).
constexpr int kEntryBytes = 256;
constexpr int kTableBytes = 256 * kEntryBytes;

NMKERN_HD uint32_t table_offset(uint32_t word, int field, uint32_t lane_bytes) {
  return permute_bytes(lane_bytes, word, 0x1140u | uint32_t(field) << 4);
}

// In the device's memory both dtypes share an entry: bfloat16 below, float16 above.
struct NormalTable {
  uint32_t entry[256];
  template <Dtype kOperand>
  NMKERN_HD uint32_t code(uint32_t u) const {
    return kOperand == Dtype::bfloat16 ? entry[u] & 0xFFFF : entry[u] >> 16;
  }
};

constexpr NormalTable normal_table() {
  NormalTable table{};
  for (uint32_t u = 0; u < 256; ++u) {
    const auto code = float(decode(Family::normal, u));
    table.entry[u] = to_bfloat16(code) | uint32_t{to_float16(code)} << 16;
  }
  return table;
}

// Two entries in one register, by a multiply-add: the byte permutes already fill the integer unit.
NMKERN_HD uint32_t join(uint32_t first, uint32_t second) { return second * 65536u + first; }

// Register `reg` of A for an m16 tile and a k16 step of the patch. `lookup(word, field)` is normal's
// table: the code of a field, in the low half.
template <class Patch, Dtype kOperand, class Lookup>
NMKERN_HD uint32_t a_register(const Words& words, int tile, int depth, int reg, const Lookup& lookup) {
  constexpr Family kFamily = Patch::kFamily;
  constexpr int kHalf = Patch::kColumns / 2;
  const int output = Patch::output(tile, reg & 1), h = reg >> 1;
  if constexpr (Patch::kTransposed) {
    const uint32_t first = words.w[2 * h], second = words.w[2 * h + 1];
    if constexpr (kFamily == Family::normal) {
      return join(lookup(first, output), lookup(second, output));
    } else if constexpr (kFamily == Family::uniform) {
      const uint32_t joined = permute_bytes(first, second, 0x4400u + 0x1111u * uint32_t(output / 2));
      return decode_levels<kOperand>(joined, output % 2);
    } else {
      const uint32_t joined = output < kHalf ? low_halves(first, second) : high_halves(first, second);
      return decode_signs<kOperand>(joined, output % kHalf);
    }
  } else {
    const uint32_t word = words.w[output];
    const int p = Patch::reduction(depth, h, 0);
    if constexpr (kFamily == Family::normal)
      return join(lookup(word, p), lookup(word, p + kHalf));
    else if constexpr (kFamily == Family::uniform)
      return decode_levels<kOperand>(p < 2 ? word : word >> 8, p % 2);
    else
      return decode_signs<kOperand>(word, p);
  }
}

}  // namespace nmkern::cuda
