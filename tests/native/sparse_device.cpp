// Runs the cases of sparse_cases.h on a GPU, twice each. Prints the number of cases.
#include "device_runs.h"
#include "sparse_cases.h"

namespace {

void execute(const Sparse& call) {
  const int64_t limit = shared_limit();
  const size_t bytes = call.batch * call.y.row_stride * (call.y.dtype == Dtype::float32 ? 4 : 2);
  run_turns(sparse_scratch(call, limit), call.y.data, bytes,
            [&](void* scratch) { return sparse_product(call, limit, scratch, nullptr); });
}

}  // namespace

int main() {
  use_pinned_memory();
  std::printf("%lld cases\n", (long long)check_sparse_cases(execute, 4300));
}
