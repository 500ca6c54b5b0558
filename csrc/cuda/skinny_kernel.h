// The product for small batches: one warp generates 16-row tiles of W in A's registers, x is B.
//
//   partial[s, m, n] = sum over the k of split s: x[m, k] * code[n, k], with the x of pack.h
//
//   x -> stage_x -> shared memory, in the order of B's registers -> multiply -> partial -> finish.h -> y
//
// All warps of a block read the same x. They own outputs of their own, or take turns in the reduction and add
// up their sums at the end; a step of the loop is a patch for each of a quad's four lanes, so 4 *
// Patch::kReduction reduction indices. Nothing of W leaves registers.
// Instructions per weight and thread of the loop, 16 rows, sm_90a: rademacher 1.46 (transposed 1.48),
// uniform 2.13 (2.21), normal 4.19 (4.14); of uniform's 2.13, the hash takes 0.67, decoding 1.13, mma.sync
// 0.25, loads of x and the loop itself the rest. The integer unit takes two clocks for each of its own, 1.02
// (1.14) of them: 2.05 (2.27) clocks. benchmarks/results/cuda_resources.json has all of them.
// Invariant: a sum is taken in an order that shapes fix (steps upward, then a block's warps, then splits).
//
// The block is written over a Machine (who am I, wait, multiply, load, store): skinny.cu has it.
#pragma once

#include <type_traits>

#include "finish.h"
#include "pack.h"

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
  static constexpr bool kScaled = operand == Dtype::float16;  // whether rows may be: see pack_row
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

// Steps [first, first + steps) of x on their way into shared memory, as every lane's B registers: a patch of
// a row is loaded at once and permuted in registers. A lane keeps its rows and walks along them, kLoads loads
// at a time, so that addresses are sums: 17 instructions a patch (uniform, forward); with indices divided
// anew for each it was 70.
template <class C>
struct Staged {
  using Patch = typename C::Patch;
  uint32_t element[C::kLoads][C::kParts][C::kPieces][2];  // two elements each

  // Loads `at` and on of the lane's rows of a batch tile.
  template <class Machine>
  NMKERN_DEVICE void load(const Product& p, const Machine& machine, int64_t batch_first, int64_t first,
                          int steps, int tile, int at) {
    const int lane = machine.lane(), begin = first_step(machine) + at * C::kStride;
    const int64_t m = batch_first + 8 * tile + b_col(lane);
    const int64_t k = ((first + begin) * kQuadLanes + place_of(lane)) * Patch::kReduction;
    const uint16_t* x = p.x + m * p.x_row_stride + k;
    const int64_t left = m < p.batch && k < p.reduction ? p.reduction - k : 0;
    const int64_t whole = (left + C::kStep - 1) / C::kStep;
    const int end = int(whole < steps - begin ? whole : steps - begin);  // of the steps that x has
#pragma unroll
    for (int i = 0; i < C::kLoads; ++i)
#pragma unroll
      for (int part = 0; part < C::kParts; ++part) {
#pragma unroll
        for (auto& piece : element[i][part]) piece[0] = piece[1] = 0;
        if (i * C::kStride < end)
          machine.load_elements(x + part * p.x_part_stride + i * C::kStride * C::kStep, element[i][part]);
      }
  }

  template <class Machine>
  NMKERN_DEVICE void store(const Machine& machine, int steps, int tile, int at, unsigned char* shared) const {
    const int begin = first_step(machine) + at * C::kStride;
    unsigned char* to = shared + C::x_line(machine.lane()) + C::x_offset(begin, 0);
#pragma unroll
    for (int i = 0; i < C::kLoads; ++i) {
      if (begin + i * C::kStride >= steps) continue;
#pragma unroll
      for (int part = 0; part < C::kParts; ++part) {
        const auto half = [&](int index) {
          return element[i][part][index / 4][index / 2 % 2] >> (index % 2 * 16);
        };
#pragma unroll
        for (int depth = 0; depth < Patch::kDepth; ++depth) {
          const int pair_at = (depth * C::kBatchTiles + tile) * C::kParts + part;
          auto* pair = reinterpret_cast<uint32_t*>(to + C::x_offset(i * C::kStride, pair_at));
#pragma unroll
          for (int h = 0; h < 2; ++h)
            pair[h] = low_halves(half(Patch::reduction(depth, h, 0)), half(Patch::reduction(depth, h, 1)));
        }
      }
    }
  }

 private:
  template <class Machine>
  NMKERN_DEVICE static int first_step(const Machine& machine) {
    return machine.thread() / kLanes / C::kTileWarps;
  }
};

// All of a stage at once, where it is not loaded ahead. Not a loop: after one, nvcc no longer knew the base
// of shared memory as a constant, and a lookup in normal's table took an addition more, 5.5 instructions a
// weight for 4.5.
template <class C, class Machine>
NMKERN_DEVICE void stage_x(const Product& p, const Machine& machine, int64_t batch_first, int64_t first,
                           int steps, unsigned char* shared) {
#pragma unroll
  for (int first_tile = 0; first_tile < C::kBatchTiles; first_tile += C::kTileWarps) {
    const int tile = first_tile + machine.thread() / kLanes % C::kTileWarps;
#pragma unroll
    for (int at = 0; at < C::kStageLoads; at += C::kLoads) {
      Staged<C> staged;
      staged.load(p, machine, batch_first, first, steps, tile, at);
      staged.store(machine, steps, tile, at, shared);
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

// What the sums of row m are multiplied by, a power of two: they come in units of the codes, and of the row
// where it is scaled.
template <class C, class Call>
NMKERN_DEVICE float sum_scale(const Call& p, int64_t m) {
  constexpr float kScale = 1 / unit<C::Patch::kFamily, C::kOperand>();
  if constexpr (C::kScaled)
    if (p.row_scale && m < p.batch) return p.row_scale[m] * kScale;
  return kScale;
}

// That of a lane's rows of kTiles batch tiles, from `first` on. Loaded at once, for no load can pass a store;
// of more tiles, the kernels for large batches spill.
template <class C>
struct SumScales {
  static constexpr int kTiles = C::kBatchTiles == 1 || C::kTable ? 1 : 2;
  float scale[kTiles][2];

  template <class Call, class Machine>
  NMKERN_DEVICE SumScales(const Call& p, const Machine& machine, int64_t batch_first, int first) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        scale[tile][e] = sum_scale<C>(p, batch_first + 8 * (first + tile) + c_col(machine.lane(), e));
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

// Where the outputs of a lane begin in the partial sums.
template <class C, class Call>
NMKERN_DEVICE float* partial_of(const Call& p, int64_t m, int64_t first_patch, int group, int slice,
                                int64_t split_index) {
  constexpr int kPatchOutputs = C::Patch::kTransposed ? C::Patch::kColumns : kRowsPerPatch;
  const int64_t n = (first_patch + group * kQuads) * kPatchOutputs + slice * C::Patch::kFields;
  return p.partial + (split_index * p.batch + m) * p.partial_stride + n;
}

// The sums of a lane: runs of consecutive outputs, four of them a store.
template <class C, class Call, class Machine, class Sums>
NMKERN_DEVICE void write_partial(const Call& p, const Machine& machine, int64_t batch_first,
                                 int64_t first_patch, int slice, int64_t split_index, const Sums& sums) {
  for_each_row<C>(p, machine, batch_first, [&](int tile, int e, int64_t m, float scale) {
#pragma unroll
    for (int group = 0; group < C::kGroups; ++group) {
      float* to = partial_of<C>(p, m, first_patch, group, slice, split_index);
#pragma unroll
      for (int output = 0; output < C::Patch::kOutputs; output += 4) {
        // Patch::output(tile, half) = 2 * tile + half; half is bit 1 of a C register's number.
        const auto& first = sums[group][output / 2][tile];
        const auto& second = sums[group][output / 2 + 1][tile];
        machine.store(to + output, first[e] * scale, first[2 + e] * scale, second[e] * scale,
                      second[2 + e] * scale);
      }
    }
  });
}

// The sums of warps that share outputs, added upward through `shared` and written: each of them takes every
// kDepthWarps-th run.
template <class C, class Machine, class Sums>
NMKERN_DEVICE void write_shared(const Product& p, Machine& machine, int64_t batch_first, int64_t first_patch,
                                int slice, int depth, unsigned char* shared, const Sums& sums) {
  constexpr int kTileRuns = C::Patch::kOutputs / 4 * C::kBatchTiles;  // of a group
  struct alignas(16) Half {                                           // of a run: floats of one m16 tile
    float v[4];
  };
  const int output_warp = machine.thread() / kLanes % C::kOutputWarps;
  const auto slot = [&](int run, int from, int half) {
    const int warp = from * C::kOutputWarps + output_warp;
    return reinterpret_cast<Half*>(shared) + ((run * C::kWarps + warp) * 2 + half) * kLanes + machine.lane();
  };
  static_assert(C::kDepthWarps % C::kBatchTiles == 0, "the runs of a warp are of the same rows");
  const int64_t m = batch_first + depth % C::kBatchTiles * 8 + c_col(machine.lane(), 0);
  const float scale[2] = {sum_scale<C>(p, m), sum_scale<C>(p, m + 1)};
#pragma unroll
  for (int round = 0; round < C::kRuns; round += C::kRound) {
    machine.wait();  // what lies there has been read
#pragma unroll
    for (int i = 0; i < C::kRound; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int rest = (round + i) % kTileRuns;
        const auto& own =
            sums[(round + i) / kTileRuns][rest / C::kBatchTiles * 2 + half][rest % C::kBatchTiles];
        *slot(i, depth, half) = {{own[0], own[1], own[2], own[3]}};
      }
    machine.wait();
#pragma unroll 1
    for (int i = depth; i < C::kRound; i += C::kDepthWarps) {
      Half sum[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[half] = *slot(i, 0, half);
#pragma unroll
        for (int from = 1; from < C::kDepthWarps; ++from) {
          const Half share = *slot(i, from, half);
#pragma unroll
          for (int reg = 0; reg < 4; ++reg)
            sum[half].v[reg] = Machine::rounded_sum(sum[half].v[reg], share.v[reg]);
        }
      }
      const int group = (round + i) / kTileRuns, output = (round + i) % kTileRuns / C::kBatchTiles * 4;
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (m + e < p.batch)
          machine.store(partial_of<C>(p, m + e, first_patch, group, slice, machine.block_y()) + output,
                        sum[0].v[e] * scale[e], sum[0].v[2 + e] * scale[e], sum[1].v[e] * scale[e],
                        sum[1].v[2 + e] * scale[e]);
    }
  }
}

template <class C, class Machine>
NMKERN_DEVICE void skinny_block(const Product& p, Machine& machine, unsigned char* shared) {
  using Patch = typename C::Patch;
  const int warp = machine.thread() / kLanes, depth = warp / C::kOutputWarps;
  const int slice = int(machine.block_x() % C::kSlices);
  const int64_t first_patch = machine.block_x() / C::kSlices * int64_t{C::kBlockPatches} +
                              warp % C::kOutputWarps * C::kGroups * kQuads + quad_of(machine.lane());
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
  if constexpr (C::kTable) stage_table<C::kOperand, C::kThreads>(machine, shared);
  machine.await_previous();

  // What is left over of the last step is multiplied by zeros.
  const auto steps_from = [&](int64_t first) {
    const int steps = int(split_end - first < C::kStageSteps ? split_end - first : C::kStageSteps);
    return (steps + C::kUnroll - 1) / C::kUnroll * C::kUnroll;
  };
  [[maybe_unused]] Staged<C> ahead;
  [[maybe_unused]] const int tile = warp % C::kTileWarps;
  if constexpr (C::kAhead) ahead.load(p, machine, batch_first, split_first, steps_from(split_first), tile, 0);
  for (int64_t first = split_first; first < split_end; first += C::kStageSteps) {
    const int steps = steps_from(first);
    machine.wait();
    if constexpr (C::kAhead)
      ahead.store(machine, steps, tile, 0, shared);
    else
      stage_x<C>(p, machine, batch_first, first, steps, shared);
    machine.wait();
    const int64_t next = first + C::kStageSteps;
    if constexpr (C::kAhead)
      if (next < split_end) ahead.load(p, machine, batch_first, next, steps_from(next), tile, 0);
    const uint32_t patch =
        p.reduction_patch + uint32_t(first) * kQuadLanes + uint32_t(place_of(machine.lane()));
    const int slice_bits = slice * (32 / Patch::kColumns) * Patch::kFields;
    // The warp's turn of the stage.
    constexpr int kTurns = C::kDepthWarps * C::kUnroll;
    const int turn = (steps + kTurns - 1) / kTurns * C::kUnroll, begin = depth * turn;
    const int end = steps - begin < turn ? steps : begin + turn;
    if constexpr (C::kChains) {
#pragma unroll 1
      for (int step = begin; step < end; step += C::kChainSteps) {
        const int left = end - step;
        float chain[C::kGroups][Patch::kTiles][C::kBatchTiles][4] = {};
        multiply<C>(p, machine, shared, patch, step, left < C::kChainSteps ? left : C::kChainSteps, fixed,
                    slice_bits, chain);
        add_sums<Machine>(sums, chain);
      }
    } else {
      multiply<C>(p, machine, shared, patch, begin, end - begin, fixed, slice_bits, sums);
    }
  }
  if constexpr (C::kDepthWarps > 1)
    write_shared<C>(p, machine, batch_first, first_patch, slice, depth, shared, sums);
  else
    write_partial<C>(p, machine, batch_first, first_patch, slice, machine.block_y(), sums);
}

}  // namespace nmkern::cuda
