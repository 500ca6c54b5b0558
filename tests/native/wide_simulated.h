// The large-batch kernel's own code on a host: skinny_simulated.h's lanes, with Hopper's barriers and wgmma.
//
// wgmma runs asynchronously, so a product reads A and B when it is issued, and again when it is waited for:
// that they are still the same is checked. B is read through the matrix descriptor, decoded by the PTX
// manual.
#pragma once

#include <array>
#include <deque>

#include "../../csrc/cuda/wgmma.h"
#include "../../csrc/cuda/wide_plan.h"
#include "skinny_simulated.h"

namespace {

// mbarrier: phases end when `size` have arrived.
struct PhaseBarrier {
  int size, arrived = 0;
  uint32_t phase = 0;
  void arrive() {
    if (++arrived == size) arrived = 0, ++phase;
  }
};

// One wgmma of a warpgroup: where its lanes' registers are, and what it read.
struct Issued {
  Dtype operand{};
  bool add = true;
  int tiles = 0;
  uint32_t b = 0;
  std::array<float*, kWarpgroup> d{};
  std::array<const uint32_t*, kWarpgroup> a{};
  std::vector<uint32_t> read;
};

constexpr uint32_t kSharedAddress = 1024;  // of the block's shared memory: what the device may have before it

struct Warpgroup {
  Meeting meeting{kWarpgroup};
  Issued next;
  std::vector<Issued> group;
  std::deque<std::vector<Issued>> at_work;
  const unsigned char* shared = nullptr;
  bool fenced = false;

  // A and B, element by element: A[64, 16], then B[n, 16].
  std::vector<uint32_t> read(const Issued& op) const {
    std::vector<uint32_t> found(16 * (64 + 8 * op.tiles));
    for (int thread = 0; thread < kWarpgroup; ++thread)
      for (int reg = 0; reg < 4; ++reg)
        for (int e = 0; e < 2; ++e) {
          const int row = 16 * (thread / kLanes) + a_row(thread % kLanes, reg);
          found[16 * row + a_col(thread % kLanes, reg, e)] = op.a[thread][reg] >> (16 * e) & 0xFFFF;
        }
    const uint64_t descriptor = uint64_t{kDescriptorHigh} << 32 | op.b;
    if (descriptor >> 62) fail("a swizzle");
    const auto field = [&](int bit) { return uint32_t(descriptor >> bit & 0x3FFF) << 4; };
    const uint32_t start = field(0), leading = field(16), stride = field(32);
    for (int n = 0; n < 8 * op.tiles; ++n)
      for (int k = 0; k < 16; ++k) {
        const uint32_t at = start + n / 8 * stride + k / 8 * leading + n % 8 * 16 + k % 8 * 2;
        uint16_t bits;
        std::memcpy(&bits, shared + at - kSharedAddress, 2);
        found[16 * (64 + n) + k] = bits;
      }
    return found;
  }

  void issue() {
    if (!fenced) fail("wgmma without a fence");
    next.read = read(next);
    group.push_back(next);
  }

  void finish(size_t most) {
    for (; at_work.size() > most; at_work.pop_front())
      for (const Issued& op : at_work.front()) {
        if (read(op) != op.read) fail("what wgmma reads changed while it was at work");
        const auto value = [&](int at) { return float_of_half(uint16_t(op.read[at]), op.operand); };
        for (int thread = 0; thread < kWarpgroup; ++thread)
          for (int tile = 0; tile < op.tiles; ++tile)
            for (int reg = 0; reg < 4; ++reg) {
              const int row = 16 * (thread / kLanes) + c_row(thread % kLanes, reg);
              const int col = 8 * tile + c_col(thread % kLanes, reg);
              double sum = op.add ? op.d[thread][4 * tile + reg] : 0;
              for (int k = 0; k < 16; ++k) sum += double{value(16 * row + k)} * value(16 * (64 + col) + k);
              op.d[thread][4 * tile + reg] = truncated(sum);
            }
      }
  }
};

struct HopperBlock : WarpBlock {
  using WarpBlock::WarpBlock;
  PhaseBarrier filled[kMostStages], free[kMostStages];
  Warpgroup warpgroups[kConsumers];
};

// How many blocks share the tiles: fewer than there are tiles, so that some take several.
constexpr int64_t kSimulatedBlocks = 2;

struct HostHopper : HostLane {
  using Shared = HopperBlock;
  HopperBlock& shared;

  HostHopper(HopperBlock& block, int thread) : HostLane(block, thread), shared(block) {}

  uint32_t blocks() const { return kSimulatedBlocks; }
  Warpgroup& warpgroup() const { return shared.warpgroups[thread() / kWarpgroup]; }

  void start(unsigned char* memory, int stages) {
    for (int stage = 0; stage < stages; ++stage) {
      shared.filled[stage].size = kLanes;
      shared.free[stage].size = 4 * kConsumers;
    }
    for (Warpgroup& one : shared.warpgroups) one.shared = memory;
    wait();
  }

  void wait_phase(PhaseBarrier& barrier, uint32_t parity) {
    block.progress = true;
    while ((barrier.phase & 1) == parity) swapcontext(&context, &block.scheduler);
    block.progress = true;
  }
  void wait_filled(int stage, uint32_t parity) { wait_phase(shared.filled[stage], parity); }
  void wait_free(int stage, uint32_t parity) { wait_phase(shared.free[stage], parity); }
  void publish(int stage) { shared.filled[stage].arrive(); }
  void release(int stage) {
    if (lane() == 0) shared.free[stage].arrive();
  }
  void produces() const {}
  void consumes() const {}

  void begin_group() {
    meet(warpgroup().meeting, [&] { warpgroup().fenced = true; });
  }
  void end_group() {
    meet(warpgroup().meeting, [&] {
      warpgroup().at_work.push_back(std::move(warpgroup().group));
      warpgroup().group.clear();
      warpgroup().fenced = false;
    });
  }
  template <int most>
  void wait_groups() {
    meet(warpgroup().meeting, [&] { warpgroup().finish(most); });
  }

  template <class Sums>
  void hold(const Sums&) const {}

  uint32_t operand(const unsigned char* memory) const {
    return descriptor_low(uint32_t(memory - warpgroup().shared) + kSharedAddress);
  }
  template <Dtype kOperand, int tiles>
  void multiply(float (&d)[tiles][4], const uint32_t (&a)[4], uint32_t b, bool add) {
    Issued& next = warpgroup().next;
    next.operand = kOperand;
    next.add = add;
    next.tiles = tiles;
    next.b = b;
    next.d[thread() % kWarpgroup] = &d[0][0];
    next.a[thread() % kWarpgroup] = a;
    meet(warpgroup().meeting, [&] { warpgroup().issue(); });
  }

  void load_four(const float* from, float (&value)[4]) const {
    if (reinterpret_cast<uintptr_t>(from) % 16) fail("a load is not aligned");
    std::memcpy(value, from, sizeof value);
  }
  void store_outputs(const Matrix& y, int64_t m, int64_t n, const float (&v)[4]) const {
    const int64_t bytes = y.dtype == Dtype::float32 ? 16 : 8;
    const int64_t at = m * y.row_stride + n;
    if ((reinterpret_cast<uintptr_t>(y.data) + at * bytes / 4) % bytes) fail("a store is not aligned");
    for (int i = 0; i < 4; ++i) write_element(y, m, n + i, v[i]);
  }
};

// The product of a call; `scratch` is aligned.
template <class C>
void run_wide(const Dense& call, void* scratch) {
  std::memset(scratch, 0xFF, wide_scratch_of<C>(call));
  for_each_part<C>(call, scratch, [](const WidePlan& plan) {
    run_pack(plan.packing);
    for (uint32_t x = 0; x < std::min(plan.product.tiles, kSimulatedBlocks); ++x)
      run_threads<HostHopper>(
          kWideThreads, C::kSharedBytes, x, 0, 0,
          [&](HostHopper& lane, unsigned char* shared) { wide_block<C>(plan.product, lane, shared); });
    if (plan.partial_bytes) run_finish(plan.product.finish);
    return 0;
  });
}

}  // namespace
