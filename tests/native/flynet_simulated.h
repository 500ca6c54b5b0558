// The fused FlyNet's kernels on a host, launch by launch, as csrc/cuda/flynet.cu does it on a device.
#pragma once

#include "../../csrc/cuda/flynet_plan.h"
#include "fibers.h"

namespace {

using namespace nmkern;
using namespace nmkern::cuda;

constexpr NormalTable kFlyTable = normal_table();

// The thread with the table of codes.
struct FlyThread {
  HostThread& host;

  int thread() const { return host.thread(); }
  int lane() const { return host.lane(); }
  uint32_t block_x() const { return host.block_x(); }
  uint32_t block_y() const { return host.block_y(); }
  void wait() { host.wait(); }
  template <class Value>
  Value from_lane(Value value, int lane) {
    return host.from_lane(value, lane);
  }
  void add(uint32_t* to, uint32_t value) const { host.add(to, value); }
  const NormalTable& table() const { return kFlyTable; }

  static float rounded_sum(float a, float b) { return HostThread::rounded_sum(a, b); }
  static float rounded_product(float a, float b) { return HostThread::rounded_product(a, b); }
  static float multiply_add(float a, float b, float c) { return HostThread::multiply_add(a, b, c); }
};

template <class Body>
void run_fly(int threads, int64_t shared_bytes, int64_t blocks_x, int64_t blocks_y, const Body& body) {
  for (uint32_t y = 0; y < blocks_y; ++y)
    for (uint32_t x = 0; x < blocks_x; ++x)
      run_threads(threads, shared_bytes, x, y, 0, [&](HostThread& host, unsigned char* shared) {
        FlyThread thread{host};
        body(thread, shared);
      });
}

// The scratch is flynet_scratch's.
inline void run_flynet(const FlyNet& net, void* scratch, int64_t aim = kSparseBlocks) {
  if (net.batch == 0) return;
  FlyPlan plan = plan_of(net, aim);
  float* partial = plan.place(scratch);
  std::memset(plan.drawing.counts, 0, plan.counts_bytes);
  run_fly(kDrawThreads, 0, plan.draw_blocks(), 1,
          [&](FlyThread& t, unsigned char*) { draw_block<FlyTile>(plan.drawing, t); });
  if (!is_backward(net)) {
    const Logits logits = logits_of(net, plan, partial);
    run_fly(kTileThreads, plan.shared_bytes, plan.row_groups, plan.splits,
            [&](FlyThread& t, unsigned char* shared) { logits_block(logits, t, shared); });
    const FinishLogits finish = finish_of(net, logits, plan.splits);
    for (int64_t m = 0; m < net.batch; ++m)
      for (int64_t c = 0; c < net.classes; ++c) finish_logit<FlyThread>(finish, m, c);
    return;
  }
  const GainGrad grad = gain_grad_of(net, plan, partial);
  const int64_t values = grad.rows * net.hidden;
  if (grad.rows > 1 && !grad.each) std::memset(grad.result, 0, plan.splits * values * 4);
  run_fly(kTileThreads, plan.shared_bytes, plan.splits, plan.unit_groups,
          [&](FlyThread& t, unsigned char* shared) { gain_grad_block(grad, t, shared); });
  if (plan.partial_bytes == 0) return;
  for (int64_t i = 0; i < values; ++i)
    finish_gain_grad<FlyThread>({partial, plan.splits, values, net.gain_grad.data}, i);
}

}  // namespace
