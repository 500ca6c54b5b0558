// The product for at most eight rows, of weights of one or four bits: integers times integers.
//
//   x[m, k] * in_gain[c, k] = scale[m] * q[m, k], rounded, for the k of a split                   (Stage)
//   sum_k q[m, k] * code[n, k] = factor * sum_k q[m, k] * field[n, k] - offset * sum_k q[m, k]
//   partial[s, m, n] = scale[m] * sum_k q[m, k] * code[n, k]                                      (write_run)
//
//   x -> Stage -> digits of q in shared memory, in the order of B's registers -> multiply_steps -> run_of
//   -> own_run, finish_sums: a quad's lanes and a block's warps together -> partial -> finish.h -> y
//
// A warp generates W in A's registers as skinny.cu does, but as bytes (see bytes.h), which tensor cores
// multiply by q's digits of eight bits: B's columns are digits of rows. Instructions per weight and thread of
// the loop, sm_90a, up to 2 rows and bfloat16 of 5 to 8: rademacher 0.50 and 0.66 (transposed 0.53, 0.96),
// uniform 0.95 and 1.08 (1.11, 1.31); as bfloat16, of eight rows, uniform took 1.99 (2.09), rademacher 1.32.
//
// q is what is rounded: uniform's by 2^-26 of the row's largest at most, of four digits, by 2^-18 of three
// (rademacher 2^-27 and 2^-19, transposed 2^-30 and 2^-22; more where the largest is subnormal). Its sums are
// exact, where those that tensor cores take in float32 lose at every addition what is below 2^-24 of the
// largest term. An infinity gives infinities, but several in a row may, too, where they would cancel.
// Rejected: x packed by a kernel before, which would be a launch more; a scale for each stage, whose sums
// would be finished each for themselves: by an estimate half as many clocks as the loop takes, at eight rows.
//
// Invariant: a sum's bits follow from shapes: splits are added upward, and in a split no order has a say (but
// beyond 65,536 of the reduction, which are added upward too).
#include "dense.h"
#include "enqueue.h"
#include "fixed_plan.h"
#include "hash.cuh"
#include "input.cuh"

namespace nmkern::cuda {
namespace {

// Shared memory.
template <class C>
struct Shared {
  unsigned char* x;     // and what warps exchange
  uint32_t* magnitude;  // [kFixedRows]: the largest of a row, as bits
  int *lower, *upper;   // [kFixedRows]: the sum of a row's integers is lower + 2^16 * upper

  NMKERN_DEVICE explicit Shared(unsigned char* memory)
      : x(memory),
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
};

constexpr uint32_t kInfinity = 0x7F800000;  // as bits; beyond are NaN

// The exponent of what x is multiplied by, so that the largest of a row becomes an integer of as many bits as
// digits have room for.
template <class C>
NMKERN_DEVICE int scale_exponent(uint32_t magnitude) {
  if (magnitude == kInfinity) return 0;
  const int exponent = int(magnitude >> 23);
  return 8 * C::kDigits - 2 - C::Bytes::kMoreBits + 126 - (exponent < 1 ? 1 : exponent);
}

// The integer that is nearest to value * scale, which is 2^22 at most where there are three digits.
template <class C>
NMKERN_DEVICE int nearest(float value, const Power& scale) {
  if constexpr (C::kDigits > 3) return __float2int_rn(value * scale.first * scale.second);
  // Twice as fast: of a sum with 1.5 * 2^23, the last place is 1.
  return int(bits_of(__fmaf_rn(value * scale.first, scale.second, 0x1.8p23f)) - bits_of(0x1.8p23f));
}

// x of a stage: a thread has the slots that a lane of B has, of one row and some of the steps. Eight lanes
// with neighbouring slots of two rows store 128 bytes that are neighbours too.
template <class C>
struct Stage {
  using Bytes = typename C::Bytes;
  static constexpr int kSlots = Bytes::kSlots, kPieces = kSlots / kPacked;
  float value[C::kLoads][kSlots];

  NMKERN_DEVICE static int row() { return lane_id() / kQuadLanes % C::kRows; }
  NMKERN_DEVICE static int step(int load) {
    constexpr int kWarpSteps = kLanes / kQuadLanes / C::kRows;
    return (load * C::kWarps + thread_id() / kLanes) * kWarpSteps + lane_id() / (kQuadLanes * C::kRows);
  }

  // Zeros where there is no such row, or step.
  NMKERN_DEVICE void load(const FixedProduct& p, int64_t first, int steps) {
    const bool whole = p.x.reduction % kPacked == 0 ||
                       (first + steps) * (kQuadLanes * kSlots) <= p.x.reduction;  // no row ends in a vector
    if (!p.x.vectors || !whole)
      load_pieces(p, first, steps);
    else if (p.x.x.dtype == Dtype::float32)
      load_vectors<float>(p, first, steps);
    else
      load_vectors<uint16_t>(p, first, steps);
  }

  // What lanes have of the thread's row, joined.
  template <class Join>
  NMKERN_DEVICE static uint32_t over_row(uint32_t all, const Join& join) {
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2)
      if (distance < kQuadLanes || distance >= kQuadLanes * C::kRows)
        all = join(all, __shfl_xor_sync(0xFFFFFFFF, all, distance));
    return all;
  }
  NMKERN_DEVICE static bool speaks_for_row() {
    return lane_id() % kQuadLanes == 0 && lane_id() < kQuadLanes * C::kRows;
  }

  // Makes the largest of its rows known.
  NMKERN_DEVICE void compare(const Shared<C>& shared) const {
    uint32_t most = 0;  // magnitudes are ordered as their bits are
#pragma unroll
    for (const auto& slots : value)
#pragma unroll
      for (float v : slots) {
        const uint32_t magnitude = bits_of(v) & 0x7FFFFFFF;
        if (magnitude > most) most = magnitude;
      }
    most = over_row(most, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
    if (speaks_for_row()) atomicMax(shared.magnitude + row(), most);
  }

  // Its digits, and the sums of its integers, by the largest that is known. Where that is infinite,
  // infinities are counted: +-1 of all that is 0.
  NMKERN_DEVICE void store(int steps, const Shared<C>& shared) {
    const uint32_t largest = shared.magnitude[row()];
    const Power scale(scale_exponent<C>(largest));
    if (largest == kInfinity)
#pragma unroll
      for (auto& slots : value)
#pragma unroll
        for (float& v : slots) v = fabsf(v) == float_of(kInfinity) ? (v < 0 ? -1.0f : 1.0f) : 0.0f;
    const auto plus = [](uint32_t a, uint32_t b) { return a + b; };
    int64_t sum = 0;
#pragma unroll
    for (int load = 0; load < C::kLoads; ++load) {
      int q[kSlots];
#pragma unroll
      for (int i = 0; i < kSlots; ++i) sum += q[i] = nearest<C>(value[load][i], scale);
      if (step(load) >= steps) continue;
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
      for (int i = 0; i < C::kDigits; ++i) {
        const int column = i * C::kRows + row();
        const int lane = column % kByteColumns * kQuadLanes + lane_id() % kQuadLanes;
#pragma unroll
        for (int vector = 0; vector < C::kVectors; ++vector) {
          uint32_t word[C::kVector];
#pragma unroll
          for (int reg = 0; reg < C::kVector; ++reg) word[reg] = digits[vector * C::kVector + reg].w[i];
          const int offset = C::x_offset(step(load), vector, column / kByteColumns);
          store_words(shared.x + offset + lane * (4 * C::kVector), word);
        }
      }
    }
    const uint32_t lower = over_row(uint32_t(sum) & 0xFFFF, plus),
                   upper = over_row(uint32_t(sum >> 16), plus);
    if (speaks_for_row()) {
      atomicAdd(shared.lower + row(), int(lower));
      atomicAdd(shared.upper + row(), int(upper));
    }
  }

 private:
  NMKERN_DEVICE static int64_t place(int64_t first, int load) {
    return ((first + step(load)) * kQuadLanes + lane_id() % kQuadLanes) * kSlots;
  }
  NMKERN_DEVICE static const float* gain_of_row(const FixedProduct& p) {
    if (!p.x.in_gain.data || row() >= p.x.batch) return nullptr;
    return p.x.in_gain.data + bank_row(p.x.in_gain, p.x.context, row()) * p.x.reduction;
  }

  NMKERN_DEVICE void load_pieces(const FixedProduct& p, int64_t first, int steps) {
    const float* gain = gain_of_row(p);
#pragma unroll
    for (int load = 0; load < C::kLoads; ++load)
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        float some[kPacked] = {};
        if (row() < p.x.batch && step(load) < steps)
          input_values(p.x, row(), gain, place(first, load) + piece * kPacked, some);
#pragma unroll
        for (int i = 0; i < kPacked; ++i) value[load][piece * kPacked + i] = some[i];
      }
  }

  // All loads are in flight before the first is used.
  template <class T>
  NMKERN_DEVICE void load_vectors(const FixedProduct& p, int64_t first, int steps) {
    constexpr int kWords = kPacked * sizeof(T) / 4;
    const auto* x = static_cast<const T*>(p.x.x.data) + row() * p.x.x.row_stride;
    const float* gain = gain_of_row(p);
    uint32_t raw[C::kLoads][kPieces][kWords];
    const auto for_each = [&](const auto& use) {
#pragma unroll
      for (int load = 0; load < C::kLoads; ++load)
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece)
          use(load, piece, place(first, load) + piece * kPacked, step(load) < steps && row() < p.x.batch);
    };
    for_each([&](int load, int piece, int64_t k, bool here) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        uint4 v{};
        if (here && k + kPacked <= p.x.reduction)
          v = *reinterpret_cast<const uint4*>(x + k + 4 * i / sizeof(T));
        auto* to = raw[load][piece] + i;
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
      }
    });
    for_each([&](int load, int piece, int64_t k, bool here) {
      float* to = value[load] + piece * kPacked;
#pragma unroll
      for (int i = 0; i < kPacked; ++i)
        to[i] = sizeof(T) == 4
                    ? float_of(raw[load][piece][i % kWords])
                    : float_of_half(uint16_t(raw[load][piece][i / 2 % kWords] >> i % 2 * 16), p.x.x.dtype);
      if (gain) {
        float factor[kPacked] = {};
        if (here && k + kPacked <= p.x.reduction) load_floats(gain + k, factor);
#pragma unroll
        for (int i = 0; i < kPacked; ++i) to[i] = __fmul_rn(to[i], factor[i]);
      }
    });
  }
};

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

// What a lane's sums tell of a run: four sums of fields times integers, times 2^kShift.
struct Run {
  int64_t v[4];
};

// The digits that the lane has, of run (group * kOutputs / 4 + outputs / 4) * 2 + e: rows that differ in e
// are neighbours among B's columns.
template <class C>
NMKERN_DEVICE Run run_of(const Sums<C>& sums, int run) {
  constexpr int kQuarters = C::Patch::kOutputs / 4;
  const int group = run / 2 / kQuarters, first = run / 2 % kQuarters * 4, e = run % 2;
  const int own_digits = place_of(lane_id()) * 2 / C::kRows;  // below the lane's, in a tile
  Run result;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int64_t value = 0;
#pragma unroll
    for (int at = C::kTiles - 1; at >= 0; --at) {
      // Patch::output(tile, half) = 2 * tile + half; half is bit 1 of a C register's number.
      const auto of = [&](int n, int set) { return sums[group][n / 2][set][at][n % 2 * 2 + e]; };
      value = value * (1 << 8 * C::kSharing % 32) + C::Bytes::field_sum(of, first + i);
    }
    result.v[i] = value << 8 * own_digits;
  }
  return result;
}

// A run of all digits, which lanes of a quad have together: `run` counts those of which the lane is left with
// the sum, see write_run.
template <class C, int sharing = C::kSharing>
NMKERN_DEVICE Run own_run(const Sums<C>& sums, int run) {
  if constexpr (sharing == 1) {
    return run_of<C>(sums, run);
  } else {
    // Half of them stay, and half go to the lane that has the other digits.
    constexpr int kDistance = kQuadLanes * sharing / C::kSharing / 2;
    const bool upper = place_of(lane_id()) & kDistance;
    const Run low = own_run<C, sharing / 2>(sums, run);
    const Run high = own_run<C, sharing / 2>(sums, run + C::kRuns * sharing / C::kSharing / 2);
    Run result = upper ? high : low;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t given = upper ? low.v[i] : high.v[i];
      result.v[i] += __shfl_xor_sync(0xFFFFFFFF, given, kDistance);
    }
    return result;
  }
}

// A run's outputs: written, or added to those of the sums before.
template <class C>
NMKERN_DEVICE void write_run(const FixedProduct& p, const Shared<C>& shared, const Run& run, int number,
                             int64_t first_patch, int slice, bool add) {
  using Code = ByteCode<C::Patch::kFamily>;
  constexpr int kQuarters = C::Patch::kOutputs / 4;
  number += place_of(lane_id()) * C::kSharing / kQuadLanes * C::kOwnRuns;
  const int m = (place_of(lane_id()) * 2 + number % 2) % C::kRows;
  if (m >= p.x.batch) return;
  const int64_t whole = shared.lower[m] + (int64_t{shared.upper[m]} << 16);
  const uint32_t magnitude = shared.magnitude[m];
  const Power unit(-scale_exponent<C>(magnitude));
  const int64_t n = (first_patch + number / 2 / kQuarters * kQuads) * C::kPatchOutputs +
                    slice * C::Patch::kFields * C::Patch::kTransposed + number / 2 % kQuarters * 4;
  float* to = p.partial + (int64_t{blockIdx.y} * p.x.batch + m) * p.partial_stride + n;
  float y[4];
  if (add) load_floats(to, y);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t sum = (run.v[i] * Code::kFactor >> C::Bytes::kShift) - whole * Code::kOffset;
    const float value = __fmul_rn(__fmul_rn(__ll2float_rn(sum), unit.first), unit.second);
    // A NaN for a NaN, and where infinities leave nothing: infinity times 0.
    const float here = magnitude < kInfinity ? value : __fmul_rn(value, float_of(magnitude));
    y[i] = add ? __fadd_rn(y[i], here) : here;
  }
  store_four(to, y[0], y[1], y[2], y[3]);
}

// The sums of a block, of warps that take turns in the reduction together: each writes every kDepthWarps-th
// run.
template <class C>
NMKERN_DEVICE void finish_sums(const FixedProduct& p, const Shared<C>& shared, const Sums<C>& sums,
                               int64_t first_patch, int slice, bool add) {
  if constexpr (C::kDepthWarps == 1) {
#pragma unroll
    for (int run = 0; run < C::kOwnRuns; ++run)
      write_run<C>(p, shared, own_run<C>(sums, run), run, first_patch, slice, add);
  } else {
    struct alignas(16) Half {
      int64_t v[2];
    };
    const int warp = thread_id() / kLanes, output_warp = warp % C::kOutputWarps;
    const auto slot = [&](int run, int half, int of_warp) {
      return reinterpret_cast<Half*>(shared.x) + ((run * 2 + half) * C::kWarps + of_warp) * kLanes +
             lane_id();
    };
    __syncthreads();  // x has been multiplied
#pragma unroll
    for (int run = 0; run < C::kOwnRuns; ++run) {
      const Run own = own_run<C>(sums, run);
#pragma unroll
      for (int half = 0; half < 2; ++half) *slot(run, half, warp) = {{own.v[2 * half], own.v[2 * half + 1]}};
    }
    __syncthreads();
#pragma unroll 1
    for (int run = warp / C::kOutputWarps; run < C::kOwnRuns; run += C::kDepthWarps) {
      Run all{};
#pragma unroll
      for (int depth = 0; depth < C::kDepthWarps; ++depth)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Half share = *slot(run, half, depth * C::kOutputWarps + output_warp);
          all.v[2 * half] += share.v[0];
          all.v[2 * half + 1] += share.v[1];
        }
      write_run<C>(p, shared, all, run, first_patch, slice, add);
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) fixed_kernel(const FixedProduct p) {
  extern __shared__ __align__(128) unsigned char memory[];
  using Patch = typename C::Patch;
  const Shared<C> shared(memory);
  const int warp = thread_id() / kLanes, depth = warp / C::kOutputWarps;
  const int slice = int(blockIdx.x % C::kSlices);
  const int64_t first_patch = blockIdx.x / C::kSlices * int64_t{C::kBlockPatches} +
                              warp % C::kOutputWarps * C::kGroups * kQuads + quad_of(lane_id());
  const int64_t split_first = int64_t{blockIdx.y} * p.split_steps;
  const int64_t left = p.steps - split_first;
  const int64_t split_end = split_first + (left < p.split_steps ? left : p.split_steps);

  OutputPart<Patch> fixed[C::kGroups];
  output_parts<Patch>(p.output_patch + uint32_t(first_patch), p.keys, fixed);
  await_previous();

  // As much of the reduction as sums have room for, of which the largest of rows come first.
#pragma unroll 1
  for (int64_t begin = split_first; begin < split_end; begin += C::kSumSteps) {
    const int64_t end = split_end - begin < C::kSumSteps ? split_end : begin + C::kSumSteps;
    __syncthreads();  // what is known of rows has been read
    // Of magnitude, lower and upper.
    if (thread_id() < 3 * int(kFixedRows)) shared.magnitude[thread_id()] = 0;
    __syncthreads();
    Stage<C> stage;
    Sums<C> sums = {};
    // All stages but the first are loaded twice: at first, for the largest.
    const int stages = int((end - begin + C::kStageSteps - 1) / C::kStageSteps);
#pragma unroll 1
    for (int turn = 1 - stages; turn < stages; ++turn) {
      const int64_t first = begin + (turn < 0 ? -turn : turn) * C::kStageSteps;
      const int steps = int(end - first < C::kStageSteps ? end - first : C::kStageSteps);
      stage.load(p, first, steps);
      if (turn <= 0) stage.compare(shared);
      if (turn < 0) continue;
      __syncthreads();  // magnitudes are there, x has been multiplied
      stage.store(steps, shared);
      __syncthreads();
      // The warp's turn of the stage.
      const int share = (steps + C::kDepthWarps - 1) / C::kDepthWarps, skip = depth * share;
      const uint32_t patch = p.reduction_patch + (uint32_t(first + skip) * kQuadLanes + place_of(lane_id())) *
                                                     uint32_t(C::Bytes::kPatches);
      multiply_steps<C>(p, shared.x + skip * C::kStepBytes, patch,
                        steps - skip < share ? steps - skip : share, fixed,
                        slice * (32 / Patch::kColumns) * Patch::kFields, sums);
    }
    finish_sums<C>(p, shared, sums, first_patch, slice, begin > split_first);
  }
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
