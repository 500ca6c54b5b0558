// Runs the sparse projection's own CUDA code on a host and holds it to the definition. Prints the number of
// cases and of ways to run one.
#include <set>

#include "sparse_cases.h"
#include "sparse_simulated.h"

namespace {

constexpr int64_t kLimits[] = {99 << 10, 163 << 10, 227 << 10};  // of sm_89, sm_80 and sm_90

constexpr int64_t kAim = 4;  // blocks of a launch, so that few rows make blocks take groups in order

// Which kernels serve a call.
std::string way_of(const Sparse& call, int64_t limit) {
  if (call.transposed) return "transposed";
  return with_plan(
      call, limit,
      [&]<class T>(const ForwardPlan& plan) {
        if (plan.shared_bytes > limit) fail("more shared memory than there is");
        return std::to_string(T::kRows) + (plan.scratch_bytes ? " rows, columns" : " rows");
      },
      [] { return std::string(); });
}

void execute(const Sparse& call, std::set<std::string>& ways) {
  std::vector<unsigned char> first;
  std::string last;
  const int64_t y_bytes = call.batch * call.y.row_stride * (call.y.dtype == Dtype::float32 ? 4 : 2);
  for (const int64_t limit : kLimits) {
    const int64_t bytes = scratch_of(call, limit);
    if (bytes < 0) fail("no kernel has room");
    if (way_of(call, limit) == last) continue;
    ways.insert(last = way_of(call, limit));
    Buffer<uint32_t> scratch(bytes / 4 + 4, 0xFFFFFFFFu);
    std::memset(call.y.data, 0xFF, y_bytes);
    run_sparse(call, limit,
               reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch.data()) + 15) & ~uintptr_t{15}),
               kAim);
    const auto* at = static_cast<unsigned char*>(call.y.data);
    if (first.empty()) first.assign(at, at + y_bytes);
    if (std::memcmp(first.data(), at, y_bytes) != 0) fail("another limit of shared memory gave other bits");
  }
}

// What no kernel has room for is told, not run.
void check_limits() {
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

}  // namespace

int main() {
  check_limits();
  check_banks();
  std::set<std::string> ways;
  const int64_t cases = check_sparse_cases([&](const Sparse& call) { execute(call, ways); }, 140);
  std::printf("%lld cases, %zu ways\n", (long long)cases, ways.size());
}
