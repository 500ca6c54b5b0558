// csrc/cpu/amx.cpp's place for CPUs without AMX: the same tile kernels over tile registers in memory.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../../csrc/cpu/amx_tile.h"
#include "../../csrc/matrix.h"

namespace nmkern::cpu {
namespace {

// The instructions as Intel's manual (volume 2) has them: numbers that are subnormal count as zero.
struct SimulatedUnit {
  static inline int rows_of[8];
  static inline uint32_t tiles[8][16][16];

  static void require(bool holds) {
    if (holds) return;
    std::puts("a tile instruction faults");
    std::exit(1);
  }
  static void configure(int rows) {
    require(rows > 0 && rows <= 16 && !rows_of[0]);
    for (int i = 0; i < 8; ++i) rows_of[i] = i == 7 ? 16 : rows;
    std::memset(tiles, 0, sizeof tiles);
  }
  static void release() { std::memset(rows_of, 0, sizeof rows_of); }

  template <int To>
  static void zero() {
    std::memset(tiles[To], 0, sizeof tiles[To]);
  }
  template <int To>
  static void load(const void* from, int64_t row_bytes) {
    zero<To>();
    for (int r = 0; r < rows_of[To]; ++r)
      std::memcpy(tiles[To][r], static_cast<const char*>(from) + r * row_bytes, 64);
  }
  template <int From>
  static void store(void* to, int64_t row_bytes) {
    for (int r = 0; r < rows_of[From]; ++r)
      std::memcpy(static_cast<char*>(to) + r * row_bytes, tiles[From][r], 64);
  }
  static float normal(float v) { return v < 0x1p-126f && v > -0x1p-126f ? 0.0f * v : v; }
  template <int Sum, int X, int W>
  static void multiply() {
    multiply(Sum, X, W);
  }
  template <int Sum, int X, int W>
  static void multiply_bytes() {
    multiply_bytes(Sum, X, W);
  }
  static void multiply_bytes(int sum_at, int x, int w) {
    require(rows_of[sum_at] == rows_of[x] && rows_of[w] == 16);
    for (int m = 0; m < rows_of[sum_at]; ++m)
      for (int n = 0; n < 16; ++n)
        for (int k = 0; k < 16; ++k)
          for (int i = 0; i < 32; i += 8)
            tiles[sum_at][m][n] += uint32_t(int8_t(tiles[x][m][k] >> i) * uint8_t(tiles[w][k][n] >> i));
  }
  static void multiply(int sum_at, int x, int w) {
    require(rows_of[sum_at] == rows_of[x] && rows_of[w] == 16);
    const auto half = [](uint32_t pair, int h) { return normal(from_bfloat16(uint16_t(pair >> (16 * h)))); };
    for (int m = 0; m < rows_of[sum_at]; ++m) {
      for (int n = 0; n < 16; ++n) {
        float sum[2] = {};
        for (int k = 0; k < 16; ++k)
          for (int h = 0; h < 2; ++h)
            sum[h] = normal(sum[h] + half(tiles[x][m][k], h) * half(tiles[w][k][n], h));
        const float before = normal(std::bit_cast<float>(tiles[sum_at][m][n]));
        tiles[sum_at][m][n] = std::bit_cast<uint32_t>(normal(before + normal(sum[0] + sum[1])));
      }
    }
  }
};

constexpr MatrixUnit kUnit = matrix_unit<SimulatedUnit>();

}  // namespace

const MatrixUnit* amx_unit() { return &kUnit; }
bool amx_usable() { return true; }

}  // namespace nmkern::cpu
