// The sparse projection's kernels on a host, launch by launch, as csrc/cuda/sparse.cu does it on a device.
#pragma once

#include "../../csrc/cuda/sparse_plan.h"
#include "fibers.h"

namespace {

using namespace nmkern;
using namespace nmkern::cuda;

struct RunForward {
  void* scratch;

  template <class T>
  int operator()(ForwardPlan plan) const {
    if (plan.scratch_bytes) {
      plan.forward.columns = plan.drawing.columns = static_cast<uint32_t*>(scratch);
      for (uint32_t x = 0; x * int64_t{kDrawThreads} < plan.drawing.stride; ++x)
        run_threads(kDrawThreads, 0, x, 0, 0,
                    [&](HostThread& t, unsigned char*) { draw_block<T>(plan.drawing, t); });
    }
    for (uint32_t y = 0; y < plan.blocks_y; ++y)
      for (uint32_t x = 0; x < plan.blocks_x; ++x)
        run_threads(kTileThreads, plan.shared_bytes, x, y, 0,
                    [&](HostThread& t, unsigned char* shared) { forward_block<T>(plan.forward, t, shared); });
    return 0;
  }
};

// The scratch is sparse_scratch's.
inline int run_sparse(const Sparse& call, int64_t shared_bytes, void* scratch, int64_t aim = kSparseBlocks) {
  if (call.batch == 0) return 0;
  if (!call.transposed)
    return with_plan(
        call, shared_bytes, RunForward{scratch}, []() -> int { fail("no kernel has room"); }, aim);
  TransposedPlan plan = transposed_plan_of(call);
  plan.place(scratch);
  std::memset(plan.prepare.bits, 0, plan.bits_bytes);
  for (uint32_t x = 0; x < plan.prepare_blocks; ++x)
    run_threads(kDrawThreads, kPrepareBytes, x, 0, 0, [&](HostThread& t, unsigned char* shared) {
      prepare_block(plan.prepare, t, reinterpret_cast<float*>(shared));
    });
  for (uint32_t y = 0; y < plan.blocks_y; ++y)
    for (uint32_t x = 0; x < plan.blocks_x; ++x)
      run_threads(kColumnThreads, kColumnBytes, x, y, 0,
                  [&](HostThread& t, unsigned char* shared) { column_block(plan.columns, t, shared); });
  return 0;
}

}  // namespace
