// The CUDA library's face to PyTorch and to Python: the dense primitives of nmkern/backends/primitives.py for
// CUDA tensors. Batches that no kernel of this library is right for go on to Triton's operators.
//
// Nothing here waits for the device, and all memory is the caching allocator's, so that calls can be
// captured in a CUDA graph. No symbol of CUDA is needed: the library loads beside any build of PyTorch.
#include <bit>
#include <tuple>
#include <vector>

#include "dense.h"
#include "operators.h"

namespace nmkern::cuda {
namespace {

enum class Kernel { skinny, wide, none };

// The kernel that is right for a batch, on the device where x is.
Kernel kernel_for(const Tensor& x, int64_t batch) {
  Kernels kernels{};
  check(kernels_of(x.get_device_index(), &kernels), "asking for the GPU's compute capability");
  if (batch <= kernels.small_rows) return Kernel::skinny;
  return kernels.wide ? Kernel::wide : Kernel::none;
}

void run(const Tensor& x, Dense call, Kernel kernel) {
  call.fixed_point = fixed_point_allowed();
  const bool wide = kernel == Kernel::wide;
  const Scratch scratch(x, wide ? wide_scratch(call) : skinny_scratch(call));
  void* stream = current_stream(x.get_device_index());
  check(wide ? wide_product(call, scratch.data, stream) : skinny_product(call, scratch.data, stream),
        "launching a kernel");
}

// Of a gain: zeros, or what the kernels overwrite.
Tensor gradient(const Tensor& x, std::initializer_list<int64_t> sizes, bool zeros) {
  return zeros ? torch::stable::new_zeros(x, sizes, ScalarType::Float)
               : torch::stable::new_empty(x, sizes, ScalarType::Float);
}

// A call, whose x, gains and context are those of the primitives, on their device.
struct Operation {
  const Tensor& x;
  torch::stable::Device device;
  torch::stable::accelerator::DeviceGuard guard;
  Banks banks;
  Dense call;

  Operation(const Tensor& input, const std::optional<Tensor>& in_gain, const std::optional<Tensor>& out_gain,
            const std::optional<Tensor>& context, const Dense& matrix)
      : x(input), device(input.device()), guard(device.index()), call(matrix) {
    call.batch = x.size(0);
    call.x = matrix_of(x, "x", call.batch, call.inputs());
    banks.kept.reserve(4);
    call.in_gain = bank(in_gain, "in_gain", call.inputs(), context.has_value());
    call.out_gain = bank(out_gain, "out_gain", call.outputs(), context.has_value());
    if (context) is_here(*context, "context");
    call.context = banks.context(context, call.batch);
  }

  void is_here(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.device() == device, name, ": expected the device of x");
  }

  Bank bank(const std::optional<Tensor>& tensor, const char* name, int64_t features, bool context) {
    if (tensor) is_here(*tensor, name);
    return banks.bank(tensor, name, features, call.batch, context);
  }

  // Overwritten, [rows, outputs] in the dtype of x.
  Tensor result(int64_t rows) { return empty(x, rows, call.outputs()); }
};

Tensor modulated_matmul(const Tensor& x, std::optional<Tensor> in_gain, std::optional<Tensor> out_gain,
                        std::optional<Tensor> bias, std::optional<Tensor> context, int64_t family,
                        int64_t seed, int64_t row_offset, int64_t col_offset, int64_t rows, int64_t cols,
                        bool transposed, double factor) {
  const Kernel kernel = kernel_for(x, x.size(0));
  if (kernel == Kernel::none) {
    const auto found = by_triton("nmkern::triton_modulated_matmul", x, in_gain, out_gain, bias, context,
                                 family, seed, row_offset, col_offset, rows, cols, transposed, factor);
    return torch::stable::detail::to<Tensor>(found[0]);
  }
  Operation operation(
      x, in_gain, out_gain, context,
      product_of<Dense>(family, seed, row_offset, col_offset, rows, cols, transposed, factor));
  Dense& call = operation.call;
  call.bias = operation.bank(bias, "bias", call.outputs(), context.has_value());
  Tensor y = operation.result(call.batch);
  call.y = matrix_of(y, "y", call.batch, call.outputs());
  run(x, call, kernel);
  return y;
}

std::tuple<Tensor, Tensor> modulated_matmul_gain_grad(const Tensor& x, std::optional<Tensor> in_gain,
                                                      std::optional<Tensor> out_gain, const Tensor& other,
                                                      std::optional<Tensor> context, int64_t contexts,
                                                      bool need_product, int64_t family, int64_t seed,
                                                      int64_t row_offset, int64_t col_offset, int64_t rows,
                                                      int64_t cols, bool transposed, double factor) {
  const Kernel kernel = kernel_for(x, x.size(0));
  if (kernel == Kernel::none) {
    const auto found =
        by_triton("nmkern::triton_modulated_matmul_gain_grad", x, in_gain, out_gain, other, context, contexts,
                  need_product, family, seed, row_offset, col_offset, rows, cols, transposed, factor);
    return {torch::stable::detail::to<Tensor>(found[0]), torch::stable::detail::to<Tensor>(found[1])};
  }
  Operation operation(
      x, in_gain, out_gain, context,
      product_of<Dense>(family, seed, row_offset, col_offset, rows, cols, transposed, factor));
  Dense& call = operation.call;
  operation.is_here(other, "other");
  call.other = matrix_of(other, "other", call.batch, call.outputs());
  STD_TORCH_CHECK(contexts == 1 || context || contexts == call.batch, "contexts: expected 1 or ", call.batch,
                  " without a context, got ", contexts);
  Tensor grad = gradient(x, {contexts, call.outputs()}, context || call.batch == 0);
  call.gain_grad = {static_cast<float*>(grad.mutable_data_ptr()), contexts};
  Tensor product = operation.result(need_product ? call.batch : 0);
  if (need_product) call.y = matrix_of(product, "product", call.batch, call.outputs());
  run(x, call, kernel);
  return {product, grad};
}

std::optional<Tensor> row_of(const std::optional<Tensor>& vector) {
  return vector ? std::optional(torch::stable::unsqueeze(*vector, 0)) : std::nullopt;
}

// A call as everyday eager calls make it (see Packed).
struct Eager {
  Packed<Dense> packed;
  const Tensor& x;
  Kernel kernel;
  torch::stable::accelerator::DeviceGuard guard;

  Eager(const Tensor& input, const Tensor& matrix)
      : packed(input, matrix),
        x(input),
        kernel(kernel_for(x, packed.call.batch)),
        guard(x.get_device_index()) {}

  Bank vector(const std::optional<Tensor>& tensor, const char* name, int64_t features) {
    if (tensor) is_here(*tensor, name);
    return packed.vector(tensor, name, features);
  }

  void is_here(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.device() == x.device(), name, ": expected the device of x");
  }

  // What an operator of Triton's returns for these arguments and those that the matrix holds.
  template <class... Arguments>
  auto handed_on(const char* name, const Tensor& matrix, const Arguments&... arguments) const {
    const auto* v = static_cast<const int64_t*>(matrix.const_data_ptr());
    return by_triton(name, arguments..., v[0], v[1], v[2], v[3], v[4], v[5], v[6] != 0,
                     std::bit_cast<double>(v[7]));
  }

  // tensor [..., features] as [batch, features], and the reverse.
  Tensor flat(const Tensor& tensor, int64_t features) const {
    return packed.dims == 2 ? tensor : torch::stable::view(tensor, {packed.call.batch, features});
  }
  Tensor shaped(StableIValue result) const {
    const auto y = torch::stable::detail::to<Tensor>(result);
    std::vector<int64_t> sizes(packed.lead, packed.lead + packed.dims);
    sizes.back() = packed.call.outputs();
    return packed.dims == 2 ? y : torch::stable::view(y, sizes);
  }
};

Tensor packed_matmul(const Tensor& x, std::optional<Tensor> in_gain, std::optional<Tensor> out_gain,
                     std::optional<Tensor> bias, const Tensor& matrix) {
  Eager eager(x, matrix);
  Dense& call = eager.packed.call;
  call.in_gain = eager.vector(in_gain, "in_gain", call.inputs());
  call.out_gain = eager.vector(out_gain, "out_gain", call.outputs());
  call.bias = eager.vector(bias, "bias", call.outputs());
  if (eager.kernel == Kernel::none)
    return eager.shaped(eager.handed_on("nmkern::triton_modulated_matmul", matrix,
                                        eager.flat(x, call.inputs()), row_of(in_gain), row_of(out_gain),
                                        row_of(bias), std::optional<Tensor>())[0]);
  Tensor y = eager.packed.result(x);
  run(x, call, eager.kernel);
  return y;
}

Tensor packed_matmul_bare(const Tensor& x, const Tensor& matrix) {
  return packed_matmul(x, {}, {}, {}, matrix);
}

std::tuple<Tensor, Tensor> packed_matmul_gain_grad(const Tensor& x, std::optional<Tensor> in_gain,
                                                   std::optional<Tensor> out_gain, const Tensor& other,
                                                   bool need_product, const Tensor& matrix) {
  Eager eager(x, matrix);
  Dense& call = eager.packed.call;
  call.in_gain = eager.vector(in_gain, "in_gain", call.inputs());
  call.out_gain = eager.vector(out_gain, "out_gain", call.outputs());
  eager.is_here(other, "other");
  call.other = eager.packed.rows_of(other, "other", call.outputs());
  if (eager.kernel == Kernel::none) {
    const auto found =
        eager.handed_on("nmkern::triton_modulated_matmul_gain_grad", matrix, eager.flat(x, call.inputs()),
                        row_of(in_gain), row_of(out_gain), eager.flat(other, call.outputs()),
                        std::optional<Tensor>(), int64_t{1}, need_product);
    const auto grad = torch::stable::detail::to<Tensor>(found[1]);
    return {need_product ? eager.shaped(found[0]) : torch::stable::detail::to<Tensor>(found[0]),
            torch::stable::view(grad, {call.outputs()})};
  }
  Tensor grad = gradient(x, {call.outputs()}, call.batch == 0);
  call.gain_grad = {static_cast<float*>(grad.mutable_data_ptr()), 1};
  Tensor product = need_product ? eager.packed.result(x) : empty(x, 0, call.outputs());
  run(x, call, eager.kernel);
  return {product, grad};
}

}  // namespace
}  // namespace nmkern::cuda

STABLE_TORCH_LIBRARY_IMPL(nmkern, CUDA, m) {
  m.impl("cuda_modulated_matmul", TORCH_BOX(&nmkern::cuda::modulated_matmul));
  m.impl("cuda_modulated_matmul_gain_grad", TORCH_BOX(&nmkern::cuda::modulated_matmul_gain_grad));
  m.impl("packed_matmul", TORCH_BOX(&nmkern::cuda::packed_matmul));
  m.impl("packed_matmul.bare", TORCH_BOX(&nmkern::cuda::packed_matmul_bare));
  m.impl("packed_matmul_gain_grad", TORCH_BOX(&nmkern::cuda::packed_matmul_gain_grad));
}

#define NMKERN_EXPORT extern "C" __attribute__((visibility("default")))

NMKERN_EXPORT const char* nmkern_cuda_archs() { return nmkern::cuda::built_archs(); }
// Null, or what is wrong.
NMKERN_EXPORT const char* nmkern_cuda_kernels(int device, int64_t* small_rows, int* wide) {
  nmkern::cuda::Kernels kernels{};
  const int error = nmkern::cuda::kernels_of(device, &kernels);
  *small_rows = kernels.small_rows;
  *wide = kernels.wide;
  return error ? nmkern::cuda::error_text(error) : nullptr;
}
NMKERN_EXPORT void nmkern_cuda_set_overlap(bool allowed) { nmkern::cuda::set_overlap(allowed); }
NMKERN_EXPORT void nmkern_cuda_set_fixed_point(bool allowed) { nmkern::cuda::set_fixed_point(allowed); }
NMKERN_EXPORT void nmkern_cuda_set_small_rows(int64_t rows) { nmkern::cuda::set_small_rows(rows); }
