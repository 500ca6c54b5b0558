// From a call of the sparse projection to its kernels and launches, and whether there are any for it.
//
// Invariant: what a launch sums, and in which order, does not depend on the device; how many rows of x a
// block holds may.
#pragma once

#include <algorithm>

#include "sparse.h"
#include "sparse_tile.h"

namespace nmkern::cuda {

struct Forward {
  TileSource source;
  Draws draws;
  int64_t outputs;
  int32_t groups;           // of Tile::kUnits outputs
  int32_t block_groups;     // that a block takes one after the other
  const uint32_t* columns;  // [fan_in][columns_stride], what draw_block has drawn; null: drawn here
  int64_t columns_stride;
  float factor;
  Matrix y;
  bool fours;  // takes_four(y)
};

// What the transposed product needs first: blocks that draw, then blocks that transpose x.
struct Prepare {
  Draws draws;
  int64_t rows, draw_blocks;
  uint32_t* bits;     // [cols][words], zeros
  int64_t words;      // of a column, a multiple of kListWords
  uint32_t* earlier;  // [fan_in][rows]: scratch for more than kHeld draws
  Matrix x;           // [M, rows]
  int64_t batch;
  float* across;   // [rows][stride]
  int64_t stride;  // M and zeros up to a multiple of 4
};

constexpr int kSquare = 32;  // rows and columns that a block transposes

struct Columns {
  const uint32_t* bits;
  int64_t words;
  const float* across;
  int64_t stride, batch, cols;
  float factor;
  Matrix y;
};

constexpr int kColumnWarps = 8, kColumnThreads = kColumnWarps * kLanes;
constexpr int kListWords = kLanes * kEach;  // that a warp turns into a list at once
constexpr int kSlab = kLanes * kEach;       // rows of the batch
constexpr int kSlabPitch = kSlab + 4;       // floats: columns of y are 4 banks apart
constexpr int kListBytes = kListWords * 32 * 2;
constexpr int kColumnBytes = kColumnWarps * (kListBytes + kSlabPitch * 4);

constexpr int64_t kSparseScratch = int64_t{64} << 20;
constexpr int64_t kSparseBlocks = 132;  // that a launch aims at, one for each of an H100's multiprocessors

inline Draws draws_of(const Sparse& call) {
  return {call.key,
          uint32_t(call.row_offset),
          uint32_t(call.population),
          uint32_t(call.fan_in),
          uint32_t(call.col_offset),
          uint32_t(call.cols)};
}

struct ForwardPlan {
  Forward forward;
  Drawing drawing;  // has columns to draw where stride is not 0
  int64_t blocks_x, blocks_y, shared_bytes, scratch_bytes;
};

// `in_block`: whether blocks draw for themselves; `aim`: blocks of a launch that is aimed at, tests take
// fewer.
template <class T>
ForwardPlan plan_of(const Sparse& call, bool in_block, int64_t aim = kSparseBlocks) {
  const int64_t groups = (call.rows + T::kUnits - 1) / T::kUnits;
  ForwardPlan plan{};
  plan.blocks_x = (call.batch + T::kRows - 1) / T::kRows;
  const int64_t wanted = std::max<int64_t>(1, aim / std::max<int64_t>(1, plan.blocks_x));
  Forward& p = plan.forward;
  p.source = {call.x, takes_four(call.x), call.batch, call.cols};
  p.draws = draws_of(call);
  p.outputs = call.rows;
  p.groups = int32_t(groups);
  p.block_groups = int32_t((groups + wanted - 1) / wanted);
  p.factor = call.factor;
  p.y = call.y;
  p.fours = takes_four(call.y);
  plan.blocks_y = (groups + p.block_groups - 1) / p.block_groups;
  plan.shared_bytes = T::bytes(call.cols);
  if (in_block) {
    plan.shared_bytes += call.fan_in * T::kUnits * 4;
  } else {
    p.columns_stride = groups * T::kUnits;
    plan.scratch_bytes = call.fan_in * p.columns_stride * 4;
    plan.drawing = {p.draws, call.rows, nullptr, p.columns_stride, nullptr};
  }
  return plan;
}

struct TransposedPlan {
  Prepare prepare;
  Columns columns;
  int64_t prepare_blocks, blocks_x, blocks_y;
  int64_t bits_bytes, across_bytes, earlier_bytes;
  int64_t scratch_bytes() const { return bits_bytes + across_bytes + earlier_bytes; }

  // Places of the parts of the scratch, each 16-byte aligned.
  void place(void* scratch) {
    auto* at = static_cast<unsigned char*>(scratch);
    columns.bits = prepare.bits = reinterpret_cast<uint32_t*>(at);
    columns.across = prepare.across = reinterpret_cast<float*>(at + bits_bytes);
    prepare.earlier = reinterpret_cast<uint32_t*>(at + bits_bytes + across_bytes);
  }
};

inline TransposedPlan transposed_plan_of(const Sparse& call) {
  const auto blocks = [](int64_t count, int64_t unit) { return (count + unit - 1) / unit; };
  TransposedPlan plan{};
  Prepare& p = plan.prepare;
  p.draws = draws_of(call);
  p.rows = call.rows;
  p.draw_blocks = blocks(call.rows, kDrawThreads);
  p.words = whole(blocks(call.rows, 32), kListWords);
  p.x = call.x;
  p.batch = call.batch;
  p.stride = whole(call.batch, kEach);
  Columns& c = plan.columns;
  c.words = p.words;
  c.stride = p.stride;
  c.batch = call.batch;
  c.cols = call.cols;
  c.factor = call.factor;
  c.y = call.y;
  plan.prepare_blocks = p.draw_blocks + blocks(call.rows, kSquare) * blocks(call.batch, kSquare);
  plan.blocks_x = blocks(call.batch, kSlab);
  plan.blocks_y = blocks(call.cols, kColumnWarps);
  plan.bits_bytes = call.cols * p.words * 4;
  plan.across_bytes = call.rows * p.stride * 4;
  plan.earlier_bytes = call.fan_in <= kHeld ? 0 : call.fan_in * call.rows * 4;
  return plan;
}

// Calls use.template operator()<Tile>(plan) with the plan that serves a call forward; `none` where none does.
// As many rows of x as fit, but no more than the batch has: the draws are made once for each block of them.
template <class Use, class None>
auto with_plan(const Sparse& call, int64_t shared_bytes, const Use& use, const None& none,
               int64_t aim = kSparseBlocks) {
  for (const bool in_block : {true, false}) {
    const auto fits = [&](const ForwardPlan& plan) {
      return plan.shared_bytes <= shared_bytes && plan.scratch_bytes <= kSparseScratch;
    };
    if (const auto plan = plan_of<Tile<32>>(call, in_block, aim); call.batch > 16 && fits(plan))
      return use.template operator()<Tile<32>>(plan);
    if (const auto plan = plan_of<Tile<16>>(call, in_block, aim); call.batch > 8 && fits(plan))
      return use.template operator()<Tile<16>>(plan);
    if (const auto plan = plan_of<Tile<8>>(call, in_block, aim); fits(plan))
      return use.template operator()<Tile<8>>(plan);
  }
  return none();
}

struct ScratchOf {
  template <class T>
  int64_t operator()(const ForwardPlan& plan) const {
    return plan.scratch_bytes;
  }
};

// sparse_scratch of sparse.h.
inline int64_t scratch_of(const Sparse& call, int64_t shared_bytes) {
  if (std::max({call.fan_in, call.transposed ? call.rows : 0, call.transposed ? call.cols : 0}) >
      kSparseScratch)
    return -1;  // before a product of sizes passes 2^63
  if (call.transposed) {
    const int64_t bytes = transposed_plan_of(call).scratch_bytes();
    return bytes <= kSparseScratch && kColumnBytes <= shared_bytes ? bytes : -1;
  }
  return with_plan(call, shared_bytes, ScratchOf{}, [] { return int64_t{-1}; });
}

}  // namespace nmkern::cuda
