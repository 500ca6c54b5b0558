// CUDA's runtime asked about devices; device.h says what and why.
#include "device.h"

#include <cuda_runtime_api.h>

#include <atomic>

namespace nmkern::cuda {
namespace {

constexpr int kDevices = 64;
// An answer and 1, for each device that was asked about: asking takes two calls of the runtime.
std::atomic<int64_t> known[kDevices];
std::atomic<int64_t> forced{0};
std::atomic<int64_t> known_shared[kDevices];

}  // namespace

const char* built_archs() { return NMKERN_CUDA_ARCHS; }

void set_most_rows(int64_t rows) { forced = rows; }

int most_rows(int device, int64_t* rows) {
  const bool kept = device >= 0 && device < kDevices;
  int64_t found = kept ? known[device].load(std::memory_order_relaxed) : 0;
  if (found == 0) {
    int major = 0, minor = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error != cudaSuccess) return error;
    found = 1 + (serves(NMKERN_CUDA_ARCHS, major, minor) ? rows_of(major) : 0);
    if (kept) known[device].store(found, std::memory_order_relaxed);
  }
  const int64_t other = forced.load(std::memory_order_relaxed);
  *rows = found > 1 && other > 0 ? other : found - 1;
  return cudaSuccess;
}

int shared_bytes(int device, int64_t* bytes) {
  const bool kept = device >= 0 && device < kDevices;
  int64_t found = kept ? known_shared[device].load(std::memory_order_relaxed) : 0;
  if (found == 0) {
    int major = 0, minor = 0, most = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    found = 1 + (serves(NMKERN_CUDA_ARCHS, major, minor) ? most : 0);
    if (kept) known_shared[device].store(found, std::memory_order_relaxed);
  }
  *bytes = found - 1;
  return cudaSuccess;
}

const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace nmkern::cuda
