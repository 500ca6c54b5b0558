// The product for at most eight rows, of weights of one or four bits: integers times integers.
//
//   x[m, k] * in_gain[c, k] = scale[m] * q[m, k], rounded, for the k of a stage                   (stage_x)
//   sum_k q[m, k] * code[n, k] = factor * sum_k q[m, k] * field[n, k] - offset * sum_k q[m, k]
//   partial[s, m, n] = sum over the stages of split s: scale[m] * sum_k q[m, k] * code[n, k] (finish_stage)
//
//   x -> stage_x -> digits of q in shared memory, in the order of B's registers -> multiply_steps -> sums
//   of the block -> finish_stage -> partial -> finish.h -> y
//
// A warp generates W in A's registers as skinny.cu does, but as bytes (see bytes.h), which tensor cores
// multiply by q's digits of eight bits: B's columns are rows times digits, four digits of two rows in a tile
// of eight. Instructions per weight and thread of the loop, sm_90a, up to 2 rows and at 8: rademacher 0.50
// and 0.66 (transposed 0.53, 1.02), uniform 0.95 and 1.16 (1.11, 1.36); as bfloat16 uniform took 1.98 (2.10).
//
// q is what is rounded: uniform's to 2^-26 of the row's largest in the stage by four digits, to 2^-18 by
// three (rademacher 2^-27 and 2^-19, transposed 2^-30 and 2^-22). Its sums are exact, where those that tensor
// cores take in float32 lose at every addition what is below 2^-24 of the largest term. A row that is not
// finite has no finite result.
//
// Invariant: a sum's bits follow from shapes, for stages and splits are added upward; in a stage no order has
// a say.
#include "dense.h"
#include "enqueue.h"
#include "fixed_plan.h"
#include "hash.cuh"
#include "input.cuh"

namespace nmkern::cuda {
namespace {

// Shared memory; of rows, what they have in a stage.
template <class C>
struct Shared {
  unsigned char* x;
  int* sums;            // [kSums][kSumPitch]: of fields times digits
  uint32_t* magnitude;  // [kFixedRows]: the largest of a row, as bits
  int *lower, *upper;   // [kFixedRows]: the sum of a row's integers is lower + 2^20 * upper

  NMKERN_DEVICE explicit Shared(unsigned char* memory)
      : x(memory),
        sums(reinterpret_cast<int*>(memory + C::kSumsOffset)),
        magnitude(reinterpret_cast<uint32_t*>(memory + C::kRowsOffset)),
        lower(reinterpret_cast<int*>(magnitude + kFixedRows)),
        upper(lower + kFixedRows) {}
};

// 2^exponent as a product of two numbers that are not subnormal.
struct Power {
  float first, second;
  NMKERN_DEVICE explicit Power(int exponent) {
    const int half = exponent / 2;
    first = float_of(uint32_t(half + 127) << 23);
    second = float_of(uint32_t(exponent - half + 127) << 23);
  }
  NMKERN_DEVICE float times(float value) const { return __fmul_rn(__fmul_rn(value, first), second); }
};

// The exponent of what x is multiplied by, so that the largest of a row becomes an integer of as many bits as
// digits have room for.
template <class Bytes>
NMKERN_DEVICE int scale_exponent(uint32_t magnitude, int digits) {
  const int exponent = int(magnitude >> 23);
  return 8 * digits - 2 - Bytes::kMoreBits + 126 - (exponent < 1 ? 1 : exponent);
}

// Digits of the x of a stage. All of it is loaded before the largest is known; a warp's loads are of one row.
template <class C>
NMKERN_DEVICE void stage_x(const FixedProduct& p, int64_t first, int steps, const Shared<C>& shared) {
  using Bytes = typename C::Bytes;
  constexpr int kSlots = Bytes::kSlots;
  static_assert(kSlots % kPacked == 0);
  const int places = steps * kQuadLanes, row_places = (places + kLanes - 1) / kLanes * kLanes;
  const int count = row_places * int(p.x.batch);
  float value[C::kLoads][kSlots];
#pragma unroll
  for (int load = 0; load < C::kLoads; ++load) {
    const int item = thread_id() + load * C::kThreads;
    if (item >= count) continue;
    const int m = item / row_places, at = item % row_places;
    const float* gain =
        p.x.in_gain.data ? p.x.in_gain.data + bank_row(p.x.in_gain, p.x.context, m) * p.x.reduction : nullptr;
    uint32_t most = 0;  // magnitudes are ordered as their bits are
#pragma unroll
    for (int i = 0; i < kSlots; i += kPacked) {
      float some[kPacked] = {};
      if (at < places) input_values(p.x, m, gain, (first * kQuadLanes + at) * kSlots + i, some);
#pragma unroll
      for (int j = 0; j < kPacked; ++j) {
        value[load][i + j] = some[j];
        const uint32_t magnitude = bits_of(some[j]) & 0x7FFFFFFF;
        if (magnitude > most) most = magnitude;
      }
    }
    most = __reduce_max_sync(0xFFFFFFFF, most);
    if (lane_id() == 0) atomicMax(shared.magnitude + m, most);
  }
  __syncthreads();
#pragma unroll
  for (int load = 0; load < C::kLoads; ++load) {
    const int item = thread_id() + load * C::kThreads;
    if (item >= count) continue;
    const int m = item / row_places, at = item % row_places;
    const Power scale(scale_exponent<Bytes>(shared.magnitude[m], p.digits));
    int q[kSlots];
    int64_t sum = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      q[i] = __float2int_rn(scale.times(value[load][i]));
      sum += q[i];
    }
    const int lower = __reduce_add_sync(0xFFFFFFFF, int(sum) & 0xFFFFF);
    const int upper = __reduce_add_sync(0xFFFFFFFF, int(sum >> 20));
    if (lane_id() == 0) {
      atomicAdd(shared.lower + m, lower);
      atomicAdd(shared.upper + m, upper);
    }
    if (at >= places) continue;
    Words digits[Bytes::kRegisters];  // word i: digit i of a register's four slots
#pragma unroll
    for (int reg = 0; reg < Bytes::kRegisters; ++reg) {
      Words four;
      // Balanced digits: those of a number and 128 * (1 + 256 + ...), each less 128.
#pragma unroll
      for (int i = 0; i < 4; ++i)
        four.w[i] = (uint32_t(Bytes::scaled(q, Bytes::slot(reg, i))) + 0x80808080) ^ 0x80808080;
      digits[reg] = transposed_bytes(four);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i >= p.digits) continue;
      const int column = m * p.digits + i, lane = column % kByteColumns * kQuadLanes + at % kQuadLanes;
#pragma unroll
      for (int vector = 0; vector < C::kVectors; ++vector) {
        auto* to = reinterpret_cast<uint32_t*>(
            shared.x + C::x_offset(at / kQuadLanes, vector, column / kByteColumns) + lane * (4 * C::kVector));
#pragma unroll
        for (int reg = 0; reg < C::kVector; ++reg) to[reg] = digits[vector * C::kVector + reg].w[i];
      }
    }
  }
}

NMKERN_DEVICE void mma_bytes(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <class C>
using Sums = int[C::kGroups][C::Patch::kTiles][C::Bytes::kSets][C::kTiles][4];

// The loop that the time goes into: hash patches, decode, multiply.
template <class C, class Fixed>
NMKERN_DEVICE void multiply_steps(const FixedProduct& p, const unsigned char* shared, uint32_t patch,
                                  int steps, const Fixed& fixed, int slice_bits, Sums<C>& sums) {
  using Patch = typename C::Patch;
  using Bytes = typename C::Bytes;
  const unsigned char* x = shared + lane_id() * (4 * C::kVector);
#pragma unroll 1
  for (; steps > 0; --steps) {
    using Moving = std::conditional_t<Patch::kTransposed, RowPart, ColumnPart>;
    Moving moving[Bytes::kPatches];
#pragma unroll
    for (int i = 0; i < Bytes::kPatches; ++i)
      if constexpr (Patch::kTransposed)
        moving[i] = row_part(patch + uint32_t(i), p.keys);
      else
        moving[i] = column_part(patch + uint32_t(i), p.keys);
    Words words[C::kGroups][Bytes::kPatches];
#pragma unroll
    for (int group = 0; group < C::kGroups; ++group)
#pragma unroll
      for (int i = 0; i < Bytes::kPatches; ++i) {
        Words& own = words[group][i];
        if constexpr (Patch::kTransposed) {
          own = cuda::patch(moving[i], fixed[group], p.keys);
          if constexpr (C::kSlices > 1)
#pragma unroll
            for (uint32_t& word : own.w) word >>= slice_bits;
          own = transposed_bytes(own);
        } else {
          own = cuda::patch(fixed[group], moving[i], p.keys);
        }
      }
#pragma unroll
    for (int vector = 0; vector < C::kVectors; ++vector) {
      uint32_t b[C::kTiles][C::kVector];
#pragma unroll
      for (int tile = 0; tile < C::kTiles; ++tile) load_words(x + C::x_offset(0, vector, tile), b[tile]);
#pragma unroll
      for (int group = 0; group < C::kGroups; ++group)
#pragma unroll
        for (int reg = 0; reg < C::kVector; reg += 2) {
          const int number = (vector * C::kVector + reg) / 2;  // of the step's mmas
          const int set = number / Bytes::kPairs, pair = number % Bytes::kPairs;
#pragma unroll
          for (int tile = 0; tile < Patch::kTiles; ++tile) {
            uint32_t a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
              a[i] = Bytes::bytes(words[group], set, pair, i / 2, Patch::output(tile, i % 2));
#pragma unroll
            for (int at = 0; at < C::kTiles; ++at)
              mma_bytes(sums[group][tile][set][at], a, {b[at][reg], b[at][reg + 1]});
          }
        }
    }
    patch += kQuadLanes * Bytes::kPatches;
    x += C::kStepBytes;
  }
}

// A lane's sums to those of the block; columns that are none of the rows' have anything.
template <class C>
NMKERN_DEVICE void add_sums(const FixedProduct& p, const Sums<C>& sums, int first_patch, int* block) {
  using Patch = typename C::Patch;
#pragma unroll
  for (int at = 0; at < C::kTiles; ++at)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = at * kByteColumns + c_col(lane_id(), e);
      if (column >= p.x.batch * p.digits) continue;
#pragma unroll
      for (int group = 0; group < C::kGroups; ++group)
#pragma unroll
        for (int output = 0; output < Patch::kOutputs; ++output) {
          // Patch::output(tile, half) = 2 * tile + half; half is bit 1 of a C register's number.
          const auto of = [&](int n, int set) { return sums[group][n / 2][set][at][n % 2 * 2 + e]; };
          const int n = (first_patch + group * kQuads) * Patch::kOutputs + output;
          atomicAdd(block + column * C::kSumPitch + n, C::Bytes::field_sum(of, output));
        }
    }
}

// What the block's threads own of its outputs.
template <class C>
struct Outputs {
  static constexpr int kOwn = C::kBlockOutputs * C::kRows / C::kThreads;
  float y[kOwn] = {};

  template <class Use>
  NMKERN_DEVICE void for_each(const FixedProduct& p, const Use& use) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int at = thread_id() + i * C::kThreads, m = at / C::kBlockOutputs, n = at % C::kBlockOutputs;
      if (m < p.x.batch) use(y[i], m, n);
    }
  }
};

// Adds a stage's sums to y, and leaves zeros.
template <class C>
NMKERN_DEVICE void finish_stage(const FixedProduct& p, const Shared<C>& shared, Outputs<C>& outputs) {
  using Code = ByteCode<C::Patch::kFamily>;
  outputs.for_each(p, [&](float& y, int m, int n) {
    int64_t sum = 0;
#pragma unroll
    for (int i = 3; i >= 0; --i) {
      if (i >= p.digits) continue;
      int& own = shared.sums[(m * p.digits + i) * C::kSumPitch + n];
      sum = sum * 256 + own;
      own = 0;
    }
    const int64_t whole = shared.lower[m] + (int64_t{shared.upper[m]} << 20);
    sum = (sum * Code::kFactor >> C::Bytes::kShift) - whole * Code::kOffset;
    const uint32_t magnitude = shared.magnitude[m];
    const Power unit(-scale_exponent<typename C::Bytes>(magnitude, p.digits));
    y = __fadd_rn(y, magnitude < 0x7F800000 ? unit.times(__ll2float_rn(sum)) : float_of(0x7FFFFFFF));
  });
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) fixed_kernel(const FixedProduct p) {
  extern __shared__ __align__(128) unsigned char memory[];
  using Patch = typename C::Patch;
  const Shared<C> shared(memory);
  const int warp = thread_id() / kLanes, depth = warp / C::kOutputWarps;
  const int slice = int(blockIdx.x % C::kSlices);
  const int64_t block_patch = blockIdx.x / C::kSlices * int64_t{C::kBlockPatches};
  const int first_patch = warp % C::kOutputWarps * C::kGroups * kQuads + quad_of(lane_id());
  const int64_t split_first = int64_t{blockIdx.y} * p.split_steps;
  const int64_t left = p.steps - split_first;
  const int64_t split_end = split_first + (left < p.split_steps ? left : p.split_steps);

  using Fixed = std::conditional_t<Patch::kTransposed, ColumnPart, RowPart>;
  Fixed fixed[C::kGroups];
#pragma unroll
  for (int group = 0; group < C::kGroups; ++group) {
    const uint32_t counter = p.output_patch + uint32_t(block_patch) + uint32_t(first_patch + group * kQuads);
    if constexpr (Patch::kTransposed)
      fixed[group] = column_part(counter, p.keys);
    else
      fixed[group] = row_part(counter, p.keys);
    keep(fixed[group]);
  }
  Outputs<C> outputs;
  for (int i = thread_id(); i < C::kSums * C::kSumPitch; i += C::kThreads) shared.sums[i] = 0;
  await_previous();

  for (int64_t first = split_first; first < split_end; first += C::kStageSteps) {
    const int steps = int(split_end - first < C::kStageSteps ? split_end - first : C::kStageSteps);
    if (thread_id() < 3 * int(kFixedRows)) shared.magnitude[thread_id()] = 0;  // and their sums
    __syncthreads();
    stage_x<C>(p, first, steps, shared);
    __syncthreads();
    // The warp's turn of the stage.
    const int turn = (steps + C::kDepthWarps - 1) / C::kDepthWarps, begin = depth * turn;
    const uint32_t patch = p.reduction_patch + (uint32_t(first + begin) * kQuadLanes + place_of(lane_id())) *
                                                   uint32_t(C::Bytes::kPatches);
    Sums<C> sums = {};
    multiply_steps<C>(p, shared.x + begin * C::kStepBytes, patch, steps - begin < turn ? steps - begin : turn,
                      fixed, slice * (32 / Patch::kColumns) * Patch::kFields, sums);
    add_sums<C>(p, sums, first_patch, shared.sums);
    __syncthreads();
    finish_stage(p, shared, outputs);
    __syncthreads();
  }
  outputs.for_each(p, [&](float y, int m, int n) {
    const int64_t patch = block_patch + n / Patch::kOutputs;
    const int64_t output =
        patch * C::kPatchOutputs + slice * Patch::kFields * Patch::kTransposed + n % Patch::kOutputs;
    p.partial[(int64_t{blockIdx.y} * p.x.batch + m) * p.partial_stride + output] = y;
  });
}

}  // namespace

int64_t fixed_scratch(const Dense& call) {
  return with_fixed_config(call, [&]<class C>() { return fixed_plan_of<C>(call).scratch_bytes(); });
}

int fixed_product(const Dense& call, void* scratch, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return with_fixed_config(call, [&]<class C>() -> int {
    FixedPlan plan = fixed_plan_of<C>(call);
    place(plan, scratch);
    const dim3 grid(uint32_t(plan.blocks_x), uint32_t(plan.splits));
    if (const int error = enqueue(fixed_kernel<C>, grid, C::kThreads, C::kSharedBytes, on, plan.product))
      return error;
    return launch_finish(plan.finish, on);
  });
}

}  // namespace nmkern::cuda
