// The second stage of a dense product: sums of the splits, the modulation, and the gradient of a gain.
//
//   z[m, n] = factor * sum_s partial[s, m, n]                                      (unmodulated)
//   y[m, n] = z[m, n] * out_gain[c, n] + bias[c, n]                                (finish_one)
//   gain_grad[c, n] = sum over the rows m of c: other[m, n] * z[m, n]              (finish_with_gradient)
//
// Invariant: each step rounds on its own, and sums are taken in order: splits upward, rows of the batch upward.
#pragma once

#include "product.h"

namespace nmkern::cuda {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kLanes;

struct Finish {
  const float* partial;
  int64_t splits, partial_stride, skip;  // skip: outputs of the first patch before the matrix
  int64_t batch, outputs;
  float factor;
  Bank out_gain, bias;
  const int64_t* context;
  Matrix y;
  Matrix other;
  Bank gain_grad;
  bool add;  // to a gain_grad of one row, instead of overwriting it
};

// z of dense.h.
template <class Machine>
NMKERN_DEVICE float unmodulated(const Finish& f, int64_t m, int64_t n) {
  float sum = 0;
#pragma unroll 16  // loads in flight at once: left to choose, the compiler took 4 once there were two callers
  for (int64_t s = 0; s < f.splits; ++s)
    sum = Machine::rounded_sum(sum, f.partial[(s * f.batch + m) * f.partial_stride + f.skip + n]);
  return Machine::rounded_product(sum, f.factor);
}

template <class Machine>
NMKERN_DEVICE void finish_one(const Finish& f, int64_t m, int64_t n, float z) {
  if (f.out_gain.data) z = Machine::rounded_product(z, bank_value(f.out_gain, f.context, m, f.outputs, n));
  if (f.bias.data) z = Machine::rounded_sum(z, bank_value(f.bias, f.context, m, f.outputs, n));
  write_element(f.y, m, n, z);
}

// The same with the gradient of a gain. A block owns 32 outputs and takes kFinishRows rows at a time, each
// warp its share of them; then one warp adds them up in order: no atomics, the same bits every time.
constexpr int kFinishRows = 16;

template <class Machine>
NMKERN_DEVICE void finish_with_gradient(const Finish& f, Machine& machine, float* shared) {
  const int warp = machine.thread() / kLanes, lane = machine.lane();
  const int64_t n = int64_t{machine.block_x()} * kLanes + lane;
  const bool here = n < f.outputs, one = f.gain_grad.rows == 1;
  float total = f.add && one && here ? f.gain_grad.data[n] : 0;
  for (int64_t first = 0; first < f.batch; first += kFinishRows) {
    const int rows = int(f.batch - first < kFinishRows ? f.batch - first : kFinishRows);
    for (int i = warp; i < rows && here; i += kWarps) {
      const float z = unmodulated<Machine>(f, first + i, n);
      if (f.y.data) finish_one<Machine>(f, first + i, n, z);
      shared[i * kLanes + lane] = Machine::rounded_product(read_element(f.other, first + i, n), z);
    }
    machine.wait();
    for (int i = 0; i < rows && here && warp == 0; ++i) {
      const float value = shared[i * kLanes + lane];
      if (one) {
        total = Machine::rounded_sum(total, value);
      } else {
        float* to = f.gain_grad.data + bank_row(f.gain_grad, f.context, first + i) * f.outputs + n;
        *to = f.context ? Machine::rounded_sum(*to, value) : value;
      }
    }
    machine.wait();
  }
  if (one && here && warp == 0) f.gain_grad.data[n] = total;
}

// Enqueues it; a cudaError_t.
int launch_finish(const Finish& finish, void* stream);

}  // namespace nmkern::cuda
