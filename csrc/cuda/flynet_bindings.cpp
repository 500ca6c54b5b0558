// The fused FlyNet of the CUDA library as operators. What its kernels have no room for goes on to Triton's.
#include "flynet.h"
#include "operators.h"

namespace nmkern::cuda {
namespace {

// The matrix arguments of the primitives, as they come.
struct Matrices {
  int64_t encoder_seed, encoder_row, encoder_col, hidden, inputs, population, fan_in;
  double encoder_factor;
  int64_t family, decoder_seed, decoder_row, decoder_col, classes;
  double decoder_factor;

  FlyNet network(const Tensor& x) const {
    auto net = network_of<FlyNet>(encoder_seed, encoder_row, encoder_col, hidden, inputs, population, fan_in,
                                  encoder_factor, family, decoder_seed, decoder_row, decoder_col, classes,
                                  decoder_factor);
    net.batch = x.size(0);
    return net;
  }
  template <class... Arguments>
  Tensor by_triton(const char* name, const Arguments&... arguments) const {
    const auto found = cuda::by_triton(name, arguments..., encoder_seed, encoder_row, encoder_col, hidden,
                                       inputs, population, fan_in, encoder_factor, family, decoder_seed,
                                       decoder_row, decoder_col, classes, decoder_factor);
    return torch::stable::detail::to<Tensor>(found[0]);
  }
};

void is_here(const Tensor& tensor, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(tensor.device() == x.device(), name, ": expected the device of x");
}

void sweep(const FlyNet& net, const Tensor& x, int64_t bytes) {
  const Scratch scratch(x, bytes);
  check(flynet_sweep(net, scratch.data, current_stream(x.get_device_index())), "launching a kernel");
}

Tensor flynet_logits(const Tensor& x, const Tensor& gain, std::optional<Tensor> context, int64_t encoder_seed,
                     int64_t encoder_row, int64_t encoder_col, int64_t hidden, int64_t inputs,
                     int64_t population, int64_t fan_in, double encoder_factor, int64_t family,
                     int64_t decoder_seed, int64_t decoder_row, int64_t decoder_col, int64_t classes,
                     double decoder_factor) {
  const Matrices matrices{encoder_seed, encoder_row, encoder_col,    hidden,        inputs,
                          population,   fan_in,      encoder_factor, family,        decoder_seed,
                          decoder_row,  decoder_col, classes,        decoder_factor};
  FlyNet net = matrices.network(x);
  const int64_t bytes = flynet_scratch(net, shared_of(x.get_device_index()));
  if (bytes < 0) return matrices.by_triton("nmkern::triton_flynet_logits", x, gain, context);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  net.x = matrix_of(x, "x", net.batch, inputs);
  is_here(gain, x, "gain");
  if (context) is_here(*context, x, "context");
  Banks banks;
  banks.kept.reserve(2);
  net.gain = banks.bank(gain, "gain", hidden, net.batch, context.has_value());
  net.context = banks.context(context, net.batch);
  Tensor logits = empty(x, net.batch, classes);
  net.logits = matrix_of(logits, "logits", net.batch, classes);
  sweep(net, x, bytes);
  return logits;
}

Tensor flynet_gain_grad(const Tensor& x, const Tensor& d_logits, std::optional<Tensor> context,
                        int64_t contexts, int64_t encoder_seed, int64_t encoder_row, int64_t encoder_col,
                        int64_t hidden, int64_t inputs, int64_t population, int64_t fan_in,
                        double encoder_factor, int64_t family, int64_t decoder_seed, int64_t decoder_row,
                        int64_t decoder_col, int64_t classes, double decoder_factor) {
  const Matrices matrices{encoder_seed, encoder_row, encoder_col,    hidden,        inputs,
                          population,   fan_in,      encoder_factor, family,        decoder_seed,
                          decoder_row,  decoder_col, classes,        decoder_factor};
  FlyNet net = matrices.network(x);
  STD_TORCH_CHECK(contexts == 1 || context || contexts == net.batch, "contexts: expected 1 or ", net.batch,
                  " without a context, got ", contexts);
  net.gain_grad.rows = contexts;
  Banks banks;
  banks.kept.reserve(1);
  net.context = banks.context(context, net.batch);
  const int64_t bytes = flynet_scratch(net, shared_of(x.get_device_index()));
  if (bytes < 0) return matrices.by_triton("nmkern::triton_flynet_gain_grad", x, d_logits, context, contexts);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  net.x = matrix_of(x, "x", net.batch, inputs);
  is_here(d_logits, x, "d_logits");
  if (context) is_here(*context, x, "context");
  net.logits = matrix_of(d_logits, "d_logits", net.batch, classes);
  Tensor grad = net.batch == 0 ? torch::stable::new_zeros(x, {contexts, hidden}, ScalarType::Float)
                               : torch::stable::new_empty(x, {contexts, hidden}, ScalarType::Float);
  net.gain_grad.data = static_cast<float*>(grad.mutable_data_ptr());
  sweep(net, x, bytes);
  return grad;
}

}  // namespace
}  // namespace nmkern::cuda

STABLE_TORCH_LIBRARY_IMPL(nmkern, CUDA, m) {
  m.impl("cuda_flynet_logits", TORCH_BOX(&nmkern::cuda::flynet_logits));
  m.impl("cuda_flynet_gain_grad", TORCH_BOX(&nmkern::cuda::flynet_gain_grad));
}
