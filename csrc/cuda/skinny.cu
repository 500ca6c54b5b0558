// The product for small batches: one warp generates 16-row tiles of W in A's registers, x is B.
//
//   partial[s, m, n] = sum over the k of split s: x[m, k] * code[n, k], with the x of pack_plan.h
//
//   x -> stage_x -> shared memory, in the order of B's registers -> multiply_steps -> partial -> finish.h ->
//   y
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
// skinny_config.h says which kernels there are, skinny_plan.h which of them serves a call.
#include "dense.h"
#include "enqueue.h"
#include "fixed_plan.h"
#include "hash.cuh"
#include "skinny_plan.h"
#include "sums.cuh"
#include "table.cuh"

namespace nmkern::cuda {
namespace {

// Steps [first, first + steps) of x on their way into shared memory, as every lane's B registers: a patch of
// a row is loaded at once and permuted in registers. A lane keeps its rows and walks along them, kLoads loads
// at a time, so that addresses are sums: 17 instructions a patch (uniform, forward); with indices divided
// anew for each it was 70.
template <class C>
struct Staged {
  using Patch = typename C::Patch;
  uint32_t element[C::kLoads][C::kParts][C::kPieces][2];  // two elements each

  // Loads `at` and on of the lane's rows of a batch tile.
  NMKERN_DEVICE void load(const Product& p, int64_t batch_first, int64_t first, int steps, int tile, int at) {
    const int lane = lane_id(), begin = first_step() + at * C::kStride;
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
          load_elements(x + part * p.x_part_stride + i * C::kStride * C::kStep, element[i][part]);
      }
  }

  NMKERN_DEVICE void store(int steps, int tile, int at, unsigned char* shared) const {
    const int begin = first_step() + at * C::kStride;
    unsigned char* to = shared + C::x_line(lane_id()) + C::x_offset(begin, 0);
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
  NMKERN_DEVICE static int first_step() { return thread_id() / kLanes / C::kTileWarps; }
};

// All of a stage at once, where it is not loaded ahead. Not a loop: after one, nvcc no longer knew the base
// of shared memory as a constant, and a lookup in normal's table took an addition more, 5.5 instructions a
// weight for 4.5.
template <class C>
NMKERN_DEVICE void stage_x(const Product& p, int64_t batch_first, int64_t first, int steps,
                           unsigned char* shared) {
#pragma unroll
  for (int first_tile = 0; first_tile < C::kBatchTiles; first_tile += C::kTileWarps) {
    const int tile = first_tile + thread_id() / kLanes % C::kTileWarps;
#pragma unroll
    for (int at = 0; at < C::kStageLoads; at += C::kLoads) {
      Staged<C> staged;
      staged.load(p, batch_first, first, steps, tile, at);
      staged.store(steps, tile, at, shared);
    }
  }
}

// B's pairs from `first` on, of the step that x points to: 16 bytes at once where two of a load's belong
// here.
template <class C, int count>
NMKERN_DEVICE void load_b(const unsigned char* x, int first, uint32_t (&b)[count][2]) {
  if constexpr (C::kVector == 2 && count % 2 == 0) {
#pragma unroll
    for (int i = 0; i < count; i += 2) {
      const uint4 v = *reinterpret_cast<const uint4*>(x + C::x_offset(0, first + i));
      b[i][0] = v.x, b[i][1] = v.y, b[i + 1][0] = v.z, b[i + 1][1] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const uint2 v = *reinterpret_cast<const uint2*>(x + C::x_offset(0, first + i));
      b[i][0] = v.x, b[i][1] = v.y;
    }
  }
}

#define NMKERN_MMA(operand)                                             \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." operand "." operand      \
      ".f32 "                                                           \
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <Dtype kOperand>
NMKERN_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kOperand == Dtype::float16)
    NMKERN_MMA("f16");
  else
    NMKERN_MMA("bf16");
}

#undef NMKERN_MMA

// The loop that the time goes into: hash a patch, decode, multiply by the batch, from step `first` of the
// stage on; nothing else.
template <class C, class Fixed, class Sums>
NMKERN_DEVICE void multiply_steps(const Product& p, const unsigned char* shared, uint32_t patch, int first,
                                  int steps, const Fixed& fixed, int slice_bits, Sums& sums) {
  using Patch = typename C::Patch;
  const uint32_t lane_bytes = uint32_t(lane_id()) * 4;
  const auto lookup = [&](uint32_t word, int field) {
    return *reinterpret_cast<const uint32_t*>(shared + table_offset(word, field, lane_bytes));
  };
  const unsigned char* x = shared + C::x_line(lane_id()) + C::x_offset(first, 0);
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
        load_b<C>(x, depth * kHere, b);
#pragma unroll
        for (int group = 0; group < C::kGroups; ++group)
#pragma unroll
          for (int tile = 0; tile < Patch::kTiles; ++tile) {
            uint32_t a[4];
#pragma unroll
            for (int reg = 0; reg < 4; ++reg)
              a[reg] = a_register<Patch, C::kOperand>(words[group], tile, depth, reg, lookup);
#pragma unroll
            for (int at = 0; at < kHere; ++at) mma<C::kOperand>(sums[group][tile][at / C::kParts], a, b[at]);
          }
      }
      patch += kQuadLanes;
      x += C::x_offset(1, 0);
    }
  }
}

// The sums of warps that share outputs, added upward through `shared` and written: each of them takes every
// kDepthWarps-th run.
template <class C, class Sums>
NMKERN_DEVICE void write_shared(const Product& p, int64_t batch_first, int64_t first_patch, int slice,
                                int depth, unsigned char* shared, const Sums& sums) {
  constexpr int kTileRuns = C::Patch::kOutputs / 4 * C::kBatchTiles;  // of a group
  struct alignas(16) Half {                                           // of a run: floats of one m16 tile
    float v[4];
  };
  const int output_warp = thread_id() / kLanes % C::kOutputWarps;
  const auto slot = [&](int run, int from, int half) {
    const int warp = from * C::kOutputWarps + output_warp;
    return reinterpret_cast<Half*>(shared) + ((run * C::kWarps + warp) * 2 + half) * kLanes + lane_id();
  };
  static_assert(C::kDepthWarps % C::kBatchTiles == 0, "the runs of a warp are of the same rows");
  const int64_t m = batch_first + depth % C::kBatchTiles * 8 + c_col(lane_id(), 0);
  const float scale[2] = {sum_scale<C>(p, m), sum_scale<C>(p, m + 1)};
#pragma unroll
  for (int round = 0; round < C::kRuns; round += C::kRound) {
    __syncthreads();  // what lies there has been read
#pragma unroll
    for (int i = 0; i < C::kRound; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int rest = (round + i) % kTileRuns;
        const auto& own =
            sums[(round + i) / kTileRuns][rest / C::kBatchTiles * 2 + half][rest % C::kBatchTiles];
        *slot(i, depth, half) = {{own[0], own[1], own[2], own[3]}};
      }
    __syncthreads();
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
          for (int reg = 0; reg < 4; ++reg) sum[half].v[reg] = __fadd_rn(sum[half].v[reg], share.v[reg]);
        }
      }
      const int group = (round + i) / kTileRuns, output = (round + i) % kTileRuns / C::kBatchTiles * 4;
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (m + e < p.batch)
          store_four(partial_of<C>(p, m + e, first_patch, group, slice, blockIdx.y) + output,
                     sum[0].v[e] * scale[e], sum[0].v[2 + e] * scale[e], sum[1].v[e] * scale[e],
                     sum[1].v[2 + e] * scale[e]);
    }
  }
}

// Eight warps a multiprocessor at least: left to choose, ptxas aimed at more of them and spilled.
template <class C>
__global__ void __launch_bounds__(C::kThreads, 8 / C::kWarps) skinny_kernel(const Product p) {
  extern __shared__ __align__(128) unsigned char shared[];
  using Patch = typename C::Patch;
  const int warp = thread_id() / kLanes, depth = warp / C::kOutputWarps;
  const int slice = int(blockIdx.x % C::kSlices);
  const int64_t first_patch = blockIdx.x / C::kSlices * int64_t{C::kBlockPatches} +
                              warp % C::kOutputWarps * C::kGroups * kQuads + quad_of(lane_id());
  const int64_t batch_first = int64_t{blockIdx.z} * 8 * C::kBatchTiles;
  const int64_t split_first = int64_t{blockIdx.y} * p.split_steps;
  const int64_t left = p.steps - split_first;
  const int64_t split_end = split_first + (left < p.split_steps ? left : p.split_steps);

  OutputPart<Patch> fixed[C::kGroups];
  output_parts<Patch>(p.output_patch + uint32_t(first_patch), p.keys, fixed);
  float sums[C::kGroups][Patch::kTiles][C::kBatchTiles][4] = {};
  if constexpr (C::kTable) stage_table<C::kOperand, C::kThreads>(shared);
  await_previous();

  // What is left over of the last step is multiplied by zeros.
  const auto steps_from = [&](int64_t first) {
    const int steps = int(split_end - first < C::kStageSteps ? split_end - first : C::kStageSteps);
    return (steps + C::kUnroll - 1) / C::kUnroll * C::kUnroll;
  };
  [[maybe_unused]] Staged<C> ahead;
  [[maybe_unused]] const int tile = warp % C::kTileWarps;
  if constexpr (C::kAhead) ahead.load(p, batch_first, split_first, steps_from(split_first), tile, 0);
  for (int64_t first = split_first; first < split_end; first += C::kStageSteps) {
    const int steps = steps_from(first);
    __syncthreads();
    if constexpr (C::kAhead)
      ahead.store(steps, tile, 0, shared);
    else
      stage_x<C>(p, batch_first, first, steps, shared);
    __syncthreads();
    const int64_t next = first + C::kStageSteps;
    if constexpr (C::kAhead)
      if (next < split_end) ahead.load(p, batch_first, next, steps_from(next), tile, 0);
    const uint32_t patch = p.reduction_patch + uint32_t(first) * kQuadLanes + uint32_t(place_of(lane_id()));
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
        multiply_steps<C>(p, shared, patch, step, left < C::kChainSteps ? left : C::kChainSteps, fixed,
                          slice_bits, chain);
        add_sums(sums, chain);
      }
    } else {
      multiply_steps<C>(p, shared, patch, begin, end - begin, fixed, slice_bits, sums);
    }
  }
  if constexpr (C::kDepthWarps > 1)
    write_shared<C>(p, batch_first, first_patch, slice, depth, shared, sums);
  else
    write_partial<C>(p, batch_first, first_patch, slice, blockIdx.y, sums);
}

struct Launch {
  const Dense& call;
  void* scratch;
  cudaStream_t stream;

  template <class C>
  int operator()() const {
    Plan plan = plan_of<C>(call);
    place(plan, call, scratch);
    if (plan.packing.packed)
      if (const int error = launch_pack(plan.packing.pack, stream)) return error;
    const dim3 grid(uint32_t(plan.blocks_x), uint32_t(plan.splits), uint32_t(plan.blocks_z));
    if (const int error = enqueue(skinny_kernel<C>, grid, C::kThreads, C::kSharedBytes, stream, plan.product))
      return error;
    return launch_finish(plan.finish, stream);
  }
};

struct Scratch {
  const Dense& call;
  template <class C>
  int64_t operator()() const {
    return plan_of<C>(call).scratch_bytes();
  }
};

}  // namespace

int64_t skinny_scratch(const Dense& call) {
  if (call.batch == 0 || call.outputs() == 0) return 0;
  return is_fixed(call) ? fixed_scratch(call) : with_config(call, Scratch{call});
}

int skinny_product(const Dense& call, void* scratch, void* stream) {
  if (call.batch == 0 || call.outputs() == 0) return cudaSuccess;
  if (is_fixed(call)) return fixed_product(call, scratch, stream);
  return with_config(call, Launch{call, scratch, static_cast<cudaStream_t>(stream)});
}

}  // namespace nmkern::cuda
