// How every kernel is enqueued: it may begin while the one before it in the stream still runs (programmatic
// dependent launch), where a GPU can do that, so that launching it takes no time of its own.
//
// Invariant: each thread of a kernel calls await_previous before it touches the device's memory, the
// program's own constants aside. Nothing is read by __ldg, through the cache of what does not change while a
// kernel runs: when it begins, kernels before it may still write. test_cuda_resources.py holds the machine
// code to both.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "device.h"

namespace nmkern::cuda {

// A cudaError_t.
template <class... Parameters>
int enqueue(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes, cudaStream_t stream,
            const std::type_identity_t<Parameters>&... arguments) {
  bool overlap = false;
  if (const int error = overlaps(&overlap)) return error;
  if (shared_bytes > 48 << 10) {  // more than a kernel gets unasked
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(uint32_t(threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace nmkern::cuda
