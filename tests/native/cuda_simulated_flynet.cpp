// What csrc/cuda/flynet_bindings.cpp calls, on a host: see cuda_simulated.cpp.
#include "flynet_simulated.h"

int simulated_launch(const void* scratch, const void* stream);

namespace nmkern::cuda {

int64_t flynet_scratch(const FlyNet& net, int64_t limit) { return scratch_of(net, limit); }

int flynet_sweep(const FlyNet& net, void* scratch, void* stream) {
  if (const int error = simulated_launch(scratch, stream)) return error;
  run_flynet(net, scratch);
  return 0;
}

}  // namespace nmkern::cuda
