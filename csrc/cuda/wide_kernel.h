// The product for large batches on Hopper: warpgroups generate W in the registers of wgmma's A, x is B.
//
//   sums[n, m] = sum over the k of a split: code[n, k] * (x[m, k] * in_gain[c, k])              (consume)
//   y[m, n] = (factor * sums[n, m]) * out_gain[c, n] + bias[c, n], or partial[s, m, n] = sums[n, m]
//   both of sums that SumScales has taken out of their unit
//
//   x -> (pack, where it is not multiplied as it is) -> produce -> shared memory, a ring of stages -> consume
//   -> y
//
// A block of three warpgroups takes tiles of 256 outputs x 8 * kBatchTiles rows, one after the other. Two
// warpgroups consume: each generates its own 128 outputs, as two m64 tiles, so that a lane uses all four
// words of a patch. While the tensor cores work on a group of two k16 steps, the warpgroup generates the
// next one into other registers; nothing of W leaves registers. The third warpgroup produces: each of its
// warps fills a stage of its own, with the x of a turn, in B's order.
//
// wgmma reads B in core matrices, 8 rows of the batch x 8 reduction indices: 128 bytes, which is register h
// of mma.sync's B as the 32 lanes of a warp hold it. So fragment.h says what lies where for both kernels, a
// warp writes a core matrix at once, and no bank is met twice. TMA and cp.async cannot fill it: neighbours in
// B are fields p and p + P / 2 of a word, two bytes each.
// x that is a float32 enters as two float16, whose sums are taken in chains, as skinny_kernel.h says; x of 16
// bits times in_gain as one: see pack_row. Invariant: as there, a sum's order follows from shapes: k16 steps
// upward, parts of an x from the largest down within two of them, chains and splits upward. Which block takes
// a tile changes nothing.
//
// Written over a Machine, as skinny_block is: wide.cu has it.
#pragma once

#include "skinny_kernel.h"

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
  static constexpr bool kScaled = operand == Dtype::float16;  // whether rows may be: see pack_row
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

// The tile that a block takes: which outputs, rows and turns. Outputs run fastest, so that blocks at work at
// the same time read the same rows of x.
struct WideTile {
  int64_t output_block, batch_block, split, first_turn;
  int turns;
};

NMKERN_DEVICE WideTile wide_tile(const WideProduct& p, int64_t index) {
  WideTile tile;
  tile.output_block = index % p.output_blocks;
  tile.batch_block = index / p.output_blocks % p.batch_blocks;
  tile.split = index / p.output_blocks / p.batch_blocks;
  tile.first_turn = tile.split * p.split_turns;
  const int64_t left = p.turns - tile.first_turn;
  tile.turns = int(left < p.split_turns ? left : p.split_turns);
  return tile;
}

// x of a turn into a stage, by one warp; lane 4 * g + t loads patches t of the rows g. `whole`: nothing of
// the tile lies outside of x.
template <class C, bool whole, class Machine>
NMKERN_DEVICE void produce_part(const Machine& machine, const uint16_t* x, int64_t row_stride, int64_t rows,
                                int64_t left, unsigned char* to) {
  using Patch = typename C::Patch;
  constexpr int kPieces = Patch::kReduction / 4;
  // Batch tiles whose loads are in flight at once: up to 64 registers.
  constexpr int kFit = 64 / (2 * kPieces * C::kTurnSteps),
                kAtOnce = kFit < C::kBatchTiles ? kFit : C::kBatchTiles;
  static_assert(C::kBatchTiles % kAtOnce == 0);
#pragma unroll 1
  for (int first = 0; first < C::kBatchTiles; first += kAtOnce) {
    uint32_t element[kAtOnce][C::kTurnSteps][kPieces][2] = {};  // two elements each
#pragma unroll
    for (int tile = 0; tile < kAtOnce; ++tile) {
#pragma unroll
      for (int step = 0; step < C::kTurnSteps; ++step)
        if (whole || (rows > 0 && step * C::kStep < left))
          machine.load_elements(x + step * C::kStep, element[tile][step]);
      x += 8 * row_stride;
      rows -= 8;
    }
#pragma unroll
    for (int tile = 0; tile < kAtOnce; ++tile)
#pragma unroll
      for (int step = 0; step < C::kTurnSteps; ++step) {
        const auto& patch = element[tile][step];
        const auto half = [&](int index) { return patch[index / 4][index / 2 % 2] >> (index % 2 * 16); };
#pragma unroll
        for (int depth = 0; depth < Patch::kDepth; ++depth)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            *reinterpret_cast<uint32_t*>(to + C::core(step * Patch::kDepth + depth, tile, h)) =
                low_halves(half(Patch::reduction(depth, h, 0)), half(Patch::reduction(depth, h, 1)));
      }
    to += C::core(0, kAtOnce, 0);
  }
}

template <class C, class Machine>
NMKERN_DEVICE void produce_turn(const WideProduct& p, const Machine& machine, const WideTile& tile, int turn,
                                unsigned char* stage) {
  const int lane = machine.lane();
  const int64_t m = tile.batch_block * (8 * C::kBatchTiles) + b_col(lane);
  const int64_t first = (tile.first_turn + turn) * C::kTurn;
  const int64_t k = first + place_of(lane) * C::Patch::kReduction;
  const bool whole =
      (tile.batch_block + 1) * (8 * C::kBatchTiles) <= p.batch && first + C::kTurn <= p.reduction;
  const uint16_t* x = p.x + m * p.x_row_stride + k;
  unsigned char* to = stage + lane * 4;
#pragma unroll 1
  for (int part = 0; part < C::kParts; ++part) {
    if (whole)
      produce_part<C, true>(machine, x, p.x_row_stride, 0, 0, to);
    else
      produce_part<C, false>(machine, x, p.x_row_stride, p.batch - m, p.reduction - k, to);
    x += p.x_part_stride;
    to += C::kPartBytes;
  }
}

// A warp that produces fills stage `warp` again and again: turns warp, warp + stages, ... of all its tiles.
template <class C, class Machine>
NMKERN_DEVICE void produce(const WideProduct& p, Machine& machine, int warp, unsigned char* shared) {
  if (warp >= C::kStages) return;
  unsigned char* stage = shared + C::kStagesOffset + warp * C::kStageBytes;
  int turn = warp;
  uint32_t parity = 1;
  for (int64_t index = machine.block_x(); index < p.tiles; index += machine.blocks()) {
    const WideTile tile = wide_tile(p, index);
    for (; turn < tile.turns; turn += C::kStages) {
      machine.wait_free(warp, parity);
      parity ^= 1;
      produce_turn<C>(p, machine, tile, turn, stage);
      machine.publish(warp);
    }
    turn -= tile.turns;
  }
}

// What a lane knows while it generates: the part of the hash that stays, and the words at hand.
template <class C>
struct Generator {
  using Patch = typename C::Patch;
  std::conditional_t<Patch::kTransposed, ColumnPart, RowPart> fixed;
  uint32_t patch;  // the next reduction patch of the lane
  int slice_bits;
  Words words;
};

using GroupA = uint32_t[2][2][4];  // k16 steps, m64 tiles, registers

template <class C, class Machine>
NMKERN_DEVICE void generate(const WideProduct& p, const Machine& machine, const unsigned char* shared,
                            Generator<C>& g, int group, GroupA& a) {
  using Patch = typename C::Patch;
  const uint32_t lane_bytes = uint32_t(machine.lane()) * 4;
  const auto lookup = [&](uint32_t word, int field) {
    return *reinterpret_cast<const uint32_t*>(shared + C::kTableOffset +
                                              table_offset(word, field, lane_bytes));
  };
#pragma unroll
  for (int i = 0; i < C::kGroupDepths; ++i) {
    const int depth = (group * C::kGroupDepths + i) % Patch::kDepth;
    if (depth == 0) {
      if constexpr (Patch::kTransposed)
        g.words = cuda::patch(row_part(g.patch, p.keys), g.fixed, p.keys);
      else
        g.words = cuda::patch(g.fixed, column_part(g.patch, p.keys), p.keys);
      g.patch += kQuadLanes;
      if constexpr (C::kSlices > 1)
#pragma unroll
        for (uint32_t& word : g.words.w) word >>= g.slice_bits;
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int reg = 0; reg < 4; ++reg)
        a[i][tile][reg] = a_register<Patch, C::kOperand>(g.words, tile, depth, reg, lookup);
  }
}

// The sums that wgmma adds to: those of a chain of its own, or all.
template <bool chains, class Own, class Sums>
NMKERN_DEVICE auto& chain_of(Own& own, Sums& sums) {
  if constexpr (chains)
    return own;
  else
    return sums;
}

// The four outputs of a lane from n on, for its rows of the batch, modulated.
template <class C, class Machine, class Sums>
NMKERN_DEVICE void write_outputs(const WideProduct& p, const Machine& machine, int64_t batch_first, int64_t n,
                                 const Sums& sums) {
  const Finish& f = p.finish;
  if (n < 0 || n >= f.outputs) return;
  // A product with 1 and a sum with -0 change no bit.
  float gain[4] = {1, 1, 1, 1}, bias[4] = {-0.0f, -0.0f, -0.0f, -0.0f};
  const auto load = [&](const Bank& bank, int64_t m, float (&value)[4]) {
    machine.load_four(bank.data + bank_row(bank, f.context, m) * f.outputs + n, value);
  };
  if (f.out_gain.rows == 1) load(f.out_gain, 0, gain);
  if (f.bias.rows == 1) load(f.bias, 0, bias);
  for_each_row<C>(p, machine, batch_first, [&](int tile, int e, int64_t m, float scale) {
    if (f.out_gain.rows > 1) load(f.out_gain, m, gain);
    if (f.bias.rows > 1) load(f.bias, m, bias);
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float z = Machine::rounded_product(sums[0][i / 2][tile][i % 2 * 2 + e] * scale, f.factor);
      y[i] = Machine::rounded_sum(Machine::rounded_product(z, gain[i]), bias[i]);
    }
    machine.store_outputs(f.y, m, n, y);
  });
}

template <class C, class Machine>
NMKERN_DEVICE void consume(const WideProduct& p, Machine& machine, int warpgroup, unsigned char* shared) {
  using Patch = typename C::Patch;
  const int lane = machine.lane(), warp = machine.thread() / kLanes % 4;
  int stage = 0;
  uint32_t parity = 0;
  for (int64_t index = machine.block_x(); index < p.tiles; index += machine.blocks()) {
    const WideTile tile = wide_tile(p, index);
    constexpr int kSliceBlocks = C::kSlices / C::kBlockSlices;
    const int slice =
        int(tile.output_block % kSliceBlocks) * C::kBlockSlices + (C::kBlockSlices > 1) * warpgroup;
    const int64_t patch = tile.output_block / kSliceBlocks * C::kBlockPatches +
                          (C::kBlockSlices > 1 ? 0 : warpgroup) * C::kWarpgroupPatches + warp * kQuads +
                          quad_of(lane);
    Generator<C> g;
    const uint32_t counter = p.output_patch + uint32_t(patch);
    if constexpr (Patch::kTransposed)
      g.fixed = column_part(counter, p.keys);
    else
      g.fixed = row_part(counter, p.keys);
    g.patch = p.reduction_patch + uint32_t(tile.first_turn * (C::kTurnSteps * kQuadLanes)) + place_of(lane);
    g.slice_bits = slice * (32 / Patch::kColumns) * Patch::kFields;

    float sums[1][2][C::kBatchTiles][4] = {};
    GroupA a[2];
    generate(p, machine, shared, g, 0, a[0]);
    for (int turn = 0; turn < tile.turns;) {
      // The whole reduction in one chain, summed where it is wanted; or chains that are added up.
      const int end = C::kChains && tile.turns - turn > C::kChainTurns ? turn + C::kChainTurns : tile.turns;
      float own[2][C::kChains ? C::kBatchTiles : 1][4];
      auto& chain = chain_of<C::kChains>(own, sums[0]);
      int before = -1;  // the stage of the turn before
#pragma unroll 1
      for (bool first = C::kChains; turn < end; ++turn, first = false) {
        machine.wait_filled(stage, parity);
        const uint32_t x = machine.operand(shared + C::kStagesOffset + stage * C::kStageBytes);
#pragma unroll
        for (int group = 0; group < C::kTurnGroups; ++group) {
          machine.begin_group();
#pragma unroll
          for (int part = 0; part < C::kParts; ++part)
#pragma unroll
            for (int i = 0; i < C::kGroupDepths; ++i)
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const bool fresh = group == 0 && part == 0 && i == 0 && first;
                const int at = part * C::kPartBytes + C::core(group * C::kGroupDepths + i, 0, 0);
                machine.template multiply<C::kOperand>(chain[half], a[group % 2][i][half], x + at / 16,
                                                       !fresh);
              }
          machine.end_group();
          // The group before has been multiplied: its registers, and after a turn its stage, are free.
          machine.template wait_groups<1>();
          if (group == 0 && before >= 0) machine.release(before);
          generate(p, machine, shared, g, (group + 1) % C::kTurnGroups, a[(group + 1) % 2]);
        }
        before = stage;
        if (++stage == C::kStages) stage = 0, parity ^= 1;
      }
      machine.template wait_groups<0>();
      machine.hold(chain);
      machine.release(before);
      if constexpr (C::kChains) add_sums<Machine>(sums[0], chain);
    }
    const int64_t batch_first = tile.batch_block * (8 * C::kBatchTiles);
    if (p.partial) {
      write_partial<C>(p, machine, batch_first, patch, slice, tile.split, sums);
    } else {
      const int64_t n = patch * C::kPatchOutputs + slice * Patch::kOutputs - p.finish.skip;
      write_outputs<C>(p, machine, batch_first, n, sums);
    }
  }
}

// One block, in the role of each of its warpgroups.
template <class C, class Machine>
NMKERN_DEVICE void wide_block(const WideProduct& p, Machine& machine, unsigned char* shared) {
  if constexpr (C::kTable) stage_table<C::kOperand, kWideThreads>(machine, shared + C::kTableOffset);
  machine.start(shared, C::kStages);
  machine.await_previous();
  const int warpgroup = machine.thread() / kWarpgroup;
  if (warpgroup == kConsumers) {
    machine.produces();
    produce<C>(p, machine, machine.thread() / kLanes % 4, shared);
  } else {
    machine.consumes();
    consume<C>(p, machine, warpgroup, shared);
  }
}

}  // namespace nmkern::cuda
