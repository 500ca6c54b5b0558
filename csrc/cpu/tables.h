// The normal family's 256 codes in the forms that vector code looks them up in.
#pragma once

#include <cstring>

#include "../stream.h"

namespace nmkern::cpu {
namespace {

struct NormalFloats {
  alignas(64) float code[256];
  NormalFloats() {
    for (uint32_t u = 0; u < 256; ++u) code[u] = float(decode(Family::normal, u));
  }
};

// |code| by distance from the middle, as the two bytes of a bfloat16.
struct NormalBytes {
  alignas(64) uint8_t high[128], low[128];
  NormalBytes() {
    for (int j = 0; j < 128; ++j) {
      const float value = kNormal[j];
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      high[j] = uint8_t(bits >> 24);
      low[j] = uint8_t(bits >> 16);
    }
  }
};

}  // namespace
}  // namespace nmkern::cpu
