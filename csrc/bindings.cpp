// The native library's face to PyTorch: the primitives of nmkern/backends/primitives.py for CPU tensors,
// over PyTorch's stable ABI, so that one binary serves every PyTorch from 2.10 on and every Python.
// Python checks arguments and words the errors.
#include "tensors.h"

#include <tuple>
#include <utility>

#include "cpu/dense.h"
#include "cpu/flynet.h"
#include "cpu/kernels.h"
#include "cpu/sparse.h"

namespace {

using nmkern::Bank;
using nmkern::Banks;
using nmkern::cpu::Dense;
using nmkern::cpu::FlyNet;
using nmkern::cpu::Runtime;
using nmkern::cpu::Sparse;
using nmkern::empty;
using nmkern::Matrix;
using nmkern::matrix_of;
using nmkern::network_of;
using nmkern::Packed;
using nmkern::projection_of;
using nmkern::ScalarType;
using nmkern::Tensor;

// Scratch and threads from PyTorch itself: its allocator, so that its profiler sees the bytes, and its
// thread pool, since a second one in the process makes both ten times slower. A small call's scratch is
// part of its frame, which saves 2 of 8 microseconds (but not under AddressSanitizer, which tells blocks
// apart only where each is an allocation).
struct Pool {
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kFrameBytes = 0;
#else
  static constexpr int64_t kFrameBytes = 16384;
#endif
  const Tensor& like;
  std::vector<Tensor> blocks;
  alignas(64) char frame[16384];
  int64_t used = 0;

  explicit Pool(const Tensor& tensor) : like(tensor) {}

  void* allocate(int64_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    if (bytes <= kFrameBytes - used) return frame + std::exchange(used, used + bytes);
    blocks.push_back(torch::stable::new_empty(like, {bytes}, ScalarType::Byte));
    return blocks.back().mutable_data_ptr();
  }

  Runtime runtime() {
    Runtime r;
    r.threads = torch::stable::get_num_threads();
    r.self = this;
    r.allocate = [](void* self, int64_t bytes) { return static_cast<Pool*>(self)->allocate(bytes); };
    r.parallel_for = [](int64_t size, int64_t grain, void (*body)(int64_t, int64_t, void*),
                        void* context) { torch_parallel_for(0, size, grain, body, context); };
    return r;
  }
};

// The largest index that every bank of several rows can take.
int64_t common_rows(std::initializer_list<int64_t> banks) {
  int64_t rows = INT64_MAX;
  for (int64_t r : banks)
    if (r > 1) rows = std::min(rows, r);
  return rows;
}

const int64_t* context_of(Banks& banks, const std::optional<Tensor>& tensor, int64_t batch,
                          int64_t contexts) {
  const int64_t* values = banks.context(tensor, batch);
  for (int64_t m = 0; values && m < batch; ++m)
    STD_TORCH_CHECK(values[m] >= 0 && values[m] < contexts, "context: expected 0 <= context < ", contexts,
                    ", got ", values[m]);
  return values;
}

Tensor modulated_matmul(const Tensor& x, std::optional<Tensor> in_gain, std::optional<Tensor> out_gain,
                        std::optional<Tensor> bias, std::optional<Tensor> context, int64_t family,
                        int64_t seed, int64_t row_offset, int64_t col_offset, int64_t rows,
                        int64_t cols, bool transposed, double factor) {
  Dense d = nmkern::product_of<Dense>(family, seed, row_offset, col_offset, rows, cols, transposed, factor);
  d.batch = x.size(0);
  d.x = matrix_of(x, "x", d.batch, d.inputs());
  Banks banks;
  banks.kept.reserve(4);
  d.in_gain = banks.bank(in_gain, "in_gain", d.inputs(), d.batch, context.has_value());
  d.out_gain = banks.bank(out_gain, "out_gain", d.outputs(), d.batch, context.has_value());
  d.bias = banks.bank(bias, "bias", d.outputs(), d.batch, context.has_value());
  d.context = context_of(banks, context, d.batch,
                         common_rows({d.in_gain.rows, d.out_gain.rows, d.bias.rows}));
  Tensor y = empty(x, d.batch, d.outputs());
  d.y = matrix_of(y, "y", d.batch, d.outputs());
  Pool pool(x);
  nmkern::cpu::dense_product(d, pool.runtime());
  return y;
}

std::tuple<Tensor, Tensor> modulated_matmul_gain_grad(
    const Tensor& x, std::optional<Tensor> in_gain, std::optional<Tensor> out_gain,
    const Tensor& other, std::optional<Tensor> context, int64_t contexts, bool need_product,
    int64_t family, int64_t seed, int64_t row_offset, int64_t col_offset, int64_t rows, int64_t cols,
    bool transposed, double factor) {
  Dense d = nmkern::product_of<Dense>(family, seed, row_offset, col_offset, rows, cols, transposed, factor);
  d.batch = x.size(0);
  d.x = matrix_of(x, "x", d.batch, d.inputs());
  Banks banks;
  banks.kept.reserve(4);
  d.in_gain = banks.bank(in_gain, "in_gain", d.inputs(), d.batch, context.has_value());
  d.out_gain = banks.bank(out_gain, "out_gain", d.outputs(), d.batch, context.has_value());
  d.other = matrix_of(other, "other", d.batch, d.outputs());
  STD_TORCH_CHECK(contexts == 1 || context || contexts == d.batch, "contexts: expected 1 or ", d.batch,
                  " without a context, got ", contexts);
  d.context = context_of(banks, context, d.batch,
                         common_rows({d.in_gain.rows, d.out_gain.rows, contexts}));
  Tensor gain_grad = torch::stable::new_zeros(x, {contexts, d.outputs()}, ScalarType::Float);
  d.gain_grad = {static_cast<float*>(gain_grad.mutable_data_ptr()), contexts};
  Tensor product = empty(x, need_product ? d.batch : 0, d.outputs());
  if (need_product) d.y = matrix_of(product, "product", d.batch, d.outputs());
  Pool pool(x);
  nmkern::cpu::dense_product(d, pool.runtime());
  return {product, gain_grad};
}

Tensor packed_matmul(const Tensor& x, std::optional<Tensor> in_gain, std::optional<Tensor> out_gain,
                     std::optional<Tensor> bias, const Tensor& matrix) {
  Packed<Dense> packed(x, matrix);
  Dense& d = packed.call;
  d.in_gain = packed.vector(in_gain, "in_gain", d.inputs());
  d.out_gain = packed.vector(out_gain, "out_gain", d.outputs());
  d.bias = packed.vector(bias, "bias", d.outputs());
  Tensor y = packed.result(x);
  Pool pool(x);
  nmkern::cpu::dense_product(d, pool.runtime());
  return y;
}

Tensor packed_matmul_bare(const Tensor& x, const Tensor& matrix) {
  return packed_matmul(x, {}, {}, {}, matrix);
}

std::tuple<Tensor, Tensor> packed_matmul_gain_grad(const Tensor& x, std::optional<Tensor> in_gain,
                                                   std::optional<Tensor> out_gain,
                                                   const Tensor& other, bool need_product,
                                                   const Tensor& matrix) {
  Packed<Dense> packed(x, matrix);
  Dense& d = packed.call;
  d.in_gain = packed.vector(in_gain, "in_gain", d.inputs());
  d.out_gain = packed.vector(out_gain, "out_gain", d.outputs());
  d.other = packed.rows_of(other, "other", d.outputs());
  Tensor gain_grad = torch::stable::new_zeros(x, {d.outputs()}, ScalarType::Float);
  d.gain_grad = {static_cast<float*>(gain_grad.mutable_data_ptr()), 1};
  Tensor product = need_product ? packed.result(x) : empty(x, 0, d.outputs());
  Pool pool(x);
  nmkern::cpu::dense_product(d, pool.runtime());
  return {product, gain_grad};
}

Tensor sparse_matmul(const Tensor& x, int64_t seed, int64_t row_offset, int64_t col_offset,
                     int64_t rows, int64_t cols, int64_t population, int64_t fan_in, bool transposed,
                     double factor) {
  auto s = projection_of<Sparse>(seed, row_offset, col_offset, rows, cols, population, fan_in, transposed,
                                 factor);
  s.batch = x.size(0);
  s.x = matrix_of(x, "x", s.batch, s.inputs());
  Tensor y = empty(x, s.batch, s.outputs());
  s.y = matrix_of(y, "y", s.batch, s.outputs());
  Pool pool(x);
  nmkern::cpu::sparse_product(s, pool.runtime());
  return y;
}

Tensor flynet_logits(const Tensor& x, const Tensor& gain, std::optional<Tensor> context,
                     int64_t encoder_seed, int64_t encoder_row, int64_t encoder_col, int64_t hidden,
                     int64_t inputs, int64_t population, int64_t fan_in, double encoder_factor,
                     int64_t family, int64_t decoder_seed, int64_t decoder_row, int64_t decoder_col,
                     int64_t classes, double decoder_factor) {
  auto net = network_of<FlyNet>(encoder_seed, encoder_row, encoder_col, hidden, inputs, population, fan_in,
                                encoder_factor, family, decoder_seed, decoder_row, decoder_col, classes,
                                decoder_factor);
  net.batch = x.size(0);
  net.x = matrix_of(x, "x", net.batch, inputs);
  Banks banks;
  banks.kept.reserve(2);
  net.gain = banks.bank(gain, "gain", hidden, net.batch, context.has_value());
  net.context = context_of(banks, context, net.batch, common_rows({net.gain.rows}));
  Tensor logits = empty(x, net.batch, classes);
  net.logits = matrix_of(logits, "logits", net.batch, classes);
  Pool pool(x);
  nmkern::cpu::flynet_logits(net, pool.runtime());
  return logits;
}

Tensor flynet_gain_grad(const Tensor& x, const Tensor& d_logits, std::optional<Tensor> context,
                        int64_t contexts, int64_t encoder_seed, int64_t encoder_row,
                        int64_t encoder_col, int64_t hidden, int64_t inputs, int64_t population,
                        int64_t fan_in, double encoder_factor, int64_t family, int64_t decoder_seed,
                        int64_t decoder_row, int64_t decoder_col, int64_t classes,
                        double decoder_factor) {
  auto net = network_of<FlyNet>(encoder_seed, encoder_row, encoder_col, hidden, inputs, population, fan_in,
                                encoder_factor, family, decoder_seed, decoder_row, decoder_col, classes,
                                decoder_factor);
  net.batch = x.size(0);
  net.x = matrix_of(x, "x", net.batch, inputs);
  STD_TORCH_CHECK(contexts == 1 || context || contexts == net.batch, "contexts: expected 1 or ",
                  net.batch, " without a context, got ", contexts);
  Banks banks;
  banks.kept.reserve(1);
  net.context = context_of(banks, context, net.batch, common_rows({contexts}));
  net.logits = matrix_of(d_logits, "d_logits", net.batch, classes);
  Tensor grad = torch::stable::new_zeros(x, {contexts, hidden}, ScalarType::Float);
  net.gain_grad = {static_cast<float*>(grad.mutable_data_ptr()), contexts};
  Pool pool(x);
  nmkern::cpu::flynet_gain_grad(net, pool.runtime());
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmkern, CPU, m) {
  m.impl("cpu_modulated_matmul", TORCH_BOX(&modulated_matmul));
  m.impl("cpu_modulated_matmul_gain_grad", TORCH_BOX(&modulated_matmul_gain_grad));
  m.impl("packed_matmul", TORCH_BOX(&packed_matmul));
  m.impl("packed_matmul.bare", TORCH_BOX(&packed_matmul_bare));
  m.impl("packed_matmul_gain_grad", TORCH_BOX(&packed_matmul_gain_grad));
  m.impl("cpu_sparse_matmul", TORCH_BOX(&sparse_matmul));
  m.impl("cpu_flynet_logits", TORCH_BOX(&flynet_logits));
  m.impl("cpu_flynet_gain_grad", TORCH_BOX(&flynet_gain_grad));
}

#define NMKERN_EXPORT extern "C" __attribute__((visibility("default")))

NMKERN_EXPORT const char* nmkern_cpu_isa() { return nmkern::cpu::kernels().name; }
// 0, or 1 where this build or this CPU has no such instruction set.
NMKERN_EXPORT int nmkern_cpu_set_isa(const char* name) { return !nmkern::cpu::set_kernels(name); }
