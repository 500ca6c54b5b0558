// What csrc/cuda/sparse_bindings.cpp calls, on a host: see cuda_simulated.cpp.
#include <stdexcept>

#include "../../csrc/cuda/device.h"
#include "sparse_simulated.h"

int simulated_launch(const void* scratch, const void* stream);

namespace nmkern::cuda {

int shared_bytes(int, int64_t* bytes) {
  *bytes = 99 << 10;
  return 0;
}

int64_t sparse_scratch(const Sparse& call, int64_t limit) { return scratch_of(call, limit); }

int sparse_product(const Sparse& call, int64_t limit, void* scratch, void* stream) {
  if (const int error = simulated_launch(scratch, stream)) return error;
  return run_sparse(call, limit, scratch);
}

}  // namespace nmkern::cuda
