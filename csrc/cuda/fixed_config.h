// What each of the kernels for at most eight rows is made for: a family of one or four bits, a direction,
// tiles of eight columns of B; and what that makes of registers, warps and shared memory. fixed.cu has their
// code.
#pragma once

#include "bytes.h"
#include "hash.h"
#include "pack_plan.h"

namespace nmkern::cuda {

constexpr int64_t kFixedRows = 8;  // of a batch, at most

struct FixedProduct {
  Input x;
  RoundKeys keys;
  uint32_t reduction_patch;  // first counter of the reduction
  uint32_t output_patch;     // first counter of the outputs
  int64_t steps;             // of the whole reduction
  int64_t split_steps;       // of a split
  float* partial;            // [splits, M, partial_stride]; index 0 is the first output of a patch
  int64_t partial_stride;
};

template <Family family, bool transposed, int tiles>
struct FixedConfig {
  static_assert(family != Family::normal && tiles >= 1 && tiles <= 4);
  // B's columns are digits of eight bits, a row's kRows apart: digit * kRows + row. A tile holds four digits
  // of two rows, or two digits of four rows, or one of eight.
  static constexpr int kTiles = tiles;
  static constexpr int kDigits = tiles == 3 ? 3 : 4;
  static constexpr int kRows = tiles * kByteColumns / kDigits;
  static_assert(kRows == 2 || kRows == 4 || kRows == 8);
  static constexpr int kColumns = columns_per_word(family);
  static constexpr int kFields = family == Family::rademacher && transposed && tiles > 2 ? 16 : kColumns;
  using Patch = PatchLayout<family, transposed, kFields>;
  using Bytes = PatchBytes<family, transposed>;
  static constexpr int kSlices = transposed ? kColumns / kFields : 1;
  static constexpr int kPatchOutputs = transposed ? kColumns : kRowsPerPatch;  // of all slices

  // Patches of a lane beside each other: 48 to 128 registers of sums, as many as do not spill.
  static constexpr int kGroupSums = Patch::kTiles * Bytes::kSets * tiles * 4;
  static constexpr int kGroups = kGroupSums <= 24 ? 4 : kGroupSums <= 64 ? 2 : 1;
  static_assert(kGroups * kGroupSums <= 128);

  // Warps of a block own outputs of their own, or take turns in the reduction.
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * kLanes;
  static constexpr int kBlockOutputs = 512;
  static constexpr int kOutputWarps = kBlockOutputs / (kGroups * kQuads * Patch::kOutputs);
  static constexpr int kDepthWarps = kWarps / kOutputWarps;
  static_assert(kOutputWarps * kDepthWarps == kWarps);
  static constexpr int kBlockPatches = kOutputWarps * kGroups * kQuads;

  // B's registers of a lane in a step, and where vectors of them lie.
  static constexpr int kStep = kQuadLanes * Bytes::kSlots;  // reduction indices
  static constexpr int kVector = Bytes::kRegisters < 4 ? Bytes::kRegisters : 4;
  static constexpr int kVectorBytes = 4 * kVector * kLanes;
  static constexpr int kVectors = Bytes::kRegisters / kVector;
  static constexpr int kStepBytes = kVectors * tiles * kVectorBytes;
  NMKERN_HD static constexpr int x_offset(int step, int vector, int tile) {
    return step * kStepBytes + (vector * tiles + tile) * kVectorBytes;
  }

  static constexpr int kStageSteps = (tiles <= 2 ? 2048 : 1024) / kStep;
  // Times that a thread loads of a stage: a lane's slots of a step.
  static constexpr int kLoads = (kStageSteps * kQuadLanes * kRows + kThreads - 1) / kThreads;
  // Steps that a sum of bytes (255 at most) times digits (128) has room for.
  static constexpr int64_t kSumSteps = (int64_t{1} << 16) / kStep;

  // Runs of four outputs of a row, a lane's: of its sums, and once lanes have what others have of the same
  // rows.
  static constexpr int kRuns = kGroups * (Patch::kOutputs / 4) * 2;
  static constexpr int kSharing = 8 / kRows;  // lanes of a quad that have digits of the same rows
  static constexpr int kOwnRuns = kRuns / kSharing;
  static_assert(kOwnRuns % kDepthWarps == 0);
  static constexpr int kRunBytes = 4 * 8 * kThreads;

  // Shared memory: x of a stage, and then what warps exchange; what is known of rows.
  static constexpr int kXBytes = kStageSteps * kStepBytes;
  static constexpr int kExchangeBytes = kDepthWarps > 1 ? kOwnRuns * kRunBytes : 0;
  static constexpr int kRowsOffset = kXBytes > kExchangeBytes ? kXBytes : kExchangeBytes;
  static constexpr int kSharedBytes = kRowsOffset + 3 * int(kFixedRows) * 4;
  static_assert(kSharedBytes <= 99 << 10);  // of a block of sm_89
};

}  // namespace nmkern::cuda
