// Runs the cases of flynet_cases.h on a GPU, twice each. Prints the number of cases.
#include "device_runs.h"
#include "flynet_cases.h"

namespace {

void execute(const FlyNet& net) {
  const Matrix& y = net.logits;
  const bool backward = net.gain_grad.data;
  void* result = backward ? static_cast<void*>(net.gain_grad.data) : y.data;
  const size_t bytes = backward ? net.gain_grad.rows * net.hidden * 4
                                : net.batch * y.row_stride * (y.dtype == Dtype::float32 ? 4 : 2);
  run_turns(flynet_scratch(net, shared_limit()), result, bytes,
            [&](void* scratch) { return flynet_sweep(net, scratch, nullptr); });
}

}  // namespace

int main() {
  use_pinned_memory();
  std::printf("%lld cases\n", (long long)check_flynet_cases(execute));
}
