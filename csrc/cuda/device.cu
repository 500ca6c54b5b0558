// CUDA's runtime asked about devices; device.h says what and why.
#include <cuda_runtime_api.h>

#include <atomic>

#include "device.h"

namespace nmkern::cuda {
namespace {

constexpr int kDevices = 64;
// For each device that was asked about: an answer and 1 (asking takes up to two calls of the runtime).
std::atomic<int64_t> known_kernels[kDevices], known_multiprocessors[kDevices], known_shared[kDevices],
    known_overlap[kDevices];
std::atomic<int64_t> forced{-1};
std::atomic<bool> overlap_allowed{true}, fixed_allowed{true};

// What ask(&answer) tells of a device, kept.
template <class Ask>
cudaError_t kept(std::atomic<int64_t> (&known)[kDevices], int device, int64_t* answer, const Ask& ask) {
  const bool keep = device >= 0 && device < kDevices;
  if (const int64_t found = keep ? known[device].load(std::memory_order_relaxed) : 0) {
    *answer = found - 1;
    return cudaSuccess;
  }
  const cudaError_t error = ask(answer);
  if (error == cudaSuccess && keep) known[device].store(*answer + 1, std::memory_order_relaxed);
  return error;
}

// An attribute of the current device.
cudaError_t kept_here(std::atomic<int64_t> (&known)[kDevices], cudaDeviceAttr which, int64_t* answer) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  return kept(known, device, answer, [&](int64_t* found) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
    *found = value;
    return error;
  });
}

}  // namespace

const char* built_archs() { return NMKERN_CUDA_ARCHS; }

void set_small_rows(int64_t rows) { forced = rows; }

void set_overlap(bool allowed) { overlap_allowed = allowed; }

void set_fixed_point(bool allowed) { fixed_allowed = allowed; }
bool fixed_point_allowed() { return fixed_allowed.load(std::memory_order_relaxed); }

int kernels_of(int device, Kernels* kernels) {
  int64_t packed = 0;
  const cudaError_t error = kept(known_kernels, device, &packed, [&](int64_t* answer) {
    int major = 0, minor = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    const Kernels found = kernels_for(NMKERN_CUDA_ARCHS, major, minor);
    *answer = found.small_rows * 2 + found.wide;
    return error;
  });
  if (error != cudaSuccess) return error;
  *kernels = {packed / 2, packed % 2 != 0};
  const int64_t other = forced.load(std::memory_order_relaxed);
  if (kernels->small_rows > 0 && other >= 0) kernels->small_rows = other;
  return cudaSuccess;
}

int multiprocessors(int64_t* count) {
  return kept_here(known_multiprocessors, cudaDevAttrMultiProcessorCount, count);
}

int overlaps(bool* overlap) {
  int64_t major = 0;
  const int error = kept_here(known_overlap, cudaDevAttrComputeCapabilityMajor, &major);
  *overlap = major == 9 && overlap_allowed.load(std::memory_order_relaxed);
  return error;
}

int shared_bytes(int device, int64_t* bytes) {
  return kept(known_shared, device, bytes, [&](int64_t* answer) {
    Kernels kernels{};
    int most = 0;
    cudaError_t error = cudaError_t(kernels_of(device, &kernels));
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    *answer = kernels.small_rows || kernels.wide ? most : 0;
    return error;
  });
}

const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace nmkern::cuda
