// Fields of a word as float32 without decoding: where they stand in it, alone, they are subnormal numbers.
//
//   the bits of field f and zeros elsewhere = field * 2^(field_place(f) - 149)
//
// This holds up to bit 23, the lowest of the exponent: floats of exponent 1 have the unit of subnormal ones. Fields
// above are shifted right first. x is multiplied by 2^-field_place(f) instead, and sums start from what makes codes
// of fields, code = 2 * (field - field_center):
//
//   sum_k x[k] * code[k] = 2 * (-field_center * sum_k x[k] + sum_k x[k] * field[k])
//
// This is done in runs so short that what cancels costs little accuracy. The relative error at K = 8192 (codes 3e-7),
// uniform and rademacher: 3.5e-7 and 2.6e-7 for normal x, 4.6e-7 and 3.5e-7 where none is negative.
#pragma once

#include <bit>

#include "../stream.h"

namespace nmkern::cpu {

constexpr int kFieldBits = 24, kFieldShift = 8;
constexpr int kSubnormalUnit = -149;  // the exponent of the smallest float32

constexpr bool has_fields(Family family) { return family != Family::normal; }
constexpr uint32_t field_mask(Family family) { return (1u << 32 / columns_per_word(family)) - 1; }
constexpr float field_center(Family family) { return -float(decode(family, 0)) / 2; }
constexpr int field_bit(Family family, int field) { return field * (32 / columns_per_word(family)); }
constexpr int field_place(Family family, int field) {
  const int bit = field_bit(family, field);
  return bit < kFieldBits ? bit : bit - kFieldShift;
}
constexpr bool is_subnormal_in_place(Family family) {
  for (int f = 0; f < columns_per_word(family); ++f) {
    const int place = field_place(family, f);
    const float all_ones = std::bit_cast<float>(field_mask(family) << place);
    if (double{all_ones} != field_mask(family) * 0x1p-149 * double(1 << place)) return false;
  }
  return true;
}
static_assert(is_subnormal_in_place(Family::uniform) && is_subnormal_in_place(Family::rademacher));

// Steps of the reduction in a run.
constexpr int field_run(Family family) { return family == Family::rademacher ? 64 : 32; }

}  // namespace nmkern::cpu
