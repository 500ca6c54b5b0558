// What each of the small-batch kernels is made for: a family and direction, rows of the batch, the dtype that
// is multiplied; and what that makes of registers, warps and shared memory. skinny.cu has their code.
#pragma once

#include <type_traits>

#include "decode.h"
#include "hash.h"
#include "pack_plan.h"

namespace nmkern::cuda {

constexpr int kLineBytes = 128;

struct Product : Operand {
  RoundKeys keys;
  uint32_t reduction_patch;  // first counter of the reduction
  uint32_t output_patch;     // first counter of the outputs
  int64_t steps;             // of the whole reduction
  int64_t split_steps;       // of a split, a multiple of Config::kUnroll
  float* partial;            // [splits, M, partial_stride]; index 0 is the first output of a patch
  int64_t partial_stride;
};

// k16 steps that tensor cores add up before the sum is added, rounded to nearest, to those of the steps
// before: where x is a float32. Tensor cores truncate (Fasi et al. 2021, doi:10.7717/peerj-cs.330), so each
// of a chain of T additions takes 0.7 * 2^-24 of the sum on average, and all of them T / 2 times that of the
// last: 2e-5 at K = 8192 in two parts, ten times what float32 may be off by; 5e-7 in chains of 8 steps.
// Narrower x is rounded a hundred times as much anyway, as in cuBLAS, which sums in one chain too.
constexpr int kChainDepths = 8;

// How many fields of a word a lane takes, and how many patches beside each other: what keeps the sums (2 *
// groups * outputs * tiles of the batch, and twice that in chains) within 128 registers, more patches where
// they share more.
template <Family family, bool transposed>
constexpr int fields_of(int batch_tiles, bool chains) {
  const int all = columns_per_word(family), most = (chains ? 32 : 64) / batch_tiles;
  return !transposed || all <= most ? all : most;
}

template <Family family, bool transposed>
constexpr int groups_of(int batch_tiles, bool chains) {
  const int outputs = transposed ? fields_of<family, transposed>(batch_tiles, chains) : kRowsPerPatch;
  const int fit = (chains ? 32 : 64) / (batch_tiles * outputs);
  const int wanted = family == Family::rademacher || (transposed && family == Family::uniform) ? 2 : 4;
  return fit < wanted ? (fit < 1 ? 1 : fit) : wanted;
}

constexpr int depth_warps(int wanted, int most) { return wanted < 1 ? 1 : wanted < most ? wanted : most; }

template <Family family, bool transposed, int batch_tiles, Dtype operand, int parts>
struct Config {
  static constexpr int kBatchTiles = batch_tiles;  // of 8 rows
  static constexpr Dtype kOperand = operand;       // what is multiplied
  static constexpr int kParts = parts;             // of an element of x
  static constexpr bool kChains = parts > 1;
  static constexpr bool kScaled = operand == Dtype::float16;  // whether rows may be: see pack.cu
  using Patch = PatchLayout<family, transposed, fields_of<family, transposed>(batch_tiles, kChains)>;
  static constexpr int kSlices = transposed ? Patch::kColumns / Patch::kFields : 1;
  static constexpr int kGroups = groups_of<family, transposed>(batch_tiles, kChains);

  // Warps that share outputs and take turns in the reduction. What a block writes and finish.h reads again
  // goes with its outputs: for 16 rows of 8192 x 8192 uniform, 8.4 MB each way where four warps have 512, and
  // a quarter of that where eight have 256, four of them the same. Few rows write less, and share x among
  // more.
  static constexpr bool kSmall = batch_tiles <= 2;
  static constexpr int kWarps = kSmall ? 8 : 4;
  static constexpr int kThreads = kWarps * kLanes;
  static constexpr int kWarpOutputs = kGroups * kQuads * Patch::kOutputs;
  static constexpr int kDepthWarps =
      kSmall ? depth_warps(kWarps * kWarpOutputs / (batch_tiles == 1 ? 512 : 256), kWarps) : 1;
  static constexpr int kOutputWarps = kWarps / kDepthWarps;
  static constexpr int kBlockPatches = kOutputWarps * kGroups * kQuads;
  static constexpr int kBlockOutputs = kBlockPatches * (transposed ? Patch::kColumns : kRowsPerPatch);

  // B's registers of a step, in pairs (a k16 step's two): pair (depth * batch_tiles + tile) * parts + part.
  // Two pairs make a load of 16 bytes where there are two.
  static constexpr int kPairs = Patch::kDepth * batch_tiles * parts;
  static constexpr int kVector = kPairs % 2 == 0 ? 2 : 1;
  static constexpr int kStepBytes = kPairs * 8 * kLanes;
  // With normal's table in shared memory, x takes the 128-byte lines between its entries.
  static constexpr bool kTable = family == Family::normal;
  static constexpr int kStageBytes = parts == 1 || kTable ? 32 << 10 : 48 << 10;

  // Runs of four outputs of a lane, of 8 rows: what warps of the same outputs add up, up to kRound at a time.
  static constexpr int kRuns = kGroups * (Patch::kOutputs / 4) * batch_tiles;
  static constexpr int kRound = kRuns < 8 ? kRuns : 8;
  static constexpr int kRunBytes = kWarps * kLanes * 32;
  static constexpr int kExchangeBytes = kDepthWarps > 1 ? kRound * kRunBytes : 0;
  static_assert(kRuns % kRound == 0 && kRound % kDepthWarps == 0);

  static constexpr int kFirstBytes = kTable ? kTableBytes : kStageBytes;
  static constexpr int kSharedBytes = kFirstBytes > kExchangeBytes ? kFirstBytes : kExchangeBytes;

  static constexpr int kStep = kQuadLanes * Patch::kReduction;  // reduction indices
  // Steps a turn of the loop: uniform transposed has few weights in a step, and takes 2.28 with one.
  static constexpr int kUnroll = transposed && family == Family::uniform ? 4 : 1;
  static constexpr int kStageSteps = kStageBytes / kStepBytes / kUnroll * kUnroll;
  static constexpr int kChainSteps = kChains ? kChainDepths / Patch::kDepth : kStageSteps;

  static_assert(kStageSteps > 0 && (!kTable || kStageBytes <= kTableBytes / 2));
  static_assert(kChainSteps % kUnroll == 0 && kStageSteps % kUnroll == 0);

  // Steps of a stage that a lane loads, of the same rows: kTileWarps warps take those of a step.
  static constexpr int kPieces = Patch::kReduction / 4;
  static constexpr int kTileWarps = batch_tiles < kWarps ? batch_tiles : kWarps;
  static constexpr int kStride = kWarps / kTileWarps;
  static constexpr int kStageLoads = (kStageSteps + kStride - 1) / kStride;
  // The x of the next stage is on its way while this one's is multiplied, where there are registers for it.
  static constexpr bool kAhead = kSmall && !kChains;
  static constexpr int kSome = 32 / (2 * kPieces * parts);  // 32 registers; with 64, sm_80 spills at 32 rows
  static constexpr int kLoads = kAhead || kStageLoads < kSome ? kStageLoads : kSome;

  // Where a pair of a lane lies in shared memory.
  NMKERN_HD static constexpr int x_line(int lane) {
    const int at = lane * 8 * kVector;
    return kTable ? at / kLineBytes * kEntryBytes + kLineBytes + at % kLineBytes : at;
  }
  NMKERN_HD static constexpr int x_offset(int step, int pair) {
    return (step * kPairs + pair) / kVector * (8 * kVector * kLanes) * (kTable ? 2 : 1) + pair % kVector * 8;
  }
};

}  // namespace nmkern::cuda
