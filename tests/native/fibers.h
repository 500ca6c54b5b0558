// A block of CUDA threads on a host: every thread is a fiber, which yields where it must wait for others.
//
// Who goes first, and which warps stand still for a while, is drawn. Shared memory starts as NaN, and a block
// whose threads wait for each other for ever fails. fail(text) is the includer's.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/product.h"

[[noreturn]] void fail(const std::string& what);

namespace {

struct Meeting {
  int size, arrived = 0, round = 0;
};

struct ThreadBlock {
  uint32_t x, y, z;
  Meeting all;
  std::vector<Meeting> warps;
  std::vector<uint32_t> posted;  // by each thread, for from_lane
  ucontext_t scheduler{};
  bool progress = false;

  ThreadBlock(int threads, uint32_t x, uint32_t y, uint32_t z)
      : x(x),
        y(y),
        z(z),
        all{threads},
        warps(threads / nmkern::cuda::kLanes, {nmkern::cuda::kLanes}),
        posted(threads) {}
};

// The Machine of csrc/cuda/threads.h.
struct HostThread {
  using Shared = ThreadBlock;  // what the threads of a block share
  ThreadBlock& block;
  int thread_;
  ucontext_t context{};
  std::unique_ptr<char[]> stack;
  bool done = false;

  HostThread(ThreadBlock& block, int thread) : block(block), thread_(thread) {}

  int thread() const { return thread_; }
  int lane() const { return thread_ % nmkern::cuda::kLanes; }
  uint32_t block_x() const { return block.x; }
  uint32_t block_y() const { return block.y; }
  uint32_t block_z() const { return block.z; }

  // The last to arrive calls last().
  template <class Last>
  void meet(Meeting& meeting, const Last& last) {
    const int round = meeting.round;
    block.progress = true;
    if (++meeting.arrived == meeting.size) {
      last();
      meeting.arrived = 0;
      ++meeting.round;
    }
    while (meeting.round == round) swapcontext(&context, &block.scheduler);
  }
  void meet(Meeting& meeting) {
    meet(meeting, [] {});
  }
  void wait() { meet(block.all); }
  void await_previous() const {}  // blocks run one after the other
  void wait_warp() { meet(block.warps[thread_ / nmkern::cuda::kLanes]); }

  template <class Value>
  Value from_lane(Value value, int lane) {
    static_assert(sizeof(Value) == 4);
    std::memcpy(&block.posted[thread_], &value, 4);
    wait_warp();
    const int first = thread_ / nmkern::cuda::kLanes * nmkern::cuda::kLanes;
    std::memcpy(&value, &block.posted[first + (lane & (nmkern::cuda::kLanes - 1))], 4);
    wait_warp();
    return value;
  }

  void add(uint32_t* to, uint32_t value) const { *to += value; }
  void set_bits(uint32_t* to, uint32_t bits) const { *to |= bits; }
  void maximum(uint32_t* to, uint32_t value) const { *to = std::max(*to, value); }

  static float rounded_sum(float a, float b) { return a + b; }
  static float rounded_product(float a, float b) { return a * b; }
  static float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
};

template <class Thread, class Body>
struct Fiber {
  const Body* body;
  Thread* thread;
  unsigned char* shared;

  static void enter(unsigned high, unsigned low) {
    const auto& fiber = *reinterpret_cast<Fiber*>(uintptr_t{high} << 32 | low);
    (*fiber.body)(*fiber.thread, fiber.shared);
    fiber.thread->done = fiber.thread->block.progress = true;
    swapcontext(&fiber.thread->context, &fiber.thread->block.scheduler);
  }
};

// body(thread, shared) of every thread of a block.
template <class Thread = HostThread, class Body>
void run_threads(int threads, int64_t shared_bytes, uint32_t x, uint32_t y, uint32_t z, const Body& body) {
  constexpr size_t kStack = 256 << 10;
  typename Thread::Shared block(threads, x, y, z);
  std::vector<float> shared(shared_bytes / 4 + 32, std::numeric_limits<float>::quiet_NaN());
  const auto at = reinterpret_cast<uintptr_t>(shared.data());
  auto* aligned = reinterpret_cast<unsigned char*>((at + 127) & ~uintptr_t{127});
  std::vector<std::unique_ptr<Thread>> all;
  std::vector<Fiber<Thread, Body>> fibers(threads);
  for (int thread = 0; thread < threads; ++thread) {
    all.emplace_back(new Thread(block, thread));
    Thread& here = *all.back();
    fibers[thread] = {&body, &here, aligned};
    here.stack.reset(new char[kStack]);
    getcontext(&here.context);
    here.context.uc_stack.ss_sp = here.stack.get();
    here.context.uc_stack.ss_size = kStack;
    here.context.uc_link = nullptr;
    const auto fiber = reinterpret_cast<uintptr_t>(&fibers[thread]);
    makecontext(&here.context, reinterpret_cast<void (*)()>(&Fiber<Thread, Body>::enter), 2,
                unsigned(fiber >> 32), unsigned(fiber));
  }
  static std::mt19937 random(3);
  uint32_t late = 0;  // warps, for some passes
  bool everyone = false;
  for (int pass = 0, left = 1; left; ++pass) {
    if (pass % 16 == 0) late = uint32_t(random());
    left = block.progress = false;
    for (int turn = 0; turn < threads; ++turn) {
      const int at = pass % 2 ? threads - 1 - turn : turn;
      if (all[at]->done) continue;
      left = true;
      if (everyone || !(late >> at / nmkern::cuda::kLanes & 1))
        swapcontext(&block.scheduler, &all[at]->context);
    }
    if (left && !block.progress && everyone) fail("threads wait for each other");
    everyone = !block.progress;
  }
}

}  // namespace
