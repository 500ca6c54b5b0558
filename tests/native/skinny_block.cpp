// Runs the CUDA kernels' own code on a host and holds it to the stream. Prints the number of cases and of
// kernels.
#include <set>

#include "skinny_cases.h"
#include "skinny_simulated.h"

namespace {

// The PTX manual's "Matrix Fragments for mma.m16n8k16 with floating point type", element by element.
void check_layout() {
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
      const int col = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      if (a_row(lane, i / 2) != row || a_col(lane, i / 2, i & 1) != col) fail("layout of A");
    }
    for (int i = 0; i < 4; ++i) {
      if (b_row(lane, i / 2, i & 1) != in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)) fail("layout of B");
      if (b_col(lane) != group) fail("layout of B");
      if (c_row(lane, i) != (i < 2 ? group : group + 8)) fail("layout of C");
      if (c_col(lane, i) != in_group * 2 + (i & 1)) fail("layout of C");
    }
  }
}

struct Simulate {
  const Dense& call;
  std::set<std::string>& kernels;
  int64_t& most_splits;

  template <class C>
  void operator()() const {
    using Patch = typename C::Patch;
    char name[64];
    std::snprintf(name, sizeof name, "%x %d %d %d %d", unsigned(Patch::kFamily), Patch::kTransposed,
                  C::kBatchTiles, int(C::kOperand), C::kParts);
    kernels.insert(name);
    if (C::kParts != (call.x.dtype == Dtype::float32 ? 2 : 1)) fail("tensor cores work more than they must");
    const Plan plan = plan_of<C>(call);
    most_splits = std::max(most_splits, plan.splits);
    run_product<C>(call, AlignedScratch(plan.scratch_bytes()).data);
  }
};

// However large x is, its sums keep a GPU at work.
void check_splits() {
  for (Dtype dtype : {Dtype::float32, Dtype::bfloat16}) {
    const Dense call = large_call(16, int64_t{1} << 21, dtype);
    const int64_t blocks = with_config(call, [&]<class C>() {
      const Plan plan = plan_of<C>(call);
      return plan.splits * plan.blocks_x;
    });
    if (blocks < 132) fail("a large x leaves " + std::to_string(blocks) + " blocks");
  }
}

// The last round of blocks fills an H100, and what is written and read again stays below a sixth of what
// stored weights would be.
void check_rounds() {
  for (Family family : {Family::rademacher, Family::uniform, Family::normal})
    for (bool transposed : {false, true})
      for (int64_t outputs : {4096, 8192, 16384, 50257})
        for (int64_t batch : {1, 8, 16}) {
          Dense call = large_call(batch, outputs == 50257 ? 4096 : outputs, Dtype::bfloat16);
          call.family = family, call.transposed = transposed;
          (transposed ? call.rows : call.cols) = call.x.row_stride;
          (transposed ? call.cols : call.rows) = outputs;
          const double rounds = with_config(call, [&]<class C>() {
            const Plan plan = plan_of<C>(call);
            if (6 * 2 * plan.partial_bytes > 2 * call.rows * call.cols)
              fail("partial sums are as large as W");
            return double(plan.splits * plan.blocks_x) * C::kWarps / (8 * kMultiprocessors);
          });
          const bool few = family == Family::rademacher && outputs == 50257 && batch == 8;  // writes too much
          if (!few && rounds < 0.96 * std::ceil(rounds))
            fail("rounds: " + std::to_string(rounds) + " of " + std::to_string(outputs) + " outputs");
        }
}

void check_hash() {
  std::mt19937_64 random(2);
  for (int i = 0; i < 10000; ++i) {
    const uint32_t c0 = uint32_t(random()), c1 = uint32_t(random());
    const Key key{uint32_t(random()), uint32_t(random())};
    const RoundKeys keys = round_keys(key, Family::normal);
    const Words got = patch(row_part(c1, keys), column_part(c0, keys), keys);
    const Words want = philox4x32(c0, c1, 0, uint32_t(Family::normal), key);
    if (std::memcmp(&got, &want, sizeof got)) fail("patch is not Philox");
  }
}

}  // namespace

int main() {
  check_layout();
  check_hash();
  check_splits();
  check_rounds();
  std::set<std::string> kernels;
  int64_t most_splits = 0;
  const int64_t cases =
      check_all([&](const Dense& call) { with_config(call, Simulate{call, kernels, most_splits}); });
  if (most_splits < 3) fail("no case splits the reduction");
  if (kernels.size() != 66) fail("not every kernel ran: " + std::to_string(kernels.size()));
  std::printf("%lld cases, %zu kernels\n", (long long)cases, kernels.size());
}
