// x as the products' kernels multiply it: rows of whole, aligned patches of 16-bit elements.
//
//   x [M, K], in_gain -> pack_copy or pack_row -> Operand
//
// x that is that already is read where it lies. Else a kernel of its own writes it as that. (Each block of
// the product for small batches used to do it again, for its 512 outputs: some 75 instructions an element and
// two loads, one after the other; for 8 rows that is 600 where the 512 weights that they meet take 1,000.)
// Invariant: values are rounded as pack_row says, nowhere else.
#pragma once

#include "product.h"

namespace nmkern::cuda {

constexpr int kPacked = 8;         // elements that a thread packs at once
constexpr int kPackThreads = 512;  // 8192 elements of a row are two loads of each

struct Operand {
  const uint16_t* x;  // [parts, M, x_row_stride]
  int64_t x_row_stride, x_part_stride;
  const float* row_scale;    // [M]: what sums are multiplied by, or null
  int64_t batch, reduction;  // M; elements of a row, a multiple of a patch's
};

// x as whole, aligned patches, where it is not that already.
struct Pack {
  Matrix x;
  Bank in_gain;
  const int64_t* context;
  int64_t batch, reduction;  // M, K
  int64_t skip;              // elements of the first patch before x: zeros, as what follows it
  bool vectors;              // whether rows of x and in_gain can be read kPacked elements at a time
  int parts;                 // that elements become
  bool scaled;               // whether rows are: float16 of x times in_gain, or of float32; else x as it is
  uint16_t* to;              // [parts, M, row_stride]
  int64_t row_stride;        // a multiple of kPacked
  float* row_scale;          // [M], where they are
  NMKERN_HD int64_t count() const { return batch * (row_stride / kPacked); }
};

// Elements `at` * kPacked and on of an x that is multiplied as it is.
template <class Machine>
NMKERN_DEVICE void pack_copy(const Pack& p, const Machine& machine, int64_t at) {
  const int64_t m = at / (p.row_stride / kPacked), first = at % (p.row_stride / kPacked) * kPacked;
  const auto* x = static_cast<const uint16_t*>(p.x.data) + m * p.x.row_stride;
  uint32_t pair[kPacked / 2] = {};
#pragma unroll
  for (int i = 0; i < kPacked; ++i) {
    const int64_t k = first + i - p.skip;
    if (k >= 0 && k < p.reduction) pair[i / 2] |= uint32_t{x[k * p.x.col_stride]} << (i % 2 * 16);
  }
  machine.store_packed(p.to + m * p.row_stride + first, pair);
}

// Elements first - skip and on of row m, times those of `gain`; zeros outside of it.
template <class Machine>
NMKERN_DEVICE void packed_values(const Pack& p, const Machine& machine, int64_t m, const float* gain,
                                 int64_t first, float (&v)[kPacked]) {
  if (p.vectors && first + kPacked <= p.reduction) {
    float factor[kPacked] = {1, 1, 1, 1, 1, 1, 1, 1};
    if (gain) machine.load_floats(gain + first, factor);  // in flight before x is waited for
    if (p.x.dtype == Dtype::float32) {
      machine.load_floats(static_cast<const float*>(p.x.data) + m * p.x.row_stride + first, v);
    } else {
      uint32_t pair[kPacked / 4][2];
      machine.load_elements(static_cast<const uint16_t*>(p.x.data) + m * p.x.row_stride + first, pair);
#pragma unroll
      for (int i = 0; i < kPacked; ++i)
        v[i] = float_of_half(uint16_t(pair[i / 4][i / 2 % 2] >> (i % 2 * 16)), p.x.dtype);
    }
#pragma unroll
    for (int i = 0; i < kPacked; ++i) v[i] = Machine::rounded_product(v[i], factor[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kPacked; ++i) {
      const int64_t k = first + i - p.skip;
      const bool inside = k >= 0 && k < p.reduction;
      v[i] = inside ? read_element(p.x, m, k) : 0.0f;
      if (inside && gain) v[i] = Machine::rounded_product(v[i], gain[k]);
    }
  }
}

// A row of float32 as one or two float16 and a power of two: v = (first + second) * row_scale, but for what
// is rounded: at most 2^-11 of v by one, 2^-23 by two, or 2^-39 of the row's largest, which is scaled to
// [2^14, 2^15). float16 has 11 bits, and rounding to nearest leaves a signed rest of half its last place, so
// two hold 23 of the 24. (Ootomo & Yokota 2022, doi:10.1177/10943420221090256, scale all rows alike.) Three
// bfloat16, which are exact, take the tensor cores 1.5 times as long as two.
//
// One is what x of 16 bits times in_gain becomes: a product with stored weights would round it to the dtype
// of x, in float16 to the same 11 bits, in bfloat16 to 8, and take half the time that two take here. A block
// of kPackThreads takes row block_x; `largest` is its shared memory.
template <class Machine>
NMKERN_DEVICE void pack_row(const Pack& p, Machine& machine, uint32_t* largest) {
  const int64_t m = machine.block_x();
  const float* gain =
      p.in_gain.data ? p.in_gain.data + bank_row(p.in_gain, p.context, m) * p.reduction : nullptr;
  if (machine.thread() == 0) *largest = 0;
  machine.wait();
  uint32_t most = 0;  // magnitudes are ordered as their bits are; where one is not finite, no result is
  for (int64_t first = machine.thread() * kPacked; first < p.row_stride; first += kPackThreads * kPacked) {
    float v[kPacked];
    packed_values(p, machine, m, gain, first, v);
#pragma unroll
    for (int i = 0; i < kPacked; ++i) {
      const uint32_t magnitude = bits_of(v[i]) & 0x7FFFFFFF;
      if (magnitude > most) most = magnitude;
    }
  }
  machine.maximum(largest, most);
  machine.wait();
  // 2^(14 - e) for a largest of exponent e, biased; both it and its inverse are normal numbers.
  const uint32_t wanted = 2 * 127 + 14 - (*largest >> 23), exponent = wanted < 253 ? wanted : 253;
  const float scale = float_of(exponent << 23);
  if (machine.thread() == 0) p.row_scale[m] = float_of((2 * 127 - exponent) << 23);
  for (int64_t first = machine.thread() * kPacked; first < p.row_stride; first += kPackThreads * kPacked) {
    float v[kPacked];
    packed_values(p, machine, m, gain, first, v);
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
    machine.store_packed(p.to + m * p.row_stride + first, pair[0]);
    if (p.parts == 2) machine.store_packed(p.to + (p.batch + m) * p.row_stride + first, pair[1]);
  }
}

// Enqueues it on a cudaStream_t; a cudaError_t.
int launch_pack(const Pack& pack, void* stream);

}  // namespace nmkern::cuda
