// From a call to launches of the kernel for large batches: which WideConfig serves it, whether x is packed
// first, how the batch is parted and the reduction split.
//
// Invariant: as in skinny_plan.h, it follows from shapes, dtypes and constants, never from the device.
#pragma once

#include "skinny_plan.h"
#include "wide_config.h"

namespace nmkern::cuda {

// The least reduction that is worth a block, and what a block takes beside it. A batch whose scratch would
// take more than call.most_scratch is taken in parts of kBatchRows.
constexpr int64_t kWideLeastReduction = 512;
constexpr int64_t kWideBlockClocks = 4000;
constexpr int64_t kBatchRows = 128;
static_assert(kBatchRows <= kChunkRows, "the least part takes no index");

// Whether y, out_gain and bias take four outputs at a time; what does not is finish.h's to write. Both in one
// kernel were 12,000 instructions for each of 36, and a minute of the compiler's time.
inline bool in_fours(const Finish& f) {
  const auto aligned = [](const void* data, uintptr_t bytes) {
    return reinterpret_cast<uintptr_t>(data) % bytes == 0;
  };
  return f.y.data && f.y.col_stride == 1 && f.y.row_stride % 4 == 0 && f.outputs % 4 == 0 &&
         f.skip % 4 == 0 && aligned(f.y.data, f.y.dtype == Dtype::float32 ? 16 : 8) &&
         aligned(f.out_gain.data, 16) && aligned(f.bias.data, 16);
}

struct WidePlan {
  WideProduct product;
  Packing packing;
  int64_t splits, partial_bytes;
  int64_t scratch_bytes() const { return packing.bytes() + partial_bytes + index_bytes(product.finish); }
};

template <class C>
WidePlan wide_plan_of(const Dense& call) {
  using Patch = typename C::Patch;
  const int64_t in = call.transposed ? call.row_offset : call.col_offset;
  const int64_t out = call.transposed ? call.col_offset : call.row_offset;
  const int64_t reduction_skip = in % Patch::kReduction, output_skip = out % C::kPatchOutputs;
  const int64_t patch_blocks =
      ceil_div(ceil_div(output_skip + call.outputs(), C::kPatchOutputs), C::kBlockPatches);
  const int64_t stride = patch_blocks * C::kBlockOutputs;

  WidePlan plan{};
  WideProduct& p = plan.product;
  plan.packing = packing_of(call, C::kParts, reduction_skip, Patch::kReduction, C::kTurn);
  p.turns = ceil_div(reduction_skip + call.inputs(), C::kTurn);
  p.output_blocks = patch_blocks * (C::kSlices / C::kBlockSlices);
  p.batch_blocks = ceil_div(call.batch, 8 * C::kBatchTiles);
  const int64_t left = sums_bytes(call, plan.packing) - index_bytes(finish_of(call, 1, stride, output_skip));
  Reduction reduction{};
  reduction.steps = p.turns;
  reduction.blocks = p.output_blocks * p.batch_blocks;
  reduction.round_blocks = kMultiprocessors;
  // 2048 products a clock, or as many as 128 instructions a clock can generate weights for.
  constexpr int64_t kWeights = 256 * C::kTurn;
  reduction.step_clocks = std::max<int64_t>(kWeights * 8 * C::kBatchTiles * C::kParts / 2048,
                                            kWeights * generating(call.family) / (4 * 4 * kLanes));
  reduction.block_clocks = kWideBlockClocks;
  reduction.split_bytes = 2 * 4 * call.batch * stride;
  reduction.direct = !call.gain_grad.data;
  reduction.least_steps = std::max<int64_t>(1, kWideLeastReduction / C::kTurn);
  reduction.most_splits = left / aligned_up(4 * call.batch * stride);
  p.split_turns = ceil_div(p.turns, splits_of(reduction));
  plan.splits = ceil_div(p.turns, p.split_turns);
  p.tiles = p.output_blocks * p.batch_blocks * plan.splits;
  p.keys = round_keys(call.key, call.family);
  p.reduction_patch = uint32_t(in / Patch::kReduction);
  p.output_patch = uint32_t(out / C::kPatchOutputs);
  p.partial_stride = stride;
  p.finish = finish_of(call, plan.splits, stride, output_skip);
  if (plan.splits > 1 || call.gain_grad.data || !in_fours(p.finish))
    plan.partial_bytes = aligned_up(plan.splits * call.batch * stride * 4);
  return plan;
}

// Where the plan's scratch lies.
inline void place(WidePlan& plan, const Dense& call, void* scratch) {
  auto* at = static_cast<unsigned char*>(scratch);
  static_cast<Operand&>(plan.product) = place(plan.packing, call, at);
  at += plan.packing.bytes();
  if (plan.partial_bytes) {
    plan.product.partial = reinterpret_cast<float*>(at);
    plan.product.finish.partial = plan.product.partial;
    plan.product.finish.index = at + plan.partial_bytes;
  }
}

// Rows of the batch that are taken at once.
template <class C>
int64_t wide_rows(const Dense& call) {
  Dense one = call;
  one.batch = std::min(call.batch, kBatchRows);
  const WidePlan plan = wide_plan_of<C>(one);
  const Finish& finish = plan.product.finish;
  const bool gradient = call.gain_grad.data,
             indexed = gradient && gradient_of(finish) == Gradient::by_context;
  const int64_t index = indexed ? ceil_div(chunk_index_bytes(finish), kChunkRows) : 0;
  const int64_t sums = gradient || !in_fours(finish) ? plan.product.partial_stride * 4 : 0;
  const int64_t bytes = plan.packing.bytes() / one.batch + sums + index;
  if (bytes == 0) return call.batch;
  return std::min(call.batch, std::max(call.most_scratch / bytes / kBatchRows, int64_t{1}) * kBatchRows);
}

inline Matrix rows_from(Matrix a, int64_t first) {
  if (a.data)
    a.data = static_cast<unsigned char*>(a.data) + first * a.row_stride * (a.dtype == Dtype::float32 ? 4 : 2);
  return a;
}

// The rows [first, first + rows) of a call. The first part overwrites a gradient of one row, the others add.
inline Dense part_of(const Dense& call, int64_t first, int64_t rows) {
  Dense part = call;
  const auto bank = [&](Bank b) {
    const bool each = b.data && !call.context && b.rows > 1;  // a row for each row of the batch
    return each ? Bank{b.data + first * (b.data == call.in_gain.data ? call.inputs() : call.outputs()), rows}
                : b;
  };
  part.batch = rows;
  part.x = rows_from(call.x, first);
  part.y = rows_from(call.y, first);
  part.other = rows_from(call.other, first);
  part.in_gain = bank(call.in_gain);
  part.out_gain = bank(call.out_gain);
  part.bias = bank(call.bias);
  part.gain_grad = bank(call.gain_grad);
  if (call.context) part.context = call.context + first;
  return part;
}

// Calls use.template operator()<WideConfig>() with the one that serves a call: tiles of 32 to 128 rows, of up
// to 64 of float32.
template <class Use>
auto with_wide_config(const Dense& call, const Use& use) {
  return with_operands(call, [&]<Family family, bool transposed, Dtype operand, int parts>() {
    if (call.batch <= 32) return use.template operator()<WideConfig<family, transposed, 4, operand, parts>>();
    if constexpr (parts == 1)
      if (call.batch > 64)
        return use.template operator()<WideConfig<family, transposed, 16, operand, parts>>();
    return use.template operator()<WideConfig<family, transposed, 8, operand, parts>>();
  });
}

template <class C>
int64_t wide_scratch_of(const Dense& call) {
  const int64_t most = wide_rows<C>(call),
                last = (call.batch - 1) % most + 1;  // fewer rows may be split more
  const auto bytes = [&](int64_t rows) { return wide_plan_of<C>(part_of(call, 0, rows)).scratch_bytes(); };
  return std::max(bytes(most), bytes(last));
}

// use(plan) for each part of the batch, until one has an error; `scratch` is aligned to kAlignment.
template <class C, class Use>
int for_each_part(const Dense& call, void* scratch, const Use& use) {
  const int64_t most = wide_rows<C>(call);
  for (int64_t first = 0; first < call.batch; first += most) {
    const Dense part = part_of(call, first, std::min(most, call.batch - first));
    WidePlan plan = wide_plan_of<C>(part);
    place(plan, part, scratch);
    plan.product.finish.add = first > 0 && call.gain_grad.rows == 1;
    if (const int error = use(plan)) return error;
  }
  return 0;
}

}  // namespace nmkern::cuda
