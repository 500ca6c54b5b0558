// The sparse projection of the CUDA library as an operator. What its kernels have no room for goes on to
// Triton's.
#include "operators.h"
#include "sparse.h"

namespace nmkern::cuda {
namespace {

Tensor sparse_matmul(const Tensor& x, int64_t seed, int64_t row_offset, int64_t col_offset, int64_t rows,
                     int64_t cols, int64_t population, int64_t fan_in, bool transposed, double factor) {
  auto call = projection_of<Sparse>(seed, row_offset, col_offset, rows, cols, population, fan_in, transposed,
                                    factor);
  call.batch = x.size(0);
  const int32_t device = x.get_device_index();
  const int64_t shared = shared_of(device);
  const int64_t bytes = sparse_scratch(call, shared);
  if (bytes < 0) {
    const auto found = by_triton("nmkern::triton_sparse_matmul", x, seed, row_offset, col_offset, rows, cols,
                                 population, fan_in, transposed, factor);
    return torch::stable::detail::to<Tensor>(found[0]);
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  call.x = matrix_of(x, "x", call.batch, call.inputs());
  Tensor y = empty(x, call.batch, call.outputs());
  call.y = matrix_of(y, "y", call.batch, call.outputs());
  const Scratch scratch(x, bytes);
  check(sparse_product(call, shared, scratch.data, current_stream(device)), "launching a kernel");
  return y;
}

}  // namespace
}  // namespace nmkern::cuda

STABLE_TORCH_LIBRARY_IMPL(nmkern, CUDA, m) {
  m.impl("cuda_sparse_matmul", TORCH_BOX(&nmkern::cuda::sparse_matmul));
}

// Null, or what is wrong.
extern "C" __attribute__((visibility("default"))) const char* nmkern_cuda_sparse_fits(
    int device, int64_t batch, int64_t rows, int64_t cols, int64_t fan_in, bool transposed, bool* fits) {
  int64_t bytes = 0;
  if (const int error = nmkern::cuda::shared_bytes(device, &bytes)) return nmkern::cuda::error_text(error);
  nmkern::cuda::Sparse call{};
  call.batch = batch;
  call.rows = rows;
  call.cols = cols;
  call.fan_in = fan_in;
  call.transposed = transposed;
  *fits = nmkern::cuda::sparse_scratch(call, bytes) >= 0;
  return nullptr;
}
