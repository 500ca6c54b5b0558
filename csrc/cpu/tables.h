// The normal family's 256 codes in the forms that vector code looks them up in.
#pragma once

#include <bit>

#include "../stream.h"

namespace nmkern::cpu {
namespace {

struct NormalFloats {
  alignas(64) float code[256] = {};
  constexpr NormalFloats() {
    for (uint32_t u = 0; u < 256; ++u) code[u] = float(decode(Family::normal, u));
  }
};

// |code| by distance from the middle, as the two bytes of a bfloat16.
struct NormalBytes {
  alignas(64) uint8_t high[128] = {}, low[128] = {};
  constexpr NormalBytes() {
    for (int j = 0; j < 128; ++j) {
      const auto bits = std::bit_cast<uint32_t>(float(kNormal[j]));
      high[j] = uint8_t(bits >> 24);
      low[j] = uint8_t(bits >> 16);
    }
  }
};

// Byte indices into (low bytes of 16 lanes, high bytes of 16 lanes) that make, of field f of every lane, the
// upper half of a float32; or of fields f and f + 2 a pair of bfloat16.
struct NormalSelect {
  alignas(64) uint8_t to_float[4][64] = {}, to_pair[2][64] = {};
  constexpr NormalSelect() {
    for (int lane = 0; lane < 16; ++lane) {
      for (int f = 0; f < 4; ++f) {
        to_float[f][4 * lane + 2] = uint8_t(4 * lane + f);
        to_float[f][4 * lane + 3] = uint8_t(64 + 4 * lane + f);
      }
      for (int f = 0; f < 2; ++f) {
        for (int half = 0; half < 2; ++half) {
          to_pair[f][4 * lane + 2 * half] = uint8_t(4 * lane + f + 2 * half);
          to_pair[f][4 * lane + 2 * half + 1] = uint8_t(64 + 4 * lane + f + 2 * half);
        }
      }
    }
  }
};

// Constants, not function-local statics: the check whether those are built stood in the inner loop.
[[maybe_unused]] constexpr NormalFloats kNormalFloats;
[[maybe_unused]] constexpr NormalBytes kNormalBytes;
[[maybe_unused]] constexpr NormalSelect kNormalSelect;

}  // namespace
}  // namespace nmkern::cpu
