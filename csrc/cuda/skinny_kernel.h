// The product for small batches: one warp generates 16-row tiles of W in A's registers, x is B.
//
//   partial[s, m, n] = sum over the k of split s: x[m, k] * code[n, k], with the x of pack.h
//
//   x -> stage_x -> shared memory, in the order of B's registers -> multiply -> partial -> finish.h -> y
//
// All warps of a block read the same x and own outputs of their own; a step of the loop is a patch for
// each of a quad's four lanes, so 4 * Patch::kReduction reduction indices. Nothing of W leaves registers.
// Instructions per weight and thread of the loop, 16 rows, sm_90a: rademacher 1.46 (transposed 1.48),
// uniform 2.13 (2.21), normal 4.19 (4.14); of uniform's 2.13, the hash takes 0.67, decoding 1.13, mma.sync
// 0.25, loads of x and the loop itself the rest. The integer unit takes two clocks for each of its own, 1.02
// (1.14) of them: 2.05 (2.27) clocks. benchmarks/results/cuda_resources.json has all of them.
// Invariant: a sum is taken in an order that shapes fix (steps upward, then splits upward).
//
// The block is written over a Machine (who am I, wait, multiply, load, store): skinny.cu has the device's,
// tests/native/skinny_block.cpp one that runs the very same code on a host.
#pragma once

#include <type_traits>

#include "finish.h"
#include "pack.h"

namespace nmkern::cuda {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kLanes;
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

template <Family family, bool transposed, int batch_tiles, Dtype operand, int parts>
struct Config {
  static constexpr int kBatchTiles = batch_tiles;  // of 8 rows
  static constexpr Dtype kOperand = operand;       // what is multiplied
  static constexpr int kParts = parts;             // of an element of x
  static constexpr bool kChains = parts > 1;
  static constexpr bool kScaled = operand == Dtype::float16;  // whether rows may be: see pack_row
  using Patch = PatchLayout<family, transposed, fields_of<family, transposed>(batch_tiles, kChains)>;
  static constexpr int kSlices = transposed ? Patch::kColumns / Patch::kFields : 1;
  static constexpr int kGroups = groups_of<family, transposed>(batch_tiles, kChains);
  static constexpr int kBlockPatches = kWarps * kGroups * kQuads;
  static constexpr int kBlockOutputs = kBlockPatches * (transposed ? Patch::kColumns : kRowsPerPatch);

  // B's registers of a step, in pairs (a k16 step's two): pair (depth * batch_tiles + tile) * parts + part.
  // Two pairs make a load of 16 bytes where there are two.
  static constexpr int kPairs = Patch::kDepth * batch_tiles * parts;
  static constexpr int kVector = kPairs % 2 == 0 ? 2 : 1;
  static constexpr int kStepBytes = kPairs * 8 * kLanes;
  // With normal's table in shared memory, x takes the 128-byte lines between its entries.
  static constexpr bool kTable = family == Family::normal;
  static constexpr int kStageBytes = parts == 1 || kTable ? 32 << 10 : 48 << 10;
  static constexpr int kSharedBytes = kTable ? kTableBytes : kStageBytes;

  static constexpr int kStep = kQuadLanes * Patch::kReduction;  // reduction indices
  // Steps a turn of the loop: uniform transposed has few weights in a step, and takes 2.28 with one.
  static constexpr int kUnroll = transposed && family == Family::uniform ? 4 : 1;
  static constexpr int kStageSteps = kStageBytes / kStepBytes / kUnroll * kUnroll;
  static constexpr int kChainSteps = kChains ? kChainDepths / Patch::kDepth : kStageSteps;

  static_assert(kStageSteps > 0 && (!kTable || kStageBytes <= kTableBytes / 2));
  static_assert(kChainSteps % kUnroll == 0 && kStageSteps % kUnroll == 0);

  // Where a pair of a lane lies in shared memory.
  NMKERN_HD static constexpr int x_line(int lane) {
    const int at = lane * 8 * kVector;
    return kTable ? at / kLineBytes * kEntryBytes + kLineBytes + at % kLineBytes : at;
  }
  NMKERN_HD static constexpr int x_offset(int step, int pair) {
    return (step * kPairs + pair) / kVector * (8 * kVector * kLanes) * (kTable ? 2 : 1) + pair % kVector * 8;
  }
};

// Steps [first, first + steps) of x into shared memory, as every lane's B registers: a patch of a row is
// loaded at once and permuted in registers. A lane keeps its rows and walks along them, so that addresses are
// sums: 17 instructions a patch (uniform, forward), 3 % of the loop's at 16 rows; with indices divided anew
// for each it was 70.
template <class C, class Machine>
NMKERN_DEVICE void stage_x(const Product& p, const Machine& machine, int64_t batch_first, int64_t first,
                           int steps, unsigned char* shared) {
  using Patch = typename C::Patch;
  constexpr int kPieces = Patch::kReduction / 4;
  constexpr int kTileWarps = C::kBatchTiles < kWarps ? C::kBatchTiles : kWarps;
  constexpr int kStride = kWarps / kTileWarps;  // steps that the block stages at once
  // Turns that load at once; a patch of rademacher is four loads as it is.
  [[maybe_unused]] constexpr int kTurns = kPieces > 2 ? 1 : 4;
  const int warp = machine.thread() / kLanes, lane = machine.lane();
#pragma unroll
  for (int tile = warp % kTileWarps; tile < C::kBatchTiles; tile += kTileWarps) {
    const int64_t m = batch_first + 8 * tile + b_col(lane);
    const int64_t k = ((first + warp / kTileWarps) * kQuadLanes + place_of(lane)) * Patch::kReduction;
    const uint16_t* x = p.x + m * p.x_row_stride + k;
    const int64_t left = m < p.batch && k < p.reduction ? p.reduction - k : 0;
    const int64_t whole = (left + C::kStep - 1) / C::kStep;
    const int end = warp / kTileWarps + int(whole < steps ? whole : steps);  // the steps that x has
    unsigned char* to = shared + C::x_line(lane) + C::x_offset(warp / kTileWarps, 0);
#pragma unroll kTurns
    for (int step = warp / kTileWarps; step < steps; step += kStride) {
#pragma unroll
      for (int part = 0; part < C::kParts; ++part) {
        uint32_t element[kPieces][2] = {};  // two elements each
        if (step < end) machine.load_elements(x + part * p.x_part_stride, element);
        const auto half = [&](int index) { return element[index / 4][index / 2 % 2] >> (index % 2 * 16); };
#pragma unroll
        for (int depth = 0; depth < Patch::kDepth; ++depth) {
          const int at = (depth * C::kBatchTiles + tile) * C::kParts + part;
          auto* pair = reinterpret_cast<uint32_t*>(to + C::x_offset(0, at));
#pragma unroll
          for (int h = 0; h < 2; ++h)
            pair[h] = low_halves(half(Patch::reduction(depth, h, 0)), half(Patch::reduction(depth, h, 1)));
        }
      }
      x += kStride * C::kStep;
      to += C::x_offset(kStride, 0);
    }
  }
}

// A thread loads an entry and stores its 32 copies, four at a time; neighbours begin at different ones, so
// that no bank is met twice. (A copy at a time, every load waited for the device's memory: 16 times in turn.)
template <Dtype kOperand, int threads, class Machine>
NMKERN_DEVICE void stage_table(const Machine& machine, unsigned char* shared) {
  struct alignas(16) Copies {
    uint32_t code[4];
  };
  constexpr int kStores = kLanes / 4;
  for (int u = machine.thread(); u < 256; u += threads) {
    const uint32_t code = machine.table().template code<kOperand>(u);
#pragma unroll
    for (int i = 0; i < kStores; ++i)
      *reinterpret_cast<Copies*>(shared + u * kEntryBytes + (i + u) % kStores * 16) = {code, code, code, code};
  }
}

// The loop that the time goes into: hash a patch, decode, multiply by the batch, from step `first` of the
// stage on; nothing else.
template <class C, class Machine, class Fixed, class Sums>
NMKERN_DEVICE void multiply(const Product& p, Machine& machine, const unsigned char* shared, uint32_t patch,
                            int first, int steps, const Fixed& fixed, int slice_bits, Sums& sums) {
  using Patch = typename C::Patch;
  const uint32_t lane_bytes = uint32_t(machine.lane()) * 4;
  const auto lookup = [&](uint32_t word, int field) {
    return *reinterpret_cast<const uint32_t*>(shared + table_offset(word, field, lane_bytes));
  };
  const unsigned char* x = shared + C::x_line(machine.lane()) + C::x_offset(first, 0);
  patch += uint32_t(first) * kQuadLanes;
#pragma unroll 1
  for (; steps > 0; steps -= C::kUnroll) {
#pragma unroll
    for (int turn = 0; turn < C::kUnroll; ++turn) {
      Words words[C::kGroups];
      if constexpr (Patch::kTransposed) {
        const RowPart row = row_part(patch, p.keys);
#pragma unroll
        for (int group = 0; group < C::kGroups; ++group) {
          words[group] = cuda::patch(row, fixed[group], p.keys);
          if constexpr (C::kSlices > 1)
#pragma unroll
            for (uint32_t& word : words[group].w) word >>= slice_bits;
        }
      } else {
        const ColumnPart column = column_part(patch, p.keys);
#pragma unroll
        for (int group = 0; group < C::kGroups; ++group)
          words[group] = cuda::patch(fixed[group], column, p.keys);
      }
#pragma unroll
      for (int depth = 0; depth < Patch::kDepth; ++depth) {
        constexpr int kHere = C::kBatchTiles * C::kParts;
        uint32_t b[kHere][2];
        machine.template load<C>(x, depth * kHere, b);
#pragma unroll
        for (int group = 0; group < C::kGroups; ++group)
#pragma unroll
          for (int tile = 0; tile < Patch::kTiles; ++tile) {
            uint32_t a[4];
#pragma unroll
            for (int reg = 0; reg < 4; ++reg)
              a[reg] = a_register<Patch, C::kOperand>(words[group], tile, depth, reg, lookup);
#pragma unroll
            for (int at = 0; at < kHere; ++at)
              machine.template multiply<C::kOperand>(sums[group][tile][at / C::kParts], a, b[at]);
          }
      }
      patch += kQuadLanes;
      x += C::x_offset(1, 0);
    }
  }
}

template <class Machine>
NMKERN_DEVICE void add_sums(float& to, float from) {
  to = Machine::rounded_sum(to, from);
}

template <class Machine, class Sums, int count>
NMKERN_DEVICE void add_sums(Sums (&to)[count], const Sums (&from)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) add_sums<Machine>(to[i], from[i]);
}

// What the sums of a lane's rows of kTiles batch tiles, from `first` on, are multiplied by: powers of two, for
// they come in units of the codes, and of the row where it is scaled. Loaded at once, for no load can pass a
// store; of more tiles, the kernels for large batches spill.
template <class C>
struct SumScales {
  static constexpr int kTiles = C::kBatchTiles < 2 ? C::kBatchTiles : 2;
  float scale[kTiles][2];

  template <class Call, class Machine>
  NMKERN_DEVICE SumScales(const Call& p, const Machine& machine, int64_t batch_first, int first) {
    constexpr float kScale = 1 / unit<C::Patch::kFamily, C::kOperand>();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        scale[tile][e] = kScale;
        if constexpr (C::kScaled) {
          const int64_t m = batch_first + 8 * (first + tile) + c_col(machine.lane(), e);
          if (p.row_scale && m < p.batch) scale[tile][e] = p.row_scale[m] * kScale;
        }
      }
  }
};

// use(tile, e, m, scale) for the rows m of a lane's sums [tile][e], with what those are multiplied by.
template <class C, class Call, class Machine, class Use>
NMKERN_DEVICE void for_each_row(const Call& p, const Machine& machine, int64_t batch_first, const Use& use) {
  using Scales = SumScales<C>;
#pragma unroll
  for (int first = 0; first < C::kBatchTiles; first += Scales::kTiles) {
    const Scales scales(p, machine, batch_first, first);
#pragma unroll
    for (int tile = 0; tile < Scales::kTiles; ++tile)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t m = batch_first + 8 * (first + tile) + c_col(machine.lane(), e);
        if (m < p.batch) use(first + tile, e, m, scales.scale[tile][e]);
      }
  }
}

// The sums of a lane: runs of consecutive outputs, four of them a store.
template <class C, class Call, class Machine, class Sums>
NMKERN_DEVICE void write_partial(const Call& p, const Machine& machine, int64_t batch_first,
                                 int64_t first_patch, int slice, int64_t split_index, const Sums& sums) {
  using Patch = typename C::Patch;
  constexpr int kPatchOutputs = Patch::kTransposed ? Patch::kColumns : kRowsPerPatch;
  for_each_row<C>(p, machine, batch_first, [&](int tile, int e, int64_t m, float scale) {
#pragma unroll
    for (int group = 0; group < C::kGroups; ++group) {
      const int64_t n = (first_patch + group * kQuads) * kPatchOutputs + slice * Patch::kFields;
      float* to = p.partial + (split_index * p.batch + m) * p.partial_stride + n;
#pragma unroll
      for (int output = 0; output < Patch::kOutputs; output += 4) {
        // Patch::output(tile, half) = 2 * tile + half; half is bit 1 of a C register's number.
        const auto& first = sums[group][output / 2][tile];
        const auto& second = sums[group][output / 2 + 1][tile];
        machine.store(to + output, first[e] * scale, first[2 + e] * scale, second[e] * scale,
                      second[2 + e] * scale);
      }
    }
  });
}

template <class C, class Machine>
NMKERN_DEVICE void skinny_block(const Product& p, Machine& machine, unsigned char* shared) {
  using Patch = typename C::Patch;
  const int slice = int(machine.block_x() % C::kSlices);
  const int64_t first_patch = machine.block_x() / C::kSlices * int64_t{C::kBlockPatches} +
                              machine.thread() / kLanes * C::kGroups * kQuads + quad_of(machine.lane());
  const int64_t batch_first = int64_t{machine.block_z()} * 8 * C::kBatchTiles;
  const int64_t split_first = int64_t{machine.block_y()} * p.split_steps;
  const int64_t left = p.steps - split_first;
  const int64_t split_end = split_first + (left < p.split_steps ? left : p.split_steps);

  using Fixed = std::conditional_t<Patch::kTransposed, ColumnPart, RowPart>;
  Fixed fixed[C::kGroups];
#pragma unroll
  for (int group = 0; group < C::kGroups; ++group) {
    const uint32_t counter = p.output_patch + uint32_t(first_patch) + uint32_t(group * kQuads);
    if constexpr (Patch::kTransposed)
      fixed[group] = column_part(counter, p.keys);
    else
      fixed[group] = row_part(counter, p.keys);
    machine.keep(fixed[group]);
  }
  float sums[C::kGroups][Patch::kTiles][C::kBatchTiles][4] = {};
  if constexpr (C::kTable) stage_table<C::kOperand, kThreads>(machine, shared);
  machine.await_previous();
  for (int64_t first = split_first; first < split_end; first += C::kStageSteps) {
    const int steps = int(split_end - first < C::kStageSteps ? split_end - first : C::kStageSteps);
    machine.wait();
    // What is left over of the last step is multiplied by zeros.
    const int whole_steps = (steps + C::kUnroll - 1) / C::kUnroll * C::kUnroll;
    stage_x<C>(p, machine, batch_first, first, whole_steps, shared);
    machine.wait();
    const uint32_t patch =
        p.reduction_patch + uint32_t(first) * kQuadLanes + uint32_t(place_of(machine.lane()));
    const int slice_bits = slice * (32 / Patch::kColumns) * Patch::kFields;
    if constexpr (C::kChains) {
#pragma unroll 1
      for (int step = 0; step < whole_steps; step += C::kChainSteps) {
        const int left = whole_steps - step;
        float chain[C::kGroups][Patch::kTiles][C::kBatchTiles][4] = {};
        multiply<C>(p, machine, shared, patch, step, left < C::kChainSteps ? left : C::kChainSteps, fixed,
                    slice_bits, chain);
        add_sums<Machine>(sums, chain);
      }
    } else {
      multiply<C>(p, machine, shared, patch, 0, whole_steps, fixed, slice_bits, sums);
    }
  }
  write_partial<C>(p, machine, batch_first, first_patch, slice, machine.block_y(), sums);
}

}  // namespace nmkern::cuda
