// x as the products' kernels multiply it: rows of whole, aligned patches of 16-bit elements. Whether x is
// packed for that first, and where it lies then.
//
//   x [M, K], in_gain -> pack.cu -> Operand
//
// x that is that already is read where it lies. Else a kernel of its own writes it as that. (Each block of
// the product for small batches used to do it again, for its 512 outputs: some 75 instructions an element and
// two loads, one after the other; for 8 rows that is 600 where the 512 weights that they meet take 1,000.)
// Invariant: it follows from shapes, strides, dtypes and the alignment of addresses, never from the device.
#pragma once

#include <algorithm>

#include "dense.h"

namespace nmkern::cuda {

constexpr int kPacked = 8;         // elements that a thread packs at once
constexpr int kPackThreads = 512;  // 8192 elements of a row are two loads of each

struct Operand {
  const uint16_t* x;  // [parts, M, x_row_stride]
  int64_t x_row_stride, x_part_stride;
  const float* row_scale;    // [M]: what sums are multiplied by, or null
  int64_t batch, reduction;  // M; elements of a row, a multiple of a patch's
};

// A call's x and what it is multiplied by, from the first element of its first patch on.
struct Input {
  Matrix x;
  Bank in_gain;
  const int64_t* context;
  int64_t batch, reduction;  // M, K
  int64_t skip;              // elements of the first patch before x: zeros, as what follows it
  bool vectors;              // whether rows of x and in_gain can be read kPacked elements at a time
};

// x as whole, aligned patches, where it is not that already.
struct Pack : Input {
  int parts;           // that elements become
  bool scaled;         // whether rows are: float16 of x times in_gain, or of float32; else x as it is
  uint16_t* to;        // [parts, M, row_stride]
  int64_t row_stride;  // a multiple of kPacked
  float* row_scale;    // [M], where they are
  NMKERN_HD int64_t count() const { return batch * (row_stride / kPacked); }
};

// Enqueues it on a cudaStream_t; a cudaError_t.
int launch_pack(const Pack& pack, void* stream);

constexpr int64_t kAlignment = 64;  // bytes of what lies in scratch

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t aligned_up(int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; }

// Whether x is multiplied as it is: it has the tensor cores' dtypes, and no gain that would make it a
// float32.
inline bool is_operand(const Dense& call) { return call.x.dtype != Dtype::float32 && !call.in_gain.data; }

// Whether rows of x begin at multiples of so many bytes.
inline bool rows_at(const Dense& call, int64_t bytes) {
  const int64_t size = call.x.dtype == Dtype::float32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(call.x.data) % bytes == 0 &&
         (call.batch == 1 || call.x.row_stride * size % bytes == 0);
}

// Whether it is, in whole patches, each of a row aligned to its size.
inline bool is_aligned(const Dense& call, int64_t skip, int patch) {
  return is_operand(call) && call.x.col_stride == 1 && skip == 0 && call.inputs() % patch == 0 &&
         rows_at(call, 2 * std::min(patch, 8));
}

// Whether rows of x and in_gain can be read kPacked elements, 16 bytes or twice 16, at a time.
inline bool in_vectors(const Dense& call) {
  return call.x.col_stride == 1 && rows_at(call, 16) &&
         (!call.in_gain.data ||
          (call.inputs() % 4 == 0 && reinterpret_cast<uintptr_t>(call.in_gain.data) % 16 == 0));
}

// `skip`: elements of the reduction's first patch before x.
inline Input input_of(const Dense& call, int64_t skip) {
  return {call.x, call.in_gain, call.context, call.batch, call.inputs(), skip, in_vectors(call) && skip == 0};
}

struct Packing {
  Pack pack;
  bool packed;
  // Of x and of its scales, were it packed: splits leave room for them whether it is or not, so that the same
  // sums do not depend on where x lies.
  int64_t x_bytes, row_scale_bytes;
  int64_t most_bytes() const { return x_bytes + row_scale_bytes; }
  int64_t bytes() const { return packed ? most_bytes() : 0; }
};

// `patch`: elements of a patch along the reduction; a row that is packed has whole steps of `step`.
inline Packing packing_of(const Dense& call, int parts, int64_t skip, int patch, int64_t step) {
  const int64_t row_stride = ceil_div(skip + call.inputs(), step) * step;
  const bool scaled = !is_operand(call);
  Packing packing{};
  packing.packed = !is_aligned(call, skip, patch);
  packing.x_bytes = aligned_up(parts * call.batch * row_stride * 2);
  packing.row_scale_bytes = scaled ? aligned_up(4 * call.batch) : 0;
  packing.pack = {input_of(call, skip), parts, scaled, nullptr, row_stride, nullptr};
  return packing;
}

// Scratch that a call's sums may take, which decides how often the reduction is split: what x leaves, but
// half of it in any case. A reduction in one piece would leave most of a GPU idle.
inline int64_t sums_bytes(const Dense& call, const Packing& packing) {
  return std::max(call.most_scratch - packing.most_bytes(), call.most_scratch / 2);
}

// The product's x, packed into `scratch` where it is.
inline Operand place(Packing& packing, const Dense& call, unsigned char* scratch) {
  Pack& pack = packing.pack;
  if (!packing.packed)
    return {
        static_cast<const uint16_t*>(call.x.data), call.x.row_stride, 0, nullptr, call.batch, call.inputs()};
  pack.to = reinterpret_cast<uint16_t*>(scratch);
  if (pack.scaled) pack.row_scale = reinterpret_cast<float*>(scratch + packing.x_bytes);
  return {pack.to,        pack.row_stride, call.batch * pack.row_stride,
          pack.row_scale, call.batch,      pack.row_stride};
}

template <Family family, bool transposed, class Use>
auto with_operands(const Dense& call, const Use& use) {
  if (call.x.dtype == Dtype::float32) return use.template operator()<family, transposed, Dtype::float16, 2>();
  return call.x.dtype == Dtype::float16 || !is_operand(call)
             ? use.template operator()<family, transposed, Dtype::float16, 1>()
             : use.template operator()<family, transposed, Dtype::bfloat16, 1>();
}

template <Family family, class Use>
auto with_operands(const Dense& call, const Use& use) {
  return call.transposed ? with_operands<family, true>(call, use) : with_operands<family, false>(call, use);
}

// Calls use.template operator()<family, transposed, operand, parts>() with what a call multiplies: its
// weights, and an element of x as so many parts of the tensor cores' dtype `operand`.
template <class Use>
auto with_operands(const Dense& call, const Use& use) {
  switch (call.family) {
    case Family::rademacher:
      return with_operands<Family::rademacher>(call, use);
    case Family::uniform:
      return with_operands<Family::uniform>(call, use);
    default:
      return with_operands<Family::normal>(call, use);
  }
}

}  // namespace nmkern::cuda
