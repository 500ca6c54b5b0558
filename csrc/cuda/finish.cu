// The second stage of a dense product, and its launcher; finish.h says what it computes.
#include "enqueue.h"
#include "finish.cuh"

namespace nmkern::cuda {
namespace {

constexpr int kFinishThreads = 256;

// y for the rows.
template <int count>
NMKERN_DEVICE void finish_rows(const Finish& f, int64_t first, int rows, int64_t n) {
  const bool modulated = f.out_gain.data, biased = f.bias.data;
  float gain[count] = {}, bias[count] = {}, z[count];
  if (modulated) load_vectors(f, f.out_gain, first, rows, n, gain);
  if (biased) load_vectors(f, f.bias, first, rows, n, bias);
  unmodulated(f, first, rows, n, z);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if (modulated) z[i] = __fmul_rn(z[i], gain[i]);
    if (biased) z[i] = __fadd_rn(z[i], bias[i]);
  }
  store_rows(f.y, first, rows, n, z);
}

// A thread has an output of `count` rows, which run slowest. Five blocks a multiprocessor, or three of eight
// rows a thread: left to choose, ptxas took registers for four of the former.
template <int count>
__global__ void __launch_bounds__(kFinishThreads, count == 1 ? 5 : 3) finish_kernel(const Finish f) {
  await_previous();
  const int64_t at = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  const int64_t first = at / f.outputs * count;
  if (first >= f.batch) return;
  const int rows = int(f.batch - first < count ? f.batch - first : count);
  finish_rows<count>(f, first, rows, at % f.outputs);
}
template <int rows>
int launch_product(const Finish& f, cudaStream_t on) {
  const int64_t threads = (f.batch + rows - 1) / rows * f.outputs;
  const auto blocks = uint32_t((threads + kFinishThreads - 1) / kFinishThreads);
  return enqueue(finish_kernel<rows>, blocks, kFinishThreads, 0, on, f);
}

}  // namespace

int launch_finish(const Finish& f, void* stream) {
  if (f.gain_grad.data) return launch_gradient(f, stream);
  const auto on = static_cast<cudaStream_t>(stream);
  return rows_at_once(f) == 1 ? launch_product<1>(f, on) : launch_product<kRowsAtOnce>(f, on);
}

}  // namespace nmkern::cuda
