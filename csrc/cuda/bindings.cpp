// The CUDA library's face to PyTorch and to Python: modulated_matmul of nmkern/backends/primitives.py for
// CUDA tensors. Batches of more rows than the small-batch kernel is right for go on to Triton's operator.
//
// Nothing here waits for the device, and all memory is the caching allocator's, so that calls can be
// captured in a CUDA graph. No symbol of CUDA is needed: the library loads beside any build of PyTorch.
#include "../tensors.h"

#include <torch/csrc/stable/accelerator.h>

#include <array>

#include <dlfcn.h>

#include "device.h"
#include "skinny.h"

namespace nmkern::cuda {
namespace {

void check(int error, const char* what) {
  STD_TORCH_CHECK(error == 0, "cuda_modulated_matmul: ", what, ": ", error_text(error));
}

using CurrentStream = AOTITorchError (*)(int32_t, void**);

// In PyTorch's library for CUDA, to which there is no link: a build without CUDA has none.
// (torch_stream_native_handle, which every build has, came with 2.13.)
CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* found = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  return reinterpret_cast<CurrentStream>(found);
}

void* current_stream(int32_t device) {
  static const CurrentStream ask = find_current_stream();
  STD_TORCH_CHECK(ask, "cuda_modulated_matmul: this PyTorch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(ask(device, &stream));
  return stream;
}

template <class... Arguments>
Tensor by_triton(const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("nmkern::triton_modulated_matmul", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor modulated_matmul(const Tensor& x, std::optional<Tensor> in_gain, std::optional<Tensor> out_gain,
                        std::optional<Tensor> bias, std::optional<Tensor> context, int64_t family,
                        int64_t seed, int64_t row_offset, int64_t col_offset, int64_t rows,
                        int64_t cols, bool transposed, double factor) {
  const auto device = x.device();
  int64_t most = 0;
  check(most_rows(device.index(), &most), "asking for the GPU's compute capability");
  if (x.size(0) > most)
    return by_triton(x, in_gain, out_gain, bias, context, family, seed, row_offset, col_offset, rows, cols,
                     transposed, factor);
  const torch::stable::accelerator::DeviceGuard guard(device.index());
  for (const auto* tensor : {&in_gain, &out_gain, &bias, &context})
    STD_TORCH_CHECK(!*tensor || (*tensor)->device() == device,
                    "cuda_modulated_matmul: expected all tensors on one device");

  auto call = product_of<Skinny>(family, seed, row_offset, col_offset, rows, cols, transposed, factor);
  call.batch = x.size(0);
  call.x = matrix_of(x, "x", call.batch, call.inputs());
  Banks banks;
  banks.kept.reserve(4);
  call.in_gain = banks.bank(in_gain, "in_gain", call.inputs(), call.batch, context.has_value());
  call.out_gain = banks.bank(out_gain, "out_gain", call.outputs(), call.batch, context.has_value());
  call.bias = banks.bank(bias, "bias", call.outputs(), call.batch, context.has_value());
  call.context = banks.context(context, call.batch);
  Tensor y = torch::stable::new_empty(x, {call.batch, call.outputs()});
  call.y = matrix_of(y, "y", call.batch, call.outputs());

  constexpr int64_t kAlignment = 64;
  const int64_t bytes = skinny_scratch(call);
  Tensor scratch = torch::stable::new_empty(x, {bytes + kAlignment}, ScalarType::Byte);
  const auto at = reinterpret_cast<uintptr_t>(scratch.mutable_data_ptr());
  auto* aligned = reinterpret_cast<void*>((at + kAlignment - 1) / kAlignment * kAlignment);
  check(skinny_product(call, aligned, current_stream(device.index())), "launching a kernel");
  return y;
}

}  // namespace
}  // namespace nmkern::cuda

STABLE_TORCH_LIBRARY_IMPL(nmkern, CUDA, m) {
  m.impl("cuda_modulated_matmul", TORCH_BOX(&nmkern::cuda::modulated_matmul));
}

#define NMKERN_EXPORT extern "C" __attribute__((visibility("default")))

NMKERN_EXPORT const char* nmkern_cuda_archs() { return nmkern::cuda::built_archs(); }
// Null, or what is wrong.
NMKERN_EXPORT const char* nmkern_cuda_most_rows(int device, int64_t* rows) {
  const int error = nmkern::cuda::most_rows(device, rows);
  return error ? nmkern::cuda::error_text(error) : nullptr;
}
NMKERN_EXPORT void nmkern_cuda_set_most_rows(int64_t rows) { nmkern::cuda::set_most_rows(rows); }
