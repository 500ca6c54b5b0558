// From a call of few rows to the integers' kernel and launch: which FixedConfig serves it, how the reduction
// is split.
//
// Invariant: as in skinny_plan.h, it follows from shapes, dtypes and constants, never from the device.
#pragma once

#include "finish.h"
#include "fixed_config.h"
#include "split_plan.h"

namespace nmkern::cuda {

// The least reduction that is worth a block, and what a block takes beside its steps, with each tile of
// columns.
constexpr int64_t kFixedLeastReduction = 256;
constexpr int64_t kFixedBlockClocks = 1500, kFixedTileClocks = 500;

struct FixedPlan {
  FixedProduct product;
  Finish finish;
  int64_t blocks_x, splits, partial_bytes;
  int64_t scratch_bytes() const { return partial_bytes + index_bytes(finish); }
};

// Whether the integers' kernel serves a call.
inline bool is_fixed(const Dense& call) {
  return call.batch <= kFixedRows && call.family != Family::normal && call.fixed_point;
}

template <class C>
FixedPlan fixed_plan_of(const Dense& call) {
  using Patch = typename C::Patch;
  const int64_t in = call.transposed ? call.row_offset : call.col_offset;
  const int64_t out = call.transposed ? call.col_offset : call.row_offset;
  const int64_t reduction_skip = in % Patch::kReduction, output_skip = out % C::kPatchOutputs;
  const int64_t patches =
      ceil_div(ceil_div(output_skip + call.outputs(), C::kPatchOutputs), C::kBlockPatches) * C::kBlockPatches;
  const int64_t stride = patches * C::kPatchOutputs;

  FixedPlan plan{};
  FixedProduct& p = plan.product;
  plan.blocks_x = patches / C::kBlockPatches * C::kSlices;
  p.x = input_of(call, reduction_skip);
  p.keys = round_keys(call.key, call.family);
  p.reduction_patch = uint32_t(in / Patch::kReduction);
  p.output_patch = uint32_t(out / C::kPatchOutputs);
  p.steps = ceil_div(reduction_skip + call.inputs(), C::kStep);
  Reduction reduction{};
  reduction.steps = p.steps;
  reduction.blocks = plan.blocks_x;
  reduction.round_blocks = kMultiprocessors;
  // Or the tensor cores', by two thirds of the rate that they have with wgmma, which is assumed.
  const int64_t clocks = std::max<int64_t>(generating_bytes(call.family), C::kTiles * 3 / 2);
  reduction.step_clocks = int64_t{C::kBlockOutputs} * C::kStep * clocks / (4 * 4 * kLanes);
  reduction.block_clocks = kFixedBlockClocks + C::kTiles * kFixedTileClocks;
  reduction.split_bytes = 2 * 4 * call.batch * stride;
  reduction.least_steps = kFixedLeastReduction / C::kStep;
  reduction.most_splits = call.most_scratch / (4 * call.batch * stride);
  p.split_steps = ceil_div(p.steps, splits_of(reduction));
  p.partial_stride = stride;
  plan.splits = ceil_div(p.steps, p.split_steps);
  plan.partial_bytes = aligned_up(plan.splits * call.batch * stride * 4);
  plan.finish = finish_of(call, plan.splits, stride, output_skip);
  return plan;
}

// Where the plan's scratch lies, which is aligned to kAlignment.
inline void place(FixedPlan& plan, void* scratch) {
  plan.product.partial = plan.finish.partial = static_cast<float*>(scratch);
  plan.finish.index = static_cast<unsigned char*>(scratch) + plan.partial_bytes;
}

// Calls use.template operator()<FixedConfig>() with the one that serves a call that is_fixed: of four digits,
// or of three where that saves a tile, and a result of eight bits cannot tell (gradients of gains have more).
template <class Use>
auto with_fixed_config(const Dense& call, const Use& use) {
  const auto of_family = [&]<Family family, bool transposed>() {
    if (call.batch <= 2) return use.template operator()<FixedConfig<family, transposed, 1>>();
    if (call.batch <= 4) return use.template operator()<FixedConfig<family, transposed, 2>>();
    if (call.x.dtype == Dtype::bfloat16 && !call.gain_grad.data)
      return use.template operator()<FixedConfig<family, transposed, 3>>();
    return use.template operator()<FixedConfig<family, transposed, 4>>();
  };
  constexpr Family kUniform = Family::uniform, kRademacher = Family::rademacher;
  if (call.family == kUniform)
    return call.transposed ? of_family.template operator()<kUniform, true>()
                           : of_family.template operator()<kUniform, false>();
  return call.transposed ? of_family.template operator()<kRademacher, true>()
                         : of_family.template operator()<kRademacher, false>();
}

int64_t fixed_scratch(const Dense& call);
// Enqueues it; a cudaError_t.
int fixed_product(const Dense& call, void* scratch, void* stream);

}  // namespace nmkern::cuda
