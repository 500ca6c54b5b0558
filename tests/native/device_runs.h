// What the programs that run cases on a GPU share: memory that it can read, and a launch that is run twice.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>

#include "buffers.h"

namespace {

// A GPU may do something else the second time.
#if defined(NMKERN_ONCE)
constexpr int kTurns = 1;
#else
constexpr int kTurns = 2;
#endif

void must(int error) {
  if (error != cudaSuccess) fail(cudaGetErrorString(cudaError_t(error)));
}

// Of the host, which a GPU reads in place: managed memory moves to and fro at each launch, and not every driver
// lets the host read it.
void use_pinned_memory() {
  allocate_bytes = [](size_t bytes) {
    void* at = nullptr;
    must(cudaMallocHost(&at, bytes));
    return at;
  };
  free_bytes = [](void* at) { must(cudaFreeHost(at)); };
}

int64_t shared_limit() {
  int device = 0, most = 0;
  must(cudaGetDevice(&device));
  must(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return most;
}

// launch(scratch) kTurns times, into `bytes` at `result`: the second time with the first's bits. Scratch starts as
// NaN.
template <class Launch>
void run_turns(int64_t scratch_bytes, void* result, size_t bytes, const Launch& launch) {
  if (scratch_bytes < 0) fail("no kernel has room");
  void* scratch = nullptr;
  must(cudaMalloc(&scratch, scratch_bytes + 16));
  std::vector<unsigned char> first(bytes);
  for (int turn = 0; turn < kTurns; ++turn) {
    must(cudaMemset(scratch, 0xFF, scratch_bytes + 16));
    must(launch(scratch));
    must(cudaDeviceSynchronize());
    if (turn == 0) std::memcpy(first.data(), result, bytes);
    if (std::memcmp(first.data(), result, bytes) != 0) fail("a second call gave other bits");
  }
  must(cudaFree(scratch));
}

}  // namespace
