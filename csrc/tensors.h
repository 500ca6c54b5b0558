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
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
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
inline Tensor empty(int32_t device_type, int32_t device, int32_t dtype, int64_t dims,
                    const int64_t* sizes) {
  int64_t strides[kMaxDims];
  for (int64_t d = dims - 1, stride = 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, sizes[d]);
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device, &handle));
  return Tensor(handle);
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
    STD_TORCH_CHECK(tensor->dim() == 2 && tensor->size(1) == features &&
                        tensor->scalar_type() == ScalarType::Float,
                    name, ": expected float32 of shape [contexts, ", features, "]");
    const int64_t rows = tensor->size(0);
    STD_TORCH_CHECK(rows == 1 || context || rows == batch, name, ": expected 1 or ", batch,
                    " rows without a context, got ", rows);
    return {static_cast<float*>(const_cast<void*>(keep(*tensor).const_data_ptr())), rows};
  }

  // Whether the indices are in range is for the caller to see to: they may be on a device.
  const int64_t* context(const std::optional<Tensor>& tensor, int64_t batch) {
    if (!tensor) return nullptr;
    STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == batch &&
                        tensor->scalar_type() == ScalarType::Long,
                    "context: expected int64 of shape [", batch, "]");
    return static_cast<const int64_t*>(keep(*tensor).const_data_ptr());
  }
};

inline Key key_of(int64_t seed) {
  return {uint32_t(uint64_t(seed)), uint32_t(uint64_t(seed) >> 32)};
}

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
               int64_t population, int64_t fan_in, double encoder_factor, int64_t family, int64_t decoder_seed,
               int64_t decoder_row, int64_t decoder_col, int64_t classes, double decoder_factor) {
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
