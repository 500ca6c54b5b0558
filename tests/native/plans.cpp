// What the host decides for the dense CUDA kernels: how often reductions are split, how blocks fill a GPU; and
// the hash in the parts that kernels compute it in.
#include <bit>
#include <cmath>
#include <cstring>

#include "../../csrc/cuda/wide_plan.h"
#include "skinny_cases.h"

namespace {

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

void check_wide_tiles() {
  const Dense large = large_call(128, int64_t{1} << 18, Dtype::float32);  // of 128 MiB in float16
  const int64_t blocks =
      with_wide_config(large, [&]<class C>() { return wide_plan_of<C>(large).product.tiles; });
  if (blocks < 66) fail("a large x leaves " + std::to_string(blocks) + " blocks");
}

}  // namespace

int main() {
  check_hash();
  check_splits();
  check_rounds();
  check_wide_tiles();
  std::puts("passed");
}
