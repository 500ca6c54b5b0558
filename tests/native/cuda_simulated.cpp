// What csrc/cuda/bindings.cpp calls, on a host: the product simulated, a device whose compute capability is
// told, and the guard of PyTorch's that a build without CUDA has not. With it the bindings run on CPU tensors.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>

#include "../../csrc/cuda/device.h"
#include "wide_simulated.h"

void fail(const std::string& what) { throw std::runtime_error(what); }

namespace {

constexpr uintptr_t kStream = 0x5170;  // of torch_cuda_stub.c
int guards_open = 0, next_error = 0;
int64_t products = 0, wide_products = 0;

}  // namespace

// What every launch begins with: the error that it is to end with, or 0.
int simulated_launch(const void* scratch, const void* stream) {
  if (const int error = next_error) {
    next_error = 0;
    return error;
  }
  if (guards_open != 1) fail("the device is not guarded");
  if (reinterpret_cast<uintptr_t>(stream) != kStream) fail("the stream is not PyTorch's");
  if (reinterpret_cast<uintptr_t>(scratch) % 64) fail("scratch is not aligned");
  ++products;
  return 0;
}

namespace nmkern::cuda {

int64_t skinny_scratch(const Dense& call) {
  return call.batch == 0 ? 0 : with_config(call, [&]<class C>() { return plan_of<C>(call).scratch_bytes(); });
}

int64_t wide_scratch(const Dense& call) {
  return call.batch == 0 ? 0 : with_wide_config(call, [&]<class C>() { return wide_scratch_of<C>(call); });
}

int skinny_product(const Dense& call, void* scratch, void* stream) {
  if (const int error = simulated_launch(scratch, stream)) return error;
  if (call.batch)
    with_config(call, [&]<class C>() { run_product<C>(call, scratch); });
  return 0;
}

int wide_product(const Dense& call, void* scratch, void* stream) {
  if (const int error = simulated_launch(scratch, stream)) return error;
  ++wide_products;
  if (call.batch) with_wide_config(call, [&]<class C>() { run_wide<C>(call, scratch); });
  return 0;
}

Kernels kernels{16, false};
const char* built_archs() { return "simulated"; }
int kernels_of(int, Kernels* found) {
  *found = kernels;
  return 0;
}
void set_small_rows(int64_t rows) { kernels.small_rows = rows < 0 ? 16 : rows; }
void set_overlap(bool) {}
const char* error_text(int error) { return error == 7 ? "error 7" : "another error"; }

}  // namespace nmkern::cuda

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  ++guards_open;
  *guard = reinterpret_cast<DeviceGuardHandle>(&guards_open);
  return 0;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  --guards_open;
  return 0;
}

#pragma GCC visibility push(default)
extern "C" {
// Products so far, and those of wgmma; whether there is wgmma; open guards; the error that the next product is
// to end with.
int64_t simulated_products() { return products; }
int64_t simulated_wide_products() { return wide_products; }
void simulated_wgmma(int wide) { nmkern::cuda::kernels.wide = wide != 0; }
int simulated_guards() { return guards_open; }
void simulated_error(int error) { next_error = error; }
}
