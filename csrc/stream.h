// The weight stream, version 1, for host and device: the C++ twin of nmkern/stream.py, which is the
// law and explains it. tests/vectors.txt ties the two together.
//
//   word r of philox4x32_7(c0 = col / P, c1 = row / 4, 0, tag) belongs to row 4 * c1 + r,
//   field f of it (bits f * (32 / P) and up) to column P * c0 + f, P columns a word.
//
// Invariant: integers only. Nothing here depends on a shape, a thread or a device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define NMKERN_HD __host__ __device__ __forceinline__
#else
#define NMKERN_HD inline
#endif

namespace nmkern {

// The values are the last word of the counter.
enum class Family : uint32_t { rademacher = 0x101, uniform = 0x102, normal = 0x103 };
constexpr uint32_t kSparseTag = 0x104;

constexpr int kRowsPerPatch = 4;
NMKERN_HD constexpr int columns_per_word(Family family) {
  return family == Family::rademacher ? 32 : family == Family::uniform ? 8 : 4;
}

constexpr int kRounds = 7;
constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;

struct Key {
  uint32_t k0, k1;
};

struct Words {
  uint32_t w[4];
};

NMKERN_HD Words philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, Key key) {
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = uint64_t{kMultiplier0} * c0;
    const uint64_t p1 = uint64_t{kMultiplier1} * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ key.k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ key.k1;
    c3 = uint32_t(p0);
    key.k0 += kWeyl0;
    key.k1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// |code| of the normal family: the code of field u is kNormal[u - 128] for u >= 128 and
// -kNormal[127 - u] below. See nmkern/stream.py for the formula.
constexpr uint8_t kNormal[128] = {
    0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10, 11, 12, 13,
    14, 15, 15, 16, 17, 18, 19, 20, 21, 21, 22, 23, 24, 25, 26, 27,
    28, 28, 29, 30, 31, 32, 33, 34, 35, 36, 36, 37, 38, 39, 40, 41,
    42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57,
    58, 59, 60, 61, 62, 63, 64, 65, 67, 68, 69, 70, 71, 72, 74, 75,
    76, 77, 79, 80, 81, 82, 84, 85, 87, 88, 89, 91, 92, 94, 95, 97,
    99, 100, 102, 104, 105, 107, 109, 111, 113, 115, 117, 119, 122, 124, 126, 129,
    132, 135, 138, 141, 144, 148, 152, 156, 161, 166, 172, 179, 188, 199, 215, 252,
};

NMKERN_HD constexpr int decode(Family family, uint32_t field) {
  if (family == Family::rademacher) return 2 * int(field) - 1;
  if (family == Family::uniform) return 2 * int(field) - 15;
  return field >= 128 ? int(kNormal[field - 128]) : -int(kNormal[127 - field]);
}

// Draw s of a sparse row's Floyd sampling: an index in [0, j], j = n - fan_in + s.
NMKERN_HD uint32_t sparse_draw(uint32_t word, uint32_t j) {
  return uint32_t((uint64_t{word} * (uint64_t{j} + 1)) >> 32);
}

}  // namespace nmkern
