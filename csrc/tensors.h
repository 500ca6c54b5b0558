// From PyTorch's tensors, over its stable ABI, to what kernels of every device take; shared by the bindings.
//
// What is checked here guards memory, for callers that go around Python's checks.
#pragma once

#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <optional>
#include <vector>

#include "matrix.h"
#include "stream.h"

namespace nmkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxDims = 8;  // of a result

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

inline Matrix matrix_of(const Tensor& tensor, const char* name, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == cols, name,
                  ": expected shape [", rows, ", ", cols, "]");
  // Inputs are only read; asking for a mutable pointer would copy a copy-on-write tensor.
  return {const_cast<void*>(tensor.const_data_ptr()), dtype_of(tensor, name), tensor.stride(0),
          tensor.stride(1)};
}

// Overwritten results: half the time of torch::stable::new_empty, which was a quarter of a small call.
inline Tensor empty(int32_t device_type, int32_t device, int32_t dtype, int64_t dims, const int64_t* sizes) {
  int64_t strides[kMaxDims];
  for (int64_t d = dims - 1, stride = 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, sizes[d]);
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device, &handle));
  return Tensor(handle);
}

// In the dtype and on the device of `like`.
inline Tensor empty(const Tensor& like, int64_t dims, const int64_t* sizes) {
  int32_t dtype = 0, device_type = 0, device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device));
  return empty(device_type, device, dtype, dims, sizes);
}

inline Tensor empty(const Tensor& like, int64_t rows, int64_t cols) {
  const int64_t sizes[] = {rows, cols};
  return empty(like, 2, sizes);
}

// The tensors that a call points into, contiguous and alive.
struct Banks {
  std::vector<Tensor> kept;

  const Tensor& keep(const Tensor& tensor) {
    kept.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
    return kept.back();
  }

  Bank bank(const std::optional<Tensor>& tensor, const char* name, int64_t features, int64_t batch,
            bool context) {
    if (!tensor) return {};
    STD_TORCH_CHECK(
        tensor->dim() == 2 && tensor->size(1) == features && tensor->scalar_type() == ScalarType::Float, name,
        ": expected float32 of shape [contexts, ", features, "]");
    const int64_t rows = tensor->size(0);
    STD_TORCH_CHECK(rows == 1 || context || rows == batch, name, ": expected 1 or ", batch,
                    " rows without a context, got ", rows);
    return {static_cast<float*>(const_cast<void*>(keep(*tensor).const_data_ptr())), rows};
  }

  // Whether the indices are in range is for the caller to see to: they may be on a device.
  const int64_t* context(const std::optional<Tensor>& tensor, int64_t batch) {
    if (!tensor) return nullptr;
    STD_TORCH_CHECK(
        tensor->dim() == 1 && tensor->size(0) == batch && tensor->scalar_type() == ScalarType::Long,
        "context: expected int64 of shape [", batch, "]");
    return static_cast<const int64_t*>(keep(*tensor).const_data_ptr());
  }
};

inline Key key_of(int64_t seed) { return {uint32_t(uint64_t(seed)), uint32_t(uint64_t(seed) >> 32)}; }

// A dense product (cpu/dense.h, cuda/dense.h) of the matrix arguments of the primitives.
template <class Call>
Call product_of(int64_t family, int64_t seed, int64_t row_offset, int64_t col_offset, int64_t rows,
                int64_t cols, bool transposed, double factor) {
  Call call{};
  call.family = Family(uint32_t(family));
  call.key = key_of(seed);
  call.row_offset = row_offset;
  call.col_offset = col_offset;
  call.rows = rows;
  call.cols = cols;
  call.transposed = transposed;
  call.factor = float(factor);
  return call;
}

// The dense products as everyday eager calls make them (nmkern/ops/eager.py): the matrix in one tensor of
// eight int64, in the order of product_of's arguments and with the bits of factor last; x with any leading
// dimensions; gains and bias as vectors. Thirteen arguments cost 5.3 microseconds before any work, five 2.2.
template <class Call>
struct Packed {
  Call call{};
  Banks banks;
  int64_t dims;
  int64_t lead[kMaxDims];  // the sizes of x, the last of them free for the result's features

  Packed(const Tensor& x, const Tensor& matrix) : dims(x.dim()) {
    STD_TORCH_CHECK(matrix.dim() == 1 && matrix.size(0) == 8 && matrix.is_contiguous() &&
                        matrix.scalar_type() == ScalarType::Long,
                    "matrix: expected int64 of shape [8]");
    const auto* v = static_cast<const int64_t*>(matrix.const_data_ptr());
    call = product_of<Call>(v[0], v[1], v[2], v[3], v[4], v[5], v[6] != 0, std::bit_cast<double>(v[7]));
    STD_TORCH_CHECK(dims >= 1 && dims <= kMaxDims, "x: expected 1 to ", kMaxDims, " dimensions");
    call.batch = 1;
    for (int64_t d = 0; d < dims; ++d) lead[d] = x.size(d);
    for (int64_t d = 0; d < dims - 1; ++d) call.batch *= lead[d];
    call.x = rows_of(x, "x", call.inputs());
    banks.kept.reserve(3);
  }

  // tensor [..., cols] with the leading sizes of x as a matrix [batch, cols].
  Matrix rows_of(const Tensor& tensor, const char* name, int64_t cols) const {
    if (dims == 2) return matrix_of(tensor, name, call.batch, cols);
    STD_TORCH_CHECK(tensor.dim() == dims && tensor.is_contiguous() && tensor.size(dims - 1) == cols, name,
                    ": expected a contiguous tensor of shape [..., ", cols, "]");
    for (int64_t d = 0; d < dims - 1; ++d)
      STD_TORCH_CHECK(tensor.size(d) == lead[d], name, ": expected the leading shape of x");
    return {const_cast<void*>(tensor.const_data_ptr()), dtype_of(tensor, name), cols, 1};
  }

  Bank vector(const std::optional<Tensor>& tensor, const char* name, int64_t features) {
    if (!tensor) return {};
    STD_TORCH_CHECK(
        tensor->dim() == 1 && tensor->size(0) == features && tensor->scalar_type() == ScalarType::Float, name,
        ": expected float32 of shape [", features, "]");
    return {static_cast<float*>(const_cast<void*>(banks.keep(*tensor).const_data_ptr())), 1};
  }

  Tensor result(const Tensor& like) {
    lead[dims - 1] = call.outputs();
    Tensor y = empty(like, dims, lead);
    call.y = {y.mutable_data_ptr(), call.x.dtype, call.outputs(), 1};
    return y;
  }
};

// A sparse projection (cpu/sparse.h, cuda/sparse.h) of the matrix arguments of its primitive.
template <class Call>
Call projection_of(int64_t seed, int64_t row_offset, int64_t col_offset, int64_t rows, int64_t cols,
                   int64_t population, int64_t fan_in, bool transposed, double factor) {
  Call call{};
  call.key = key_of(seed);
  call.row_offset = row_offset;
  call.col_offset = col_offset;
  call.rows = rows;
  call.cols = cols;
  call.population = population;
  call.fan_in = fan_in;
  call.transposed = transposed;
  call.factor = float(factor);
  return call;
}

// A fused network (cpu/flynet.h, cuda/flynet.h) of the matrix arguments of its primitives.
template <class Net>
Net network_of(int64_t encoder_seed, int64_t encoder_row, int64_t encoder_col, int64_t hidden, int64_t inputs,
               int64_t population, int64_t fan_in, double encoder_factor, int64_t family,
               int64_t decoder_seed, int64_t decoder_row, int64_t decoder_col, int64_t classes,
               double decoder_factor) {
  Net net{};
  net.inputs = inputs;
  net.hidden = hidden;
  net.classes = classes;
  net.encoder_key = key_of(encoder_seed);
  net.encoder_row = encoder_row;
  net.encoder_col = encoder_col;
  net.population = population;
  net.fan_in = fan_in;
  net.encoder_factor = float(encoder_factor);
  net.family = Family(uint32_t(family));
  net.decoder_key = key_of(decoder_seed);
  net.decoder_row = decoder_row;
  net.decoder_col = decoder_col;
  net.decoder_factor = float(decoder_factor);
  return net;
}

}  // namespace nmkern
