// The CUDA kernels' own code on a host, block by block: no GPU is needed.
//
// Every lane is a fiber; a fiber that must wait for others (__syncthreads, mma.sync) yields. mma.sync
// places the registers of the 32 lanes in A, B and C by the layout that the PTX manual documents, and
// multiplies. Shared memory and partial sums start as NaN. fail(text) is the includer's.
#pragma once

#include <ucontext.h>

#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/skinny_plan.h"

[[noreturn]] void fail(const std::string& what);

namespace {

using namespace nmkern;
using namespace nmkern::cuda;

struct Barrier {
  int size, arrived = 0, round = 0;
};

struct WarpState {
  Barrier barrier{kLanes};
  uint32_t a[kLanes][4], b[kLanes][2];
  double product[16][8];

  void multiply() {
    double left[16][16], right[16][8];
    for (int lane = 0; lane < kLanes; ++lane)
      for (int e = 0; e < 2; ++e) {
        const auto value = [e](uint32_t reg) { return float_of(e ? reg & 0xFFFF0000 : reg << 16); };
        for (int reg = 0; reg < 4; ++reg) left[a_row(lane, reg)][a_col(lane, reg, e)] = value(a[lane][reg]);
        for (int reg = 0; reg < 2; ++reg) right[b_row(lane, reg, e)][b_col(lane)] = value(b[lane][reg]);
      }
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 8; ++j) {
        product[i][j] = 0;
        for (int k = 0; k < 16; ++k) product[i][j] += left[i][k] * right[k][j];
      }
  }
};

constexpr NormalTable kTable = normal_table();

struct Block {
  uint32_t x, y, z;
  int threads;
  ucontext_t scheduler{};
  Barrier barrier{threads};
  std::vector<WarpState> warps = std::vector<WarpState>(threads / kLanes);
  bool progress = false;
};

struct HostLane {
  struct Shared : Block {};  // what the lanes of a block share
  static constexpr int kBlock = kThreads;
  Block& block;
  int thread_;
  ucontext_t context{};
  std::unique_ptr<char[]> stack;
  bool done = false;

  HostLane(Block& block, int thread) : block(block), thread_(thread) {}

  int thread() const { return thread_; }
  int lane() const { return thread_ % kLanes; }
  uint32_t block_x() const { return block.x; }
  uint32_t block_y() const { return block.y; }
  uint32_t block_z() const { return block.z; }
  const NormalTable& table() const { return kTable; }

  template <class Last>
  void meet(Barrier& barrier, const Last& last) {
    const int round = barrier.round;
    block.progress = true;
    if (++barrier.arrived == barrier.size) {
      last();
      barrier.arrived = 0;
      ++barrier.round;
    }
    while (barrier.round == round) swapcontext(&context, &block.scheduler);
  }

  void wait() {
    meet(block.barrier, [] {});
  }

  template <class C, int count>
  void load(const unsigned char* x, int first, uint32_t (&b)[count][2]) const {
    for (int i = 0; i < count; ++i) std::memcpy(b[i], x + C::x_offset(0, first + i), 8);
    // Where the device loads 16 bytes, the second pair must lie behind the first.
    if constexpr (C::kVector == 2 && count % 2 == 0)
      for (int i = 0; i < count; i += 2)
        if (C::x_offset(0, first + i + 1) != C::x_offset(0, first + i) + 8 ||
            reinterpret_cast<uintptr_t>(x + C::x_offset(0, first + i)) % 16)
          fail("a pair of pairs is no 16 bytes");
  }

  template <int pieces>
  void load_elements(const uint16_t* x, uint32_t (&element)[pieces][2]) const {
    if (reinterpret_cast<uintptr_t>(x) % (pieces % 2 ? 8 : 16)) fail("x is not aligned");
    std::memcpy(element, x, sizeof element);
  }

  void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    WarpState& warp = block.warps[thread_ / kLanes];
    std::memcpy(warp.a[lane()], a, sizeof a);
    std::memcpy(warp.b[lane()], b, sizeof b);
    meet(warp.barrier, [&] { warp.multiply(); });
    for (int reg = 0; reg < 4; ++reg)
      c[reg] = float(double{c[reg]} + warp.product[c_row(lane(), reg)][c_col(lane(), reg)]);
  }

  void store(float* to, float a, float b, float c, float d) const {
    if (reinterpret_cast<uintptr_t>(to) % 16) fail("a store is not aligned");
    const float values[] = {a, b, c, d};
    std::memcpy(to, values, sizeof values);
  }

  static float rounded_sum(float a, float b) { return a + b; }
  static float rounded_product(float a, float b) { return a * b; }
};

template <class Lane, class Body>
struct Task {
  const Body* body;
  Lane* lane;
  unsigned char* shared;

  static void enter(unsigned high, unsigned low) {
    const auto& task = *reinterpret_cast<Task*>(uintptr_t{high} << 32 | low);
    (*task.body)(*task.lane, task.shared);
    task.lane->done = task.lane->block.progress = true;
    swapcontext(&task.lane->context, &task.lane->block.scheduler);
  }
};

// body(lane, shared) of every thread of a block; the lanes' type has a Block of its own, derived from Block.
template <class Lane = HostLane, class Body>
void run_block(int shared_bytes, uint32_t x, uint32_t y, uint32_t z, const Body& body) {
  constexpr size_t kStack = 256 << 10;
  auto block = std::make_unique<typename Lane::Shared>(typename Lane::Shared{{x, y, z, Lane::kBlock}});
  constexpr int kThreads = Lane::kBlock;
  std::vector<float> shared(shared_bytes / 4 + 32, std::numeric_limits<float>::quiet_NaN());
  const auto at = reinterpret_cast<uintptr_t>(shared.data());
  auto* aligned = reinterpret_cast<unsigned char*>((at + 127) & ~uintptr_t{127});
  std::vector<std::unique_ptr<Lane>> lanes;
  std::vector<Task<Lane, Body>> tasks(kThreads);
  for (int thread = 0; thread < kThreads; ++thread) {
    lanes.emplace_back(new Lane(*block, thread));
    Lane& lane = *lanes.back();
    tasks[thread] = {&body, &lane, aligned};
    lane.stack.reset(new char[kStack]);
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.get();
    lane.context.uc_stack.ss_size = kStack;
    lane.context.uc_link = nullptr;
    const auto at = reinterpret_cast<uintptr_t>(&tasks[thread]);
    makecontext(&lane.context, reinterpret_cast<void (*)()>(&Task<Lane, Body>::enter), 2, unsigned(at >> 32),
                unsigned(at));
  }
  // Whose turn is first, and who is late, is nobody's to know: for some passes at a time, some warps stand still.
  static std::mt19937 random(3);
  uint32_t late = 0;
  bool all = false;
  for (int pass = 0, left = 1; left; ++pass) {
    if (pass % 16 == 0) late = uint32_t(random());
    left = block->progress = false;
    for (int turn = 0; turn < kThreads; ++turn) {
      const int thread = pass % 2 ? kThreads - 1 - turn : turn;
      Lane& lane = *lanes[thread];
      if (lane.done) continue;
      left = true;
      if (all || !(late >> thread / kLanes & 1)) swapcontext(&block->scheduler, &lane.context);
    }
    if (left && !block->progress && all) fail("lanes wait for each other");
    all = !block->progress;
  }
}

// The second stage, as launch_finish.
inline void run_finish(const Finish& f) {
  if (f.gain_grad.data) {
    for (uint32_t x = 0; x < ceil_div(f.outputs, kLanes); ++x)
      run_block(kFinishRows * kLanes * 4, x, 0, 0, [&](HostLane& lane, unsigned char* shared) {
        finish_with_gradient(f, lane, reinterpret_cast<float*>(shared));
      });
    return;
  }
  for (int64_t m = 0; m < f.batch; ++m)
    for (int64_t n = 0; n < f.outputs; ++n) finish_one<HostLane>(f, m, n, unmodulated<HostLane>(f, m, n));
}

// The product of a call with `partial`, 16-byte aligned, for its partial sums.
template <class C>
void run_product(const Dense& call, float* partial) {
  Plan plan = plan_of<C>(call);
  std::fill_n(partial, plan.scratch_bytes() / 4, std::numeric_limits<float>::quiet_NaN());
  plan.product.partial = partial;
  plan.finish.partial = partial;
  for (uint32_t z = 0; z < plan.blocks_z; ++z)
    for (uint32_t y = 0; y < plan.splits; ++y)
      for (uint32_t x = 0; x < plan.blocks_x; ++x)
        run_block(C::kSharedBytes, x, y, z, [&](HostLane& lane, unsigned char* shared) {
          skinny_block<C>(plan.product, lane, shared);
        });
  run_finish(plan.finish);
}

}  // namespace
