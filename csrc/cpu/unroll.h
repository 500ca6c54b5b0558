// Loops with a known number of turns, unrolled by the compiler's front end: the turn is a constant.
#pragma once

#include <utility>

#include "kernels.h"

namespace nmkern::cpu {
namespace {  // a copy per instruction set: never merged by the linker

template <int... I, class Body>
NMKERN_INLINE void unroll(std::integer_sequence<int, I...>, Body&& body) {
  (body(std::integral_constant<int, I>{}), ...);
}
template <int N, class Body>
NMKERN_INLINE void unroll(Body&& body) {
  unroll(std::make_integer_sequence<int, N>{}, body);
}

}  // namespace
}  // namespace nmkern::cpu
