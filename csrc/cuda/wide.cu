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
// x that is a float32 enters as two float16, whose sums are taken in chains, as skinny_config.h says; x of 16
// bits times in_gain as one: see pack.cu. Invariant: as there, a sum's order follows from shapes: k16 steps
// upward, parts of an x from the largest down within two of them, chains and splits upward. Which block takes
// a tile changes nothing.
//
// The kernels exist for sm_90a alone; wide_config.h says which there are, wide_plan.h which of them serves a
// call.
#include "dense.h"
#include "enqueue.h"
#include "sums.cuh"
#include "table.cuh"
#include "wgmma.cuh"
#include "wide_plan.h"

namespace nmkern::cuda {
namespace {

// Registers of a thread at the start, which is what ptxas gives 384 threads, and in each role. More than a
// block starts with there never are: a warpgroup would wait for them for ever.
constexpr int kStartRegisters = 65536 / kWideThreads / 8 * 8;
constexpr int kProducerRegisters = 120, kConsumerRegisters = 192;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (kConsumers + 1) * kStartRegisters);

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

// Barriers at the start of shared memory: filled and free of each stage.
class Ring {
 public:
  NMKERN_DEVICE Ring(unsigned char* shared, int stages) : barriers_(shared_address(shared)) {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < stages; ++stage) {
        initialize(filled(stage), kLanes);
        initialize(free(stage), kConsumers * 4);
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
  }

  NMKERN_DEVICE void wait_filled(int stage, uint32_t parity) const { wait_phase(filled(stage), parity); }
  NMKERN_DEVICE void wait_free(int stage, uint32_t parity) const { wait_phase(free(stage), parity); }
  // wgmma reads shared memory through another proxy than the stores went.
  NMKERN_DEVICE void publish(int stage) const {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    arrive(filled(stage));
  }
  NMKERN_DEVICE void release(int stage) const {
    if (lane_id() == 0) arrive(free(stage));
  }

 private:
  uint32_t barriers_;

  NMKERN_DEVICE uint32_t filled(int stage) const { return barriers_ + 8 * stage; }
  NMKERN_DEVICE uint32_t free(int stage) const { return barriers_ + 8 * (kMostStages + stage); }

  static NMKERN_DEVICE void initialize(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
  }
  static NMKERN_DEVICE void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
  }
  // Until the phase of this parity is over.
  static NMKERN_DEVICE void wait_phase(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
  }
};

// x of a turn into a stage, by one warp; lane 4 * g + t loads patches t of the rows g. `whole`: nothing of
// the tile lies outside of x.
template <class C, bool whole>
NMKERN_DEVICE void produce_part(const uint16_t* x, int64_t row_stride, int64_t rows, int64_t left,
                                unsigned char* to) {
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
          load_elements(x + step * C::kStep, element[tile][step]);
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

template <class C>
NMKERN_DEVICE void produce_turn(const WideProduct& p, const WideTile& tile, int turn, unsigned char* stage) {
  const int lane = lane_id();
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
      produce_part<C, true>(x, p.x_row_stride, 0, 0, to);
    else
      produce_part<C, false>(x, p.x_row_stride, p.batch - m, p.reduction - k, to);
    x += p.x_part_stride;
    to += C::kPartBytes;
  }
}

// A warp that produces fills stage `warp` again and again: turns warp, warp + stages, ... of all its tiles.
template <class C>
NMKERN_DEVICE void produce(const WideProduct& p, const Ring& ring, int warp, unsigned char* shared) {
  if (warp >= C::kStages) return;
  unsigned char* stage = shared + C::kStagesOffset + warp * C::kStageBytes;
  int turn = warp;
  uint32_t parity = 1;
  for (int64_t index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const WideTile tile = wide_tile(p, index);
    for (; turn < tile.turns; turn += C::kStages) {
      ring.wait_free(warp, parity);
      parity ^= 1;
      produce_turn<C>(p, tile, turn, stage);
      ring.publish(warp);
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

template <class C>
NMKERN_DEVICE void generate(const WideProduct& p, const unsigned char* shared, Generator<C>& g, int group,
                            GroupA& a) {
  using Patch = typename C::Patch;
  const uint32_t lane_bytes = uint32_t(lane_id()) * 4;
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
template <class C, class Sums>
NMKERN_DEVICE void write_outputs(const WideProduct& p, int64_t batch_first, int64_t n, const Sums& sums) {
  const Finish& f = p.finish;
  if (n < 0 || n >= f.outputs) return;
  // A product with 1 and a sum with -0 change no bit.
  float gain[4] = {1, 1, 1, 1}, bias[4] = {-0.0f, -0.0f, -0.0f, -0.0f};
  const auto load = [&](const Bank& bank, int64_t m, float (&value)[4]) {
    load_floats(bank.data + bank_row(bank, f.context, m) * f.outputs + n, value);
  };
  if (f.out_gain.rows == 1) load(f.out_gain, 0, gain);
  if (f.bias.rows == 1) load(f.bias, 0, bias);
  for_each_row<C>(p, batch_first, [&](int tile, int e, int64_t m, float scale) {
    if (f.out_gain.rows > 1) load(f.out_gain, m, gain);
    if (f.bias.rows > 1) load(f.bias, m, bias);
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float z = __fmul_rn(sums[0][i / 2][tile][i % 2 * 2 + e] * scale, f.factor);
      y[i] = __fadd_rn(__fmul_rn(z, gain[i]), bias[i]);
    }
    store_four(f.y, m, n, y);
  });
}

// What wgmma has summed: no use of it may be moved before the wait, of which the compiler knows nothing.
template <int tiles>
NMKERN_DEVICE void hold(float (&d)[2][tiles][4]) {
#pragma unroll
  for (int i = 0; i < 8 * tiles; ++i)
    asm volatile("" : "+f"(d[i / 4 / tiles][i / 4 % tiles][i % 4])::"memory");
}

template <class C>
NMKERN_DEVICE void consume(const WideProduct& p, const Ring& ring, int warpgroup, unsigned char* shared) {
  using Patch = typename C::Patch;
  const int lane = lane_id(), warp = thread_id() / kLanes % 4;
  int stage = 0;
  uint32_t parity = 0;
  for (int64_t index = blockIdx.x; index < p.tiles; index += gridDim.x) {
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
    generate(p, shared, g, 0, a[0]);
    for (int turn = 0; turn < tile.turns;) {
      // The whole reduction in one chain, summed where it is wanted; or chains that are added up.
      const int end = C::kChains && tile.turns - turn > C::kChainTurns ? turn + C::kChainTurns : tile.turns;
      float own[2][C::kChains ? C::kBatchTiles : 1][4];
      auto& chain = chain_of<C::kChains>(own, sums[0]);
      int before = -1;  // the stage of the turn before
#pragma unroll 1
      for (bool first = C::kChains; turn < end; ++turn, first = false) {
        ring.wait_filled(stage, parity);
        const uint32_t x = descriptor_low(shared_address(shared + C::kStagesOffset + stage * C::kStageBytes));
#pragma unroll
        for (int group = 0; group < C::kTurnGroups; ++group) {
          begin_group();
#pragma unroll
          for (int part = 0; part < C::kParts; ++part)
#pragma unroll
            for (int i = 0; i < C::kGroupDepths; ++i)
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const bool fresh = group == 0 && part == 0 && i == 0 && first;
                const int at = part * C::kPartBytes + C::core(group * C::kGroupDepths + i, 0, 0);
                wgmma<C::kOperand>(chain[half], a[group % 2][i][half], x + at / 16, !fresh);
              }
          end_group();
          // The group before has been multiplied: its registers, and after a turn its stage, are free.
          wait_groups<1>();
          if (group == 0 && before >= 0) ring.release(before);
          generate(p, shared, g, (group + 1) % C::kTurnGroups, a[(group + 1) % 2]);
        }
        before = stage;
        if (++stage == C::kStages) stage = 0, parity ^= 1;
      }
      wait_groups<0>();
      hold(chain);
      ring.release(before);
      if constexpr (C::kChains) add_sums(sums[0], chain);
    }
    const int64_t batch_first = tile.batch_block * (8 * C::kBatchTiles);
    if (p.partial) {
      write_partial<C>(p, batch_first, patch, slice, tile.split, sums);
    } else {
      const int64_t n = patch * C::kPatchOutputs + slice * Patch::kOutputs - p.finish.skip;
      write_outputs<C>(p, batch_first, n, sums);
    }
  }
}

// One block, in the role of each of its warpgroups.
template <Family family, bool transposed, int batch_tiles, Dtype operand, int parts>
__global__ void __launch_bounds__(kWideThreads, 1) wide_kernel(const __grid_constant__ WideProduct p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using C = WideConfig<family, transposed, batch_tiles, operand, parts>;
  extern __shared__ __align__(128) unsigned char shared[];
  if constexpr (C::kTable) stage_table<C::kOperand, kWideThreads>(shared + C::kTableOffset);
  const Ring ring(shared, C::kStages);
  await_previous();
  const int warpgroup = thread_id() / kWarpgroup;
  if (warpgroup == kConsumers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
    produce<C>(p, ring, thread_id() / kLanes % 4, shared);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
    consume<C>(p, ring, warpgroup, shared);
  }
#endif
}

struct Launch {
  const Dense& call;
  void* scratch;
  cudaStream_t stream;

  template <class C>
  int operator()() const {
    using Patch = typename C::Patch;
    const auto kernel =
        wide_kernel<Patch::kFamily, Patch::kTransposed, C::kBatchTiles, C::kOperand, C::kParts>;
    int64_t blocks = 0;
    if (const int error = multiprocessors(&blocks)) return error;
    return for_each_part<C>(call, scratch, [&](const WidePlan& plan) -> int {
      if (plan.packing.packed)
        if (const int error = launch_pack(plan.packing.pack, stream)) return error;
      const uint32_t grid = uint32_t(std::min(plan.product.tiles, blocks));
      if (const int error = enqueue(kernel, grid, kWideThreads, C::kSharedBytes, stream, plan.product))
        return error;
      return plan.partial_bytes ? launch_finish(plan.product.finish, stream) : cudaSuccess;
    });
  }
};

}  // namespace

int64_t wide_scratch(const Dense& call) {
  if (call.batch == 0 || call.outputs() == 0) return 0;
  return with_wide_config(call, [&]<class C>() { return wide_scratch_of<C>(call); });
}

int wide_product(const Dense& call, void* scratch, void* stream) {
  if (call.batch == 0 || call.outputs() == 0) return cudaSuccess;
  return with_wide_config(call, Launch{call, scratch, static_cast<cudaStream_t>(stream)});
}

}  // namespace nmkern::cuda
