// From a call to its kernel and launch: which Config serves it, how the reduction is split.
//
// Invariant: it follows from shapes, dtypes and constants, never from the device, so that every GPU takes
// the same sums in the same order.
#pragma once

#include <algorithm>

#include "finish.h"
#include "skinny_config.h"
#include "split_plan.h"

namespace nmkern::cuda {

// Warps of a multiprocessor that a split counts on, the least reduction that is worth a block, and what a
// block takes beside its steps: until the first x is there, and at the end.
constexpr int64_t kBusyWarps = 8;
constexpr int64_t kLeastReduction = 256;
constexpr int64_t kBlockClocks = 2000;

struct Plan {
  Product product;
  Packing packing;
  Finish finish;
  int64_t blocks_x, splits, blocks_z, partial_bytes;
  int64_t scratch_bytes() const { return packing.bytes() + partial_bytes + index_bytes(finish); }
};

// Where the plan's scratch lies, which is aligned to kAlignment.
inline void place(Plan& plan, const Dense& call, void* scratch) {
  auto* at = static_cast<unsigned char*>(scratch);
  static_cast<Operand&>(plan.product) = place(plan.packing, call, at);
  at += plan.packing.bytes();
  plan.product.partial = plan.finish.partial = reinterpret_cast<float*>(at);
  plan.finish.index = at + plan.partial_bytes;
}

template <class C>
Plan plan_of(const Dense& call) {
  using Patch = typename C::Patch;
  constexpr int kPatchOutputs = C::kBlockOutputs / C::kBlockPatches;
  const int64_t in = call.transposed ? call.row_offset : call.col_offset;
  const int64_t out = call.transposed ? call.col_offset : call.row_offset;
  const int64_t reduction_skip = in % Patch::kReduction, output_skip = out % kPatchOutputs;
  const int64_t steps = ceil_div(reduction_skip + call.inputs(), C::kStep);
  const int64_t tiles = ceil_div(ceil_div(output_skip + call.outputs(), kPatchOutputs), C::kBlockPatches);
  const int64_t stride = tiles * C::kBlockOutputs;

  Plan plan{};
  plan.blocks_x = tiles * C::kSlices;
  plan.packing = packing_of(call, C::kParts, reduction_skip, Patch::kReduction, C::kStep);
  plan.blocks_z = ceil_div(call.batch, 8 * C::kBatchTiles);
  constexpr int64_t kShare = kBusyWarps / C::kWarps;  // blocks of a multiprocessor
  constexpr int64_t kStepWeights = int64_t{C::kOutputWarps} * C::kWarpOutputs * C::kStep;
  Reduction reduction{};
  reduction.steps = steps;
  reduction.blocks = plan.blocks_x * plan.blocks_z;
  reduction.round_blocks = kShare * kMultiprocessors;
  reduction.step_clocks = kShare * kStepWeights * generating(call.family) / (4 * 4 * kLanes);
  reduction.block_clocks = kBlockClocks;
  reduction.split_bytes = 2 * 4 * call.batch * stride;
  reduction.least_steps = std::max<int64_t>(1, kLeastReduction / C::kStep);
  reduction.most_splits = sums_bytes(call, plan.packing) / (4 * call.batch * stride);
  const int64_t wanted = splits_of(reduction);
  const int64_t split_steps = ceil_div(ceil_div(steps, wanted), C::kUnroll) * C::kUnroll;
  plan.splits = ceil_div(steps, split_steps);
  plan.partial_bytes = aligned_up(plan.splits * call.batch * stride * 4);

  Product& p = plan.product;
  p.keys = round_keys(call.key, call.family);
  p.reduction_patch = uint32_t(in / Patch::kReduction);
  p.output_patch = uint32_t(out / kPatchOutputs);
  p.steps = steps;
  p.split_steps = split_steps;
  p.partial_stride = stride;

  plan.finish = finish_of(call, plan.splits, stride, output_skip);
  return plan;
}

// Calls use.template operator()<Config>() with the Config that serves a call. This is the table of kernels:
// tiles of 8 to 64 rows, of float32 up to 32, as 64 would take more registers than there are.
template <class Use>
auto with_config(const Dense& call, const Use& use) {
  return with_operands(call, [&]<Family family, bool transposed, Dtype operand, int parts>() {
    if constexpr (family == Family::normal)  // the others: see fixed_plan.h
      if (call.batch <= 8) return use.template operator()<Config<family, transposed, 1, operand, parts>>();
    if (call.batch <= 16) return use.template operator()<Config<family, transposed, 2, operand, parts>>();
    if constexpr (parts == 1)
      if (call.batch > 32) return use.template operator()<Config<family, transposed, 8, operand, parts>>();
    return use.template operator()<Config<family, transposed, 4, operand, parts>>();
  });
}

}  // namespace nmkern::cuda
