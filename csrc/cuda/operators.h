// What the operators of the CUDA library share: errors, PyTorch's current stream, calls of Triton's
// operators.
//
// Nothing here waits for the device, and no symbol of CUDA is needed.
#pragma once

#include "../tensors.h"

#include <torch/csrc/stable/accelerator.h>

#include <array>

#include <dlfcn.h>

#include "device.h"

namespace nmkern::cuda {

inline void check(int error, const char* what) {
  STD_TORCH_CHECK(error == 0, "cuda backend: ", what, ": ", error_text(error));
}

using CurrentStream = AOTITorchError (*)(int32_t, void**);

// In PyTorch's library for CUDA, to which there is no link: a build without CUDA has none.
// (torch_stream_native_handle, which every build has, came with 2.13.)
inline CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* found = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  return reinterpret_cast<CurrentStream>(found);
}

inline void* current_stream(int32_t device) {
  static const CurrentStream ask = find_current_stream();
  STD_TORCH_CHECK(ask, "cuda backend: this PyTorch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(ask(device, &stream));
  return stream;
}

// Shared memory that a block may have.
inline int64_t shared_of(int32_t device) {
  int64_t bytes = 0;
  check(shared_bytes(device, &bytes), "asking for the GPU's shared memory");
  return bytes;
}

inline Tensor bytes_on(const Tensor& like, int64_t count) {
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  return empty(device_type, like.get_device_index(), aoti_torch_dtype_uint8(), 1, &count);
}

// Scratch of a call, on the device of `like`, aligned as kernels want it.
struct Scratch {
  static constexpr int64_t kAlignment = 64;
  Tensor tensor;
  void* data;

  Scratch(const Tensor& like, int64_t bytes) : tensor(bytes_on(like, bytes + kAlignment)) {
    const auto at = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
    data = reinterpret_cast<void*>((at + kAlignment - 1) / kAlignment * kAlignment);
  }
};

// What an operator of Triton's returns for the same arguments.
template <class... Arguments>
std::array<StableIValue, sizeof...(Arguments)> by_triton(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

}  // namespace nmkern::cuda
