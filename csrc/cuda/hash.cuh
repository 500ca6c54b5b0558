// Parts of the hash that stay in registers.
#pragma once

#include <type_traits>

#include "hash.h"
#include "threads.cuh"

namespace nmkern::cuda {

// Left alone, nvcc computes them in the loop again: 2.09 instructions a weight for 1.98 (uniform, 8 rows).
NMKERN_DEVICE void keep(RowPart& part) { asm volatile("" : "+r"(part.p2.high), "+r"(part.p2.low)); }
NMKERN_DEVICE void keep(ColumnPart& part) {
  asm volatile("" : "+r"(part.low1), "+r"(part.low2), "+r"(part.p3.high), "+r"(part.p3.low));
}

// What depends on the outputs of a lane alone, of its patches beside each other.
template <class Patch>
using OutputPart = std::conditional_t<Patch::kTransposed, ColumnPart, RowPart>;

template <class Patch, int groups>
NMKERN_DEVICE void output_parts(uint32_t first, const RoundKeys& keys, OutputPart<Patch> (&part)[groups]) {
#pragma unroll
  for (int group = 0; group < groups; ++group) {
    const uint32_t counter = first + uint32_t(group * kQuads);
    if constexpr (Patch::kTransposed)
      part[group] = column_part(counter, keys);
    else
      part[group] = row_part(counter, keys);
    keep(part[group]);
  }
}

}  // namespace nmkern::cuda
