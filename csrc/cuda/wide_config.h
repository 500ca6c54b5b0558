// What each of the large-batch kernels is made for, as skinny_config.h has it of small batches; wide.cu has
// their code.
#pragma once

#include "finish.h"
#include "skinny_config.h"

namespace nmkern::cuda {

constexpr int kWarpgroup = 4 * kLanes;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kWideThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kMostStages = 4;  // each warp that produces fills one
constexpr int kCoreBytes = 128;

struct WideProduct : Operand {
  RoundKeys keys;
  uint32_t reduction_patch;  // first counter of the reduction
  uint32_t output_patch;     // first counter of the outputs
  int64_t turns;             // of the whole reduction
  int64_t split_turns;       // of a split
  int64_t output_blocks, batch_blocks, tiles;
  float* partial;  // [splits, M, partial_stride], or null: the sums become y, if in_fours says so
  int64_t partial_stride;
  Finish finish;
};

template <Family family, bool transposed, int batch_tiles, Dtype operand, int parts>
struct WideConfig {
  static constexpr int kBatchTiles = batch_tiles;  // of 8 rows
  static constexpr Dtype kOperand = operand;       // what is multiplied
  static constexpr int kParts = parts;             // of an element of x
  static constexpr bool kChains = parts > 1;
  static constexpr bool kScaled = operand == Dtype::float16;  // whether rows may be: see pack.cu
  static_assert(!kChains || (kScaled && batch_tiles <= 8), "registers of two sets of sums");
  static constexpr int kGroups = 1;  // patches of a lane beside each other
  static constexpr int kColumns = columns_per_word(family);
  // Four outputs a lane either way: two m64 tiles are what the registers have room for.
  using Patch = PatchLayout<family, transposed, transposed ? 4 : kColumns>;
  static_assert(Patch::kOutputs == 4);
  static constexpr int kSlices = transposed ? kColumns / 4 : 1;
  static constexpr bool kTable = family == Family::normal;

  // The two warpgroups take two slices of the same patches where there are some, else patches of their own.
  static constexpr int kBlockSlices = kSlices > 1 ? kConsumers : 1;
  static constexpr int kWarpgroupPatches = kWarpgroup / kQuadLanes;
  static constexpr int kBlockPatches = kWarpgroupPatches * (kBlockSlices > 1 ? 1 : kConsumers);
  static constexpr int kPatchOutputs = transposed ? kColumns : kRowsPerPatch;
  static constexpr int kBlockOutputs = kBlockPatches * kPatchOutputs;  // of all its slices

  // A turn of the loop fills the ring by a stage: 64 reduction indices, or a step of four patches.
  static constexpr int kStep = kQuadLanes * Patch::kReduction;
  static constexpr int kTurn = kStep > 64 ? kStep : 64;
  static constexpr int kTurnSteps = kTurn / kStep;
  static constexpr int kDepths = kTurn / 16;  // k16 steps
  static constexpr int kGroupDepths = 2;      // of them are one group of wgmma
  static constexpr int kTurnGroups = kDepths / kGroupDepths;
  static_assert(kTurnGroups % 2 == 0, "two sets of A's registers take turns");
  static constexpr int kChainTurns = kChainDepths / kDepths;

  // Where register h of B lies, of a k16 step and 8 rows.
  NMKERN_HD static constexpr int core(int depth, int tile, int h) {
    return ((depth * kBatchTiles + tile) * 2 + h) * kCoreBytes;
  }
  static constexpr int kPartBytes = kDepths * kBatchTiles * 2 * kCoreBytes;

  // Shared memory: barriers, normal's table, stages.
  static constexpr int kTableOffset = kCoreBytes;
  static_assert(2 * kMostStages * 8 <= kTableOffset);
  static constexpr int kStagesOffset = kTableOffset + (kTable ? kTableBytes : 0);
  static constexpr int kStageBytes = parts * kPartBytes;
  static constexpr int kMostBytes = 227 << 10;  // of a block, on Hopper
  static constexpr int kFit = (kMostBytes - kStagesOffset) / kStageBytes;
  static constexpr int kStages = kFit < kMostStages ? kFit : kMostStages;
  static constexpr int kSharedBytes = kStagesOffset + kStages * kStageBytes;
  static_assert(kStages >= 2);
};

}  // namespace nmkern::cuda
