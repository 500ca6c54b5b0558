// How a caller's tensors reach the kernels of every device, and the host's conversions of their elements.
#pragma once

#include <bit>
#include <cstdint>

namespace nmkern {

enum class Dtype { float32, bfloat16, float16 };

struct Matrix {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t row_stride = 0, col_stride = 0;
};

// A bank of float32 vectors [rows, features], contiguous. Row m reads row 0 of a bank of one row, else
// context[m], else m.
struct Bank {
  float* data = nullptr;
  int64_t rows = 0;
};

constexpr float from_bfloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
constexpr uint16_t to_bfloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return uint16_t(value == value ? rounded : bits >> 16 | 0x40);
}

// float16 by hand: GCC has no _Float16 in C++ before 12 (AArch64: 13), and where the CPU is not known to
// convert, _Float16 is a call of a libgcc of GCC 12 for each element, which older systems have not.
constexpr float from_float16(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = bits & 0x7FFF;
  const uint32_t subnormal = std::bit_cast<uint32_t>(float(int(magnitude)) * 0x1p-24f);
  const uint32_t normal = (magnitude << 13) + ((127 - 15) << 23);
  const uint32_t special = (magnitude << 13) | 0x7F800000;
  return std::bit_cast<float>(sign | (magnitude < 0x400 ? subnormal : magnitude < 0x7C00 ? normal : special));
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
constexpr uint16_t to_float16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  // 0.5 has 2^-24 as its unit in the last place, as subnormals of float16 have.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - std::bit_cast<uint32_t>(0.5f);
  // The carry of a mantissa that rounds up goes into the exponent, at the end of the range to infinity.
  const uint32_t normal = (magnitude - ((127 - 15) << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  const uint32_t special = magnitude > 0x7F800000 ? 0x7E00 | (magnitude >> 13 & 0x3FF) : 0x7C00;
  return uint16_t(sign | (magnitude < 0x38800000 ? subnormal : magnitude < 0x47800000 ? normal : special));
}

}  // namespace nmkern
