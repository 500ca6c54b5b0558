// x packed on the device, and the launcher; pack_plan.h says when, and what for.
//
// Invariant: values are rounded as pack_row_kernel says, nowhere else.
#include "elements.cuh"
#include "enqueue.h"
#include "input.cuh"

namespace nmkern::cuda {
namespace {

NMKERN_DEVICE void store_packed(uint16_t* to, const uint32_t (&pair)[kPacked / 2]) {
  *reinterpret_cast<uint4*>(to) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
}

// An x that is multiplied as it is: a thread has kPacked elements.
__global__ void __launch_bounds__(kPackThreads) pack_copy_kernel(const Pack p) {
  await_previous();
  const int64_t at = int64_t{blockIdx.x} * kPackThreads + threadIdx.x;
  if (at >= p.count()) return;
  const int64_t m = at / (p.row_stride / kPacked), first = at % (p.row_stride / kPacked) * kPacked;
  const auto* x = static_cast<const uint16_t*>(p.x.data) + m * p.x.row_stride;
  uint32_t pair[kPacked / 2] = {};
#pragma unroll
  for (int i = 0; i < kPacked; ++i) {
    const int64_t k = first + i - p.skip;
    if (k >= 0 && k < p.reduction) pair[i / 2] |= uint32_t{x[k * p.x.col_stride]} << (i % 2 * 16);
  }
  store_packed(p.to + m * p.row_stride + first, pair);
}

// A row of float32 as one or two float16 and a power of two: v = (first + second) * row_scale, but for what
// is rounded: at most 2^-11 of v by one, 2^-23 by two, or 2^-39 of the row's largest, which is scaled to
// [2^14, 2^15). float16 has 11 bits, and rounding to nearest leaves a signed rest of half its last place, so
// two hold 23 of the 24. (Ootomo & Yokota 2022, doi:10.1177/10943420221090256, scale all rows alike.) Three
// bfloat16, which are exact, take the tensor cores 1.5 times as long as two.
//
// One is what x of 16 bits times in_gain becomes: a product with stored weights would round it to the dtype
// of x, in float16 to the same 11 bits, in bfloat16 to 8, and take half the time that two take here.
//
// Block x takes row x. One block a multiprocessor is enough: left to choose, ptxas aimed at three and
// spilled.
__global__ void __launch_bounds__(kPackThreads, 1) pack_row_kernel(const Pack p) {
  __shared__ uint32_t largest;
  await_previous();
  const int64_t m = blockIdx.x;
  const float* gain =
      p.in_gain.data ? p.in_gain.data + bank_row(p.in_gain, p.context, m) * p.reduction : nullptr;
  if (thread_id() == 0) largest = 0;
  __syncthreads();
  uint32_t most = 0;  // magnitudes are ordered as their bits are; where one is not finite, no result is
  for (int64_t first = thread_id() * kPacked; first < p.row_stride; first += kPackThreads * kPacked) {
    float v[kPacked];
    input_values(p, m, gain, first, v);
#pragma unroll
    for (int i = 0; i < kPacked; ++i) {
      const uint32_t magnitude = bits_of(v[i]) & 0x7FFFFFFF;
      if (magnitude > most) most = magnitude;
    }
  }
  most = __reduce_max_sync(0xFFFFFFFF, most);
  if (lane_id() == 0) atomicMax(&largest, most);
  __syncthreads();
  // 2^(14 - e) for a largest of exponent e, biased; both it and its inverse are normal numbers.
  const uint32_t wanted = 2 * 127 + 14 - (largest >> 23), exponent = wanted < 253 ? wanted : 253;
  const float scale = float_of(exponent << 23);
  if (thread_id() == 0) p.row_scale[m] = float_of((2 * 127 - exponent) << 23);
  for (int64_t first = thread_id() * kPacked; first < p.row_stride; first += kPackThreads * kPacked) {
    float v[kPacked];
    input_values(p, m, gain, first, v);
    uint32_t pair[2][kPacked / 2] = {};
#pragma unroll
    for (int i = 0; i < kPacked; ++i) {
      const float scaled = v[i] * scale;
      const uint16_t upper = half_of(scaled, Dtype::float16);
      pair[0][i / 2] |= uint32_t{upper} << (i % 2 * 16);
      if (p.parts == 1) continue;
      const float rest = scaled - float_of_half(upper, Dtype::float16);
      // What is not finite has no rest: the difference would be a NaN.
      const uint16_t lower = rest == rest ? half_of(rest, Dtype::float16) : 0;
      pair[1][i / 2] |= uint32_t{lower} << (i % 2 * 16);
    }
    store_packed(p.to + m * p.row_stride + first, pair[0]);
    if (p.parts == 2) store_packed(p.to + (p.batch + m) * p.row_stride + first, pair[1]);
  }
}

}  // namespace

int launch_pack(const Pack& pack, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (pack.scaled) return enqueue(pack_row_kernel, uint32_t(pack.batch), kPackThreads, 0, on, pack);
  const int64_t blocks = (pack.count() + kPackThreads - 1) / kPackThreads;
  return enqueue(pack_copy_kernel, uint32_t(blocks), kPackThreads, 0, on, pack);
}

}  // namespace nmkern::cuda
