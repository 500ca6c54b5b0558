// What becomes of the sums that a lane of mma.sync or wgmma holds: their unit, and where they lie in memory.
// C is the kernel's Config or WideConfig.
#pragma once

#include "elements.cuh"

namespace nmkern::cuda {

NMKERN_DEVICE void add_sums(float& to, float from) { to = __fadd_rn(to, from); }

template <class Sums, int count>
NMKERN_DEVICE void add_sums(Sums (&to)[count], const Sums (&from)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) add_sums(to[i], from[i]);
}

// What the sums of row m are multiplied by, a power of two: they come in units of the codes, and of the row
// where it is scaled.
template <class C, class Call>
NMKERN_DEVICE float sum_scale(const Call& p, int64_t m) {
  constexpr float kScale = 1 / unit<C::Patch::kFamily, C::kOperand>();
  if constexpr (C::kScaled)
    if (p.row_scale && m < p.batch) return p.row_scale[m] * kScale;
  return kScale;
}

// That of a lane's rows of kTiles batch tiles, from `first` on. Loaded at once, for no load can pass a store;
// of more tiles, the kernels for large batches spill.
template <class C>
struct SumScales {
  static constexpr int kTiles = C::kBatchTiles == 1 || C::kTable ? 1 : 2;
  float scale[kTiles][2];

  template <class Call>
  NMKERN_DEVICE SumScales(const Call& p, int64_t batch_first, int first) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        scale[tile][e] = sum_scale<C>(p, batch_first + 8 * (first + tile) + c_col(lane_id(), e));
  }
};

// use(tile, e, m, scale) for the rows m of a lane's sums [tile][e], with what those are multiplied by.
template <class C, class Call, class Use>
NMKERN_DEVICE void for_each_row(const Call& p, int64_t batch_first, const Use& use) {
  using Scales = SumScales<C>;
#pragma unroll
  for (int first = 0; first < C::kBatchTiles; first += Scales::kTiles) {
    const Scales scales(p, batch_first, first);
#pragma unroll
    for (int tile = 0; tile < Scales::kTiles; ++tile)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t m = batch_first + 8 * (first + tile) + c_col(lane_id(), e);
        if (m < p.batch) use(first + tile, e, m, scales.scale[tile][e]);
      }
  }
}

// Where the outputs of a lane begin in the partial sums.
template <class C, class Call>
NMKERN_DEVICE float* partial_of(const Call& p, int64_t m, int64_t first_patch, int group, int slice,
                                int64_t split_index) {
  constexpr int kPatchOutputs = C::Patch::kTransposed ? C::Patch::kColumns : kRowsPerPatch;
  const int64_t n = (first_patch + group * kQuads) * kPatchOutputs + slice * C::Patch::kFields;
  return p.partial + (split_index * p.batch + m) * p.partial_stride + n;
}

// The sums of a lane: runs of consecutive outputs, four of them a store.
template <class C, class Call, class Sums>
NMKERN_DEVICE void write_partial(const Call& p, int64_t batch_first, int64_t first_patch, int slice,
                                 int64_t split_index, const Sums& sums) {
  for_each_row<C>(p, batch_first, [&](int tile, int e, int64_t m, float scale) {
#pragma unroll
    for (int group = 0; group < C::kGroups; ++group) {
      float* to = partial_of<C>(p, m, first_patch, group, slice, split_index);
#pragma unroll
      for (int output = 0; output < C::Patch::kOutputs; output += 4) {
        // Patch::output(tile, half) = 2 * tile + half; half is bit 1 of a C register's number.
        const auto& first = sums[group][output / 2][tile];
        const auto& second = sums[group][output / 2 + 1][tile];
        store_four(to + output, first[e] * scale, first[2 + e] * scale, second[e] * scale,
                   second[2 + e] * scale);
      }
    }
  });
}

}  // namespace nmkern::cuda
