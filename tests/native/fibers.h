// A block of CUDA threads on a host: every thread is a fiber, which yields where it must wait for others.
//
// Whose turn is first changes from turn to turn. Shared memory starts as NaN, and a block whose threads wait
// for each other for ever fails. fail(text) is the includer's.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cuda/product.h"

[[noreturn]] void fail(const std::string& what);

namespace {

struct Meeting {
  int size, arrived = 0, round = 0;
};

struct ThreadBlock {
  uint32_t x, y;
  ucontext_t scheduler;
  Meeting all;
  std::vector<Meeting> warps;
  std::vector<uint32_t> posted;  // by each thread, for from_lane
  bool progress = false;
};

// The Machine of csrc/cuda/threads.h.
struct HostThread {
  ThreadBlock& block;
  int thread_;
  ucontext_t context{};
  std::unique_ptr<char[]> stack;
  bool done = false;

  int thread() const { return thread_; }
  int lane() const { return thread_ % nmkern::cuda::kLanes; }
  uint32_t block_x() const { return block.x; }
  uint32_t block_y() const { return block.y; }

  void meet(Meeting& meeting) {
    const int round = meeting.round;
    block.progress = true;
    if (++meeting.arrived == meeting.size) {
      meeting.arrived = 0;
      ++meeting.round;
    }
    while (meeting.round == round) swapcontext(&context, &block.scheduler);
  }
  void wait() { meet(block.all); }
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

  static float rounded_sum(float a, float b) { return a + b; }
  static float rounded_product(float a, float b) { return a * b; }
  static float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
};

template <class Body>
struct Fiber {
  const Body* body;
  HostThread* thread;
  unsigned char* shared;

  static void enter(unsigned high, unsigned low) {
    const auto& fiber = *reinterpret_cast<Fiber*>(uintptr_t{high} << 32 | low);
    (*fiber.body)(*fiber.thread, fiber.shared);
    fiber.thread->done = fiber.thread->block.progress = true;
    swapcontext(&fiber.thread->context, &fiber.thread->block.scheduler);
  }
};

// body(thread, shared) of every thread of a block.
template <class Body>
void run_threads(int threads, int64_t shared_bytes, uint32_t x, uint32_t y, const Body& body) {
  constexpr size_t kStack = 64 << 10;
  ThreadBlock block{.x = x, .y = y, .scheduler = {}, .all = {threads}, .warps = {}, .posted = {}};
  block.warps.assign(threads / nmkern::cuda::kLanes, {nmkern::cuda::kLanes});
  block.posted.resize(threads);
  std::vector<float> shared(shared_bytes / 4 + 32, std::numeric_limits<float>::quiet_NaN());
  const auto at = reinterpret_cast<uintptr_t>(shared.data());
  auto* aligned = reinterpret_cast<unsigned char*>((at + 127) & ~uintptr_t{127});
  std::vector<std::unique_ptr<HostThread>> all;
  std::vector<Fiber<Body>> fibers(threads);
  for (int thread = 0; thread < threads; ++thread) {
    all.emplace_back(new HostThread{block, thread});
    HostThread& here = *all.back();
    fibers[thread] = {&body, &here, aligned};
    here.stack.reset(new char[kStack]);
    getcontext(&here.context);
    here.context.uc_stack.ss_sp = here.stack.get();
    here.context.uc_stack.ss_size = kStack;
    here.context.uc_link = nullptr;
    const auto fiber = reinterpret_cast<uintptr_t>(&fibers[thread]);
    makecontext(&here.context, reinterpret_cast<void (*)()>(&Fiber<Body>::enter), 2, unsigned(fiber >> 32),
                unsigned(fiber));
  }
  for (bool left = true, forward = true; left; forward = !forward) {
    left = block.progress = false;
    for (int turn = 0; turn < threads; ++turn) {
      HostThread& thread = *all[forward ? turn : threads - 1 - turn];
      if (thread.done) continue;
      swapcontext(&block.scheduler, &thread.context);
      left = true;
    }
    if (left && !block.progress) fail("threads wait for each other");
  }
}

}  // namespace
