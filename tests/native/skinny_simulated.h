// The CUDA kernels' own code on a host, block by block: no GPU is needed.
//
// mma.sync places the registers of the 32 lanes in A, B and C by the layout that the PTX manual documents,
// and multiplies. Sums are truncated as tensor cores do. Partial sums start as NaN.
#pragma once

#include "../../csrc/cuda/skinny_plan.h"
#include "fibers.h"

namespace {

using namespace nmkern;
using namespace nmkern::cuda;

// The double towards zero as a float.
inline float truncated(double sum) {
  const auto nearest = float(sum);
  return std::abs(double{nearest}) > std::abs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}

struct WarpState {
  uint32_t a[kLanes][4], b[kLanes][2];
  double product[16][8];

  void multiply(Dtype operand) {
    double left[16][16], right[16][8];
    for (int lane = 0; lane < kLanes; ++lane)
      for (int e = 0; e < 2; ++e) {
        const auto value = [&](uint32_t reg) { return float_of_half(uint16_t(reg >> 16 * e), operand); };
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

struct WarpBlock : ThreadBlock {
  std::vector<WarpState> states;
  WarpBlock(int threads, uint32_t x, uint32_t y, uint32_t z)
      : ThreadBlock(threads, x, y, z), states(threads / kLanes) {}
};

struct HostLane : HostThread {
  using Shared = WarpBlock;
  WarpBlock& block;

  HostLane(WarpBlock& block, int thread) : HostThread(block, thread), block(block) {}

  const NormalTable& table() const { return kTable; }

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

  template <class Part>
  void keep(const Part&) const {}

  template <Dtype kOperand>
  void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    WarpState& warp = block.states[thread_ / kLanes];
    std::memcpy(warp.a[lane()], a, sizeof a);
    std::memcpy(warp.b[lane()], b, sizeof b);
    meet(block.warps[thread_ / kLanes], [&] { warp.multiply(kOperand); });
    for (int reg = 0; reg < 4; ++reg)
      c[reg] = truncated(double{c[reg]} + warp.product[c_row(lane(), reg)][c_col(lane(), reg)]);
  }

  void load_floats(const float* from, float (&value)[kPacked]) const {
    if (reinterpret_cast<uintptr_t>(from) % 16) fail("a load is not aligned");
    std::memcpy(value, from, sizeof value);
  }
  void store_packed(uint16_t* to, const uint32_t (&pair)[kPacked / 2]) const {
    if (reinterpret_cast<uintptr_t>(to) % 16) fail("a store is not aligned");
    std::memcpy(to, pair, sizeof pair);
  }

  void store(float* to, float a, float b, float c, float d) const {
    if (reinterpret_cast<uintptr_t>(to) % 16) fail("a store is not aligned");
    const float values[] = {a, b, c, d};
    std::memcpy(to, values, sizeof values);
  }
};

struct AlignedScratch {
  static constexpr uint32_t kGuard = 0x5A17F00D;
  std::vector<unsigned char> storage;
  unsigned char* data;
  int64_t bytes;

  explicit AlignedScratch(int64_t bytes) : storage(bytes + kAlignment + 4), bytes(bytes) {
    data = reinterpret_cast<unsigned char*>(aligned_up(int64_t(reinterpret_cast<uintptr_t>(storage.data()))));
    std::memcpy(data + bytes, &kGuard, 4);
  }
  ~AlignedScratch() {
    if (std::memcmp(data + bytes, &kGuard, 4)) fail("scratch is written past its end");
  }
};

// The stages of a gradient, as launch_gradient.
template <Gradient kind>
void run_gradient(const Finish& f) {
  const auto chunks = uint32_t(chunks_of(f.batch));
  const auto outputs = uint32_t(ceil_div(f.outputs, kLanes));
  for (uint32_t x = 0; index_bytes(f) && x < chunks; ++x)
    run_threads<HostLane>(kGradientThreads, sizeof(IndexShared), x, 0, 0,
                          [&](HostLane& lane, unsigned char* shared) { index_rows(f, lane, shared); });
  for (uint32_t block = outputs * chunks; block-- > 0;)
    run_threads<HostLane>(
        gradient_threads(f), gradient_shared_bytes(kind), block % outputs, block / outputs, 0,
        [&](HostLane& lane, unsigned char* shared) { finish_with_gradient<kind>(f, lane, shared); });
  if constexpr (kind != Gradient::of_each) {
    WarpBlock none(kGradientThreads, 0, 0, 0);
    for (int64_t y = gather_rows(f); y-- > 0;)
      for (int64_t x = 0; x < gather_blocks_x(f); ++x)
        for (int thread = 0; thread < kGradientThreads; ++thread)
          gather<kind>(f, HostLane(none, thread), x, y);
  }
}

// The second stage, as launch_finish.
inline void run_finish(const Finish& f) {
  if (f.gain_grad.data) {
    switch (gradient_of(f)) {
      case Gradient::of_one:
        return run_gradient<Gradient::of_one>(f);
      case Gradient::of_each:
        return run_gradient<Gradient::of_each>(f);
      case Gradient::by_context:
        return run_gradient<Gradient::by_context>(f);
    }
  }
  WarpBlock none(kLanes, 0, 0, 0);
  const bool one = rows_at_once(f) == 1;
  for (int64_t at = 0; at < (one ? f.batch : ceil_div(f.batch, kRowsAtOnce)) * f.outputs; ++at)
    one ? finish_thread<1>(f, HostLane(none, 0), at) : finish_thread<kRowsAtOnce>(f, HostLane(none, 0), at);
}

// Packing, as launch_pack, where there is any.
inline void run_pack(const Packing& packing) {
  const Pack& p = packing.pack;
  WarpBlock none(kPackThreads, 0, 0, 0);
  for (int64_t at = 0; packing.packed && !p.scaled && at < p.count(); ++at)
    pack_copy(p, HostLane(none, 0), at);
  for (uint32_t row = 0; packing.packed && p.scaled && row < p.batch; ++row)
    run_threads<HostLane>(kPackThreads, 4, row, 0, 0, [&](HostLane& lane, unsigned char* shared) {
      pack_row(p, lane, reinterpret_cast<uint32_t*>(shared));
    });
}

// The product of a call; `scratch` is aligned.
template <class C>
void run_product(const Dense& call, void* scratch) {
  Plan plan = plan_of<C>(call);
  std::memset(scratch, 0xFF, plan.scratch_bytes());
  place(plan, call, scratch);
  run_pack(plan.packing);
  for (uint32_t z = 0; z < plan.blocks_z; ++z)
    for (uint32_t y = 0; y < plan.splits; ++y)
      for (uint32_t x = 0; x < plan.blocks_x; ++x)
        run_threads<HostLane>(
            C::kThreads, C::kSharedBytes, x, y, z,
            [&](HostLane& lane, unsigned char* shared) { skinny_block<C>(plan.product, lane, shared); });
  run_finish(plan.finish);
}

}  // namespace
