// From hashed words to the registers of A: two codes as bfloat16 or float16, whichever x is, in as few
// instructions as the machine has.
//
//   rademacher  shift, one LOP3: the two bits onto the signs of (-1, -1)               1    a weight
//   uniform     shift, one LOP3: 128 + 2u in both halves; one add of -143              1.5  a weight
//               (float16: 1024 + 2u and -1039, where its last place is a one)
//   normal      PRMT: the byte beside the lane's number is an address; a load from the
//               table; half a multiply-add to join two codes                           2.5  a weight
//
// Transposed, a register's two codes come from two words: rademacher and uniform join halves of the words
// first (a PRMT for every four (uniform) or sixteen (rademacher) pairs), then decode as before.
// Rejected for uniform: 128 + u in place, without a shift for a word's first field, leaves -135.5 to add,
// which bf16 does not have. For normal: an entry every 128 bytes (32 KiB instead of 64) puts the byte where
// PRMT does not reach: a shift and a LOP3, 3.5 a weight; one entry for all lanes: a load of 32 random words
// waits for the fullest of 32 banks, three to four times as long.
// Invariant: the codes are those of stream.h, exactly.
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

// What the tensor cores multiply, in both halves of a register: -1, the number whose last place is a one, and
// what is 15 more, negated.
template <Dtype kOperand>
struct Numbers {
  static_assert(kOperand != Dtype::float32);
  static constexpr bool kBf16 = kOperand == Dtype::bfloat16;
  static constexpr uint32_t kMinusOne = kBf16 ? 0xBF80BF80 : 0xBC00BC00;
  static constexpr uint32_t kOnes = kBf16 ? 0x43004300 : 0x64006400;
  static constexpr uint32_t kOffset = kBf16 ? 0xC30FC30F : 0xE40FE40F;
};

// a + b in both halves, for sums that the operand's dtype holds exactly. In bfloat16 before sm_90 as a
// product with 1: there is no such addition.
template <Dtype kOperand>
NMKERN_HD uint32_t add_exact(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t sum;
  if constexpr (kOperand == Dtype::float16)
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  else
#if __CUDA_ARCH__ >= 900
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3F803F80u), "r"(b));
#endif
  return sum;
#else
  const auto sum = [&](int bit) -> uint32_t {
    const auto left = uint16_t(a >> bit), right = uint16_t(b >> bit);
    return kOperand == Dtype::float16 ? to_float16(from_float16(left) + from_float16(right))
                                      : to_bfloat16(from_bfloat16(left) + from_bfloat16(right));
  };
  return sum(0) | sum(16) << 16;
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

// The codes of fields p (low half) and p + P / 2 of a word.
template <Family kFamily, Dtype kOperand>
NMKERN_HD uint32_t decode_pair(uint32_t word, int p) {
  static_assert(kFamily != Family::normal, "normal's codes are in a table");
  using N = Numbers<kOperand>;
  if constexpr (kFamily == Family::rademacher) {
    return masked<0x80008000, N::kMinusOne>(word << (15 - p));
  } else {
    const uint32_t moved = p == 0 ? word << 1 : word >> (4 * p - 1);
    return add_exact<kOperand>(masked<0x001E001E, N::kOnes>(moved), N::kOffset);
  }
}

// normal's table in shared memory: entry u holds the code in its low half, 0 above, for each of the 32 lanes
// a copy in the lane's own bank, so that no lookup waits for another. Entries are 256 bytes apart, so that
// one PRMT makes the address; the odd 128-byte lines between the copies hold x (see skinny_kernel.h).
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
    } else {
      const uint32_t joined = output < kHalf ? low_halves(first, second) : high_halves(first, second);
      return decode_pair<kFamily, kOperand>(joined, output % kHalf);
    }
  } else {
    const uint32_t word = words.w[output];
    const int p = Patch::reduction(depth, h, 0);
    if constexpr (kFamily == Family::normal) {
      return join(lookup(word, p), lookup(word, p + kHalf));
    } else {
      return decode_pair<kFamily, kOperand>(word, p);
    }
  }
}

}  // namespace nmkern::cuda
