// PyTorch's guard of the current device, which a build without CUDA has not: with it the library for CUDA,
// linked with tests/ptx/runtime.cpp, runs on CPU tensors. Calls are counted by it, and each launch asks here.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>

namespace {

constexpr uintptr_t kStream = 0x5170;  // of torch_cuda_stub.c
int guards_open = 0, next_error = 0;
int64_t guards = 0;

}  // namespace

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  ++guards_open;
  ++guards;
  *guard = reinterpret_cast<DeviceGuardHandle>(&guards_open);
  return 0;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  --guards_open;
  return 0;
}

#pragma GCC visibility push(default)
extern "C" {
// See runtime.cpp: the error that the launch is to end with, or 0.
int emulated_before_launch(void* stream) {
  if (guards_open != 1) throw std::runtime_error("the device is not guarded");
  if (reinterpret_cast<uintptr_t>(stream) != kStream) throw std::runtime_error("the stream is not PyTorch's");
  const int error = next_error;
  next_error = 0;
  return error;
}

// Calls so far; those that have not ended; the error that the next launch is to end with.
int64_t emulated_calls() { return guards; }
int emulated_guards() { return guards_open; }
void emulated_error(int error) { next_error = error; }
}
