// From a call to its kernel and launch: which Config serves it, how the reduction is split.
//
// Invariant: it follows from shapes, dtypes and constants, never from the device, so that every GPU takes
// the same sums in the same order.
#pragma once

#include <algorithm>

#include "dense.h"
#include "gradient.h"
#include "skinny_kernel.h"

namespace nmkern::cuda {

// Blocks that a split aims at, two for each of an H100's 132 multiprocessors; the least reduction that is
// worth a block.
constexpr int64_t kBlocks = 264;
constexpr int64_t kLeastReduction = 256;

constexpr int64_t kAlignment = 64;  // bytes of what lies in scratch

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t aligned_up(int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; }

struct Plan {
  Product product;
  Finish finish;
  int64_t blocks_x, splits, blocks_z;
  int64_t partial_bytes() const { return aligned_up(splits * product.batch * product.partial_stride * 4); }
  int64_t scratch_bytes() const { return partial_bytes() + index_bytes(finish); }
};

// Where the plan's scratch lies, which is aligned to kAlignment.
inline void place(Plan& plan, void* scratch) {
  plan.product.partial = plan.finish.partial = static_cast<float*>(scratch);
  plan.finish.index = static_cast<unsigned char*>(scratch) + plan.partial_bytes();
}

inline Finish finish_of(const Dense& call, int64_t splits, int64_t stride, int64_t skip) {
  Finish f{};
  f.splits = splits;
  f.partial_stride = stride;
  f.skip = skip;
  f.batch = call.batch;
  f.outputs = call.outputs();
  f.factor = call.factor;
  f.out_gain = call.out_gain;
  f.bias = call.bias;
  f.context = call.context;
  f.y = call.y;
  f.other = call.other;
  f.gain_grad = call.gain_grad;
  return f;
}

// Whether x is multiplied as it is: it has the tensor cores' dtypes, and no gain that would make it a
// float32.
inline bool is_operand(const Dense& call) { return call.x.dtype != Dtype::float32 && !call.in_gain.data; }

// Whether it is, in whole patches, each of a row aligned to its size.
inline bool is_aligned(const Dense& call, int reduction_skip, int patch) {
  const auto multiple = [&](int64_t elements) { return elements % std::min(patch, 8) == 0; };
  return is_operand(call) && call.x.col_stride == 1 && reduction_skip == 0 && call.inputs() % patch == 0 &&
         multiple(call.x.row_stride) &&
         reinterpret_cast<uintptr_t>(call.x.data) % (2 * std::min(patch, 8)) == 0;
}

template <class C>
Plan plan_of(const Dense& call) {
  using Patch = typename C::Patch;
  constexpr int kPatchOutputs = C::kBlockOutputs / C::kBlockPatches;
  const int64_t in = call.transposed ? call.row_offset : call.col_offset;
  const int64_t out = call.transposed ? call.col_offset : call.row_offset;
  const int64_t reduction_skip = in % Patch::kReduction, output_skip = out % kPatchOutputs;
  const int64_t steps = ceil_div(ceil_div(reduction_skip + call.inputs(), Patch::kReduction), kQuadLanes);
  const int64_t tiles = ceil_div(ceil_div(output_skip + call.outputs(), kPatchOutputs), C::kBlockPatches);
  const int64_t stride = tiles * C::kBlockOutputs;

  Plan plan{};
  plan.blocks_x = tiles * C::kSlices;
  plan.blocks_z = ceil_div(call.batch, 8 * C::kBatchTiles);
  constexpr int64_t kLeastSteps = kLeastReduction / (kQuadLanes * Patch::kReduction);
  const int64_t wanted = std::max<int64_t>(
      1, std::min({kBlocks / (plan.blocks_x * plan.blocks_z), steps / std::max<int64_t>(1, kLeastSteps),
                   call.most_scratch / (4 * call.batch * stride)}));
  const int64_t split_steps = ceil_div(ceil_div(steps, wanted), C::kUnroll) * C::kUnroll;
  plan.splits = ceil_div(steps, split_steps);

  Product& p = plan.product;
  p.x = call.x;
  p.in_gain = call.in_gain;
  p.context = call.context;
  p.aligned = is_aligned(call, int(reduction_skip), Patch::kReduction);
  p.keys = round_keys(call.key, call.family);
  p.batch = call.batch;
  p.reduction = call.inputs();
  p.reduction_patch = uint32_t(in / Patch::kReduction);
  p.reduction_skip = int32_t(reduction_skip);
  p.output_patch = uint32_t(out / kPatchOutputs);
  p.steps = steps;
  p.split_steps = split_steps;
  p.partial_stride = stride;

  plan.finish = finish_of(call, plan.splits, stride, output_skip);
  return plan;
}

// Calls use.template operator()<Config>() with the Config that serves a call. This is the table of kernels:
// x that is multiplied as it is, in tiles of 8 to 64 rows; other x in three parts, of 8 to 32 rows, where
// 64 would take more registers than there are.
template <Family family, bool transposed, Dtype operand, int parts, class Use>
auto with_tiles(const Dense& call, const Use& use) {
  if (call.batch <= 8) return use.template operator()<Config<family, transposed, 1, operand, parts>>();
  if (call.batch <= 16) return use.template operator()<Config<family, transposed, 2, operand, parts>>();
  if constexpr (parts == 1)
    if (call.batch > 32) return use.template operator()<Config<family, transposed, 8, operand, parts>>();
  return use.template operator()<Config<family, transposed, 4, operand, parts>>();
}

template <Family family, bool transposed, class Use>
auto with_config(const Dense& call, const Use& use) {
  if (!is_operand(call)) return with_tiles<family, transposed, Dtype::bfloat16, 3>(call, use);
  return call.x.dtype == Dtype::float16 ? with_tiles<family, transposed, Dtype::float16, 1>(call, use)
                                        : with_tiles<family, transposed, Dtype::bfloat16, 1>(call, use);
}

template <class Use>
auto with_config(const Dense& call, const Use& use) {
  switch (call.family) {
    case Family::rademacher:
      return call.transposed ? with_config<Family::rademacher, true>(call, use)
                             : with_config<Family::rademacher, false>(call, use);
    case Family::uniform:
      return call.transposed ? with_config<Family::uniform, true>(call, use)
                             : with_config<Family::uniform, false>(call, use);
    default:
      return call.transposed ? with_config<Family::normal, true>(call, use)
                             : with_config<Family::normal, false>(call, use);
  }
}

}  // namespace nmkern::cuda
