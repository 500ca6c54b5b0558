// The CUDA library's face to PyTorch and to Python.
#include "device.h"

#define NMKERN_EXPORT extern "C" __attribute__((visibility("default")))

NMKERN_EXPORT const char* nmkern_cuda_archs() { return nmkern::cuda::built_archs(); }
// Null, or what is wrong.
NMKERN_EXPORT const char* nmkern_cuda_most_rows(int device, int64_t* rows) {
  const int error = nmkern::cuda::most_rows(device, rows);
  return error ? nmkern::cuda::error_text(error) : nullptr;
}
NMKERN_EXPORT void nmkern_cuda_set_most_rows(int64_t rows) { nmkern::cuda::set_most_rows(rows); }
