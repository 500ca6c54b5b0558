// float16 and bfloat16 as 16 bits, exactly as IEEE 754 rounds: to the nearest, ties to even.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

namespace ptx {

enum class Half { float16, bfloat16 };

constexpr int digits(Half format) { return format == Half::float16 ? 11 : 8; }
// Exponent of the least normal number.
constexpr int least(Half format) { return format == Half::float16 ? -14 : -126; }

inline double decoded(uint16_t bits, Half format) {
  const int stored = digits(format) - 1, top = bits >> stored & ((1 << (15 - stored)) - 1);
  const int fraction = bits & ((1 << stored) - 1);
  const double sign = bits >> 15 ? -1.0 : 1.0;
  if (top == (1 << (15 - stored)) - 1) return fraction ? NAN : sign * INFINITY;
  const int exponent = top ? top + least(format) - 1 : least(format);
  return sign * std::ldexp(top ? fraction + (1 << stored) : fraction, exponent - stored);
}

// By a table: what runs most.
template <Half format>
double value_of(uint32_t bits) {
  static const auto kValues = [] {
    std::array<float, 65536> all;
    for (uint32_t i = 0; i < 65536; ++i) all[i] = float(decoded(uint16_t(i), format));
    return all;
  }();
  return kValues[bits & 0xFFFF];
}

inline uint16_t half_of(double value, Half format) {
  const int stored = digits(format) - 1;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0, infinity = uint16_t(0x7FFF >> stored << stored);
  if (std::isnan(value)) return 0x7FFF;
  const double size = std::fabs(value);
  if (std::isinf(size)) return sign | infinity;
  if (size == 0) return sign;
  int exponent = 0;
  std::frexp(size, &exponent);  // size < 2^exponent
  exponent = std::max(exponent - 1, least(format));
  const double units = std::nearbyint(std::ldexp(size, stored - exponent));
  // A carry into the exponent, and from it into infinity, comes out right.
  const int64_t bits = (int64_t{exponent - least(format)} << stored) + int64_t(units);
  return sign | uint16_t(std::min<int64_t>(bits, infinity));
}

// a * b + c before it is rounded, such that rounding it to a half once more is right: what double drops shows
// in the last bit.
inline double fused(double a, double b, double c) {
  const double product = a * b;  // exact: 22 digits at most
  const double sum = product + c;
  if (!std::isfinite(sum)) return sum;
  const double back = sum - product, rest = (product - (sum - back)) + (c - back);
  if (rest == 0) return sum;
  const bool odd = std::fmod(std::ldexp(sum, 52 - std::ilogb(sum)), 2.0) != 0;
  return odd ? sum : std::nextafter(sum, rest > 0 ? INFINITY : -INFINITY);
}

}  // namespace ptx
