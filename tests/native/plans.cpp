// What the host decides for the CUDA kernels: how often reductions are split, how blocks fill a GPU, what
// there is no room for; where shared memory's banks are met; and the hash in the parts that kernels compute
// it in.
#include <bit>
#include <cmath>
#include <cstring>
#include <set>

#include "../../csrc/cuda/fixed_plan.h"
#include "../../csrc/cuda/flynet_plan.h"
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
          const auto rounds_of = [&](const auto& plan, int warps) {
            if (6 * 2 * plan.partial_bytes > 2 * call.rows * call.cols)
              fail("partial sums are as large as W");
            return double(plan.splits * plan.blocks_x) * warps / (8 * kMultiprocessors);
          };
          const double rounds =
              is_fixed(call)
                  ? with_fixed_config(call,
                                      [&]<class C>() { return rounds_of(fixed_plan_of<C>(call), C::kWarps); })
                  : with_config(call, [&]<class C>() { return rounds_of(plan_of<C>(call), C::kWarps); });
          // A quarter of the GPU stays idle where more blocks would take as long: for what they do once.
          const bool few = outputs == 50257 && is_fixed(call);
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

// What no sparse kernel has room for is told.
void check_sparse_limits() {
  Sparse call{};
  call.rows = call.population = call.cols = int64_t{1} << 20;
  call.fan_in = 7;
  call.batch = 4;
  for (bool transposed : {false, true}) {
    call.transposed = transposed;
    if (scratch_of(call, 227 << 10) != -1) fail("there is room for everything");
  }
}

// How many bank groups of 16 bytes, of 8, the lanes that one load serves have in common at most, on average.
template <class T>
double conflicts(std::mt19937& random) {
  constexpr int kTurns = 20000;
  int64_t sum = 0;
  for (int turn = 0; turn < kTurns; ++turn) {
    int taken[8] = {}, most = 0;
    for (int unit = 0; unit < 8 / T::kChunks; ++unit) {
      const uint32_t column = random() % 784;
      for (uint32_t chunk = 0; chunk < T::kChunks; ++chunk)
        most = std::max(most, ++taken[(T::offset(column) ^ chunk * 16) / 16 % 8]);
    }
    sum += most;
  }
  return double(sum) / kTurns;
}

void check_banks() {
  std::mt19937 random(3);
  if (conflicts<Tile<32>>(random) != 1) fail("a tile of 32 rows is not read without conflicts");
  if (std::abs(conflicts<Tile<16>>(random) - 1.5) > 0.02) fail("16 rows: 1.5 is expected");
  if (std::abs(conflicts<Tile<8>>(random) - 2.125) > 0.03) fail("8 rows: 2.125 is expected");
  // Stores of stage_tile: 4 rows of 8 groups of 4 columns, the same column of each group.
  for (uint32_t i = 0; i < kEach; ++i)
    for (uint32_t chunk = 0; chunk < 8; ++chunk) {
      std::set<uint32_t> banks;
      for (uint32_t lane = 0; lane < kLanes; ++lane)
        banks.insert(((Tile<32>::offset(lane % 8 * kEach + i) ^ chunk * 16) / 4 + lane / 8) % 32);
      if (banks.size() != 32) fail("a tile of 32 rows is not stored without conflicts");
    }
}

void check_flynet() {
  FlyNet net{};
  net.inputs = 784, net.hidden = 7840, net.classes = 10, net.fan_in = 7, net.batch = 128;
  if (scratch_of(net, 99 << 10) < 0) fail("there is no room for the paper's network");
  if (plan_of(net).splits != 16) fail("the paper's network is not split in 16");
  net.batch = 4096;
  if (plan_of(net).splits != 1 || plan_of(net).block_groups != 16) fail("many rows do not fill the device");
  net.gain_grad.rows = 1;
  if (plan_of(net).splits != 8) fail("rows are not split in 8");
  net.inputs = 5000;
  if (scratch_of(net, 227 << 10) != -1) fail("there is room for everything");
}

}  // namespace

int main() {
  check_hash();
  check_splits();
  check_rounds();
  check_wide_tiles();
  check_sparse_limits();
  check_banks();
  check_flynet();
  std::puts("passed");
}
