// Runs the sparse projection's own CUDA code on a host and holds it to the definition. Prints the number of cases
// and of ways to run one.
#include <set>

#include "sparse_cases.h"
#include "sparse_simulated.h"

namespace {

constexpr int64_t kLimits[] = {99 << 10, 163 << 10, 227 << 10};  // of sm_89, sm_80 and sm_90

void execute(const Sparse& call, std::set<std::string>& ways) {
  std::vector<unsigned char> first;
  const int64_t y_bytes = call.batch * call.y.row_stride * (call.y.dtype == Dtype::float32 ? 4 : 2);
  for (const int64_t limit : kLimits) {
    const int64_t bytes = scratch_of(call, limit);
    if (bytes < 0) fail("no kernel has room");
    Buffer<uint32_t> scratch(bytes / 4 + 4, 0xFFFFFFFFu);
    std::memset(call.y.data, 0xFF, y_bytes);
    run_sparse(call, limit, reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch.data()) + 15) & ~uintptr_t{15}));
    const auto* at = static_cast<unsigned char*>(call.y.data);
    if (first.empty()) first.assign(at, at + y_bytes);
    if (std::memcmp(first.data(), at, y_bytes) != 0) fail("another limit of shared memory gave other bits");
    if (call.transposed)
      ways.insert("transposed");
    else
      with_plan(
          call, limit,
          [&]<class T>(const ForwardPlan& plan) {
            if (plan.shared_bytes > limit) fail("more shared memory than there is");
            ways.insert(std::to_string(T::kRows) + (plan.scratch_bytes ? " rows, columns" : " rows"));
            return 0;
          },
          [] { return 0; });
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

}  // namespace

int main() {
  check_limits();
  std::set<std::string> ways;
  const int64_t cases = check_sparse_cases([&](const Sparse& call) { execute(call, ways); });
  std::printf("%lld cases, %zu ways\n", (long long)cases, ways.size());
}
