// Runs the cases of sparse_cases.h on a GPU, twice each, and once more for each way that a GPU with less
// shared memory takes: with the same bits. Prints the number of cases.
#include <set>

#include "../../csrc/cuda/sparse_plan.h"
#include "device_runs.h"
#include "sparse_cases.h"

namespace {

// Which kernels serve a call.
std::string way_of(const Sparse& call, int64_t limit) {
  if (call.transposed) return "transposed";
  return with_plan(
      call, limit,
      [&]<class T>(const ForwardPlan& plan) {
        if (plan.shared_bytes > limit) fail("more shared memory than there is");
        return std::to_string(T::kRows) + (plan.scratch_bytes ? " rows, columns" : " rows");
      },
      []() -> std::string { fail("no kernel has room"); });
}

void execute(const Sparse& call, std::set<std::string>& ways) {
  const size_t bytes = call.batch * call.y.row_stride * (call.y.dtype == Dtype::float32 ? 4 : 2);
  const auto* y = static_cast<const unsigned char*>(call.y.data);
  std::vector<unsigned char> first;
  std::set<std::string> taken;
  for (const int64_t kilobytes : {227, 163, 99}) {  // of sm_90, sm_80 and sm_89
    const int64_t limit = std::min(kilobytes << 10, shared_limit());
    if (!taken.insert(way_of(call, limit)).second) continue;
    std::memset(call.y.data, 0xFF, bytes);
    run_turns(sparse_scratch(call, limit), call.y.data, bytes,
              [&](void* scratch) { return sparse_product(call, limit, scratch, nullptr); });
    if (first.empty()) first.assign(y, y + bytes);
    if (std::memcmp(first.data(), y, bytes) != 0) fail("another limit of shared memory gave other bits");
  }
  ways.merge(taken);
}

}  // namespace

int main() {
  use_pinned_memory();
  std::set<std::string> ways;
  const int64_t cases = check_sparse_cases([&](const Sparse& call) { execute(call, ways); });
  if (shared_limit() >= 163 << 10 && ways.size() != 6) fail("ways: " + std::to_string(ways.size()));
  std::printf("%lld cases\n", (long long)cases);
}
