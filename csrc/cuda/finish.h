// The second stage of a dense product: sums of the splits, the modulation, the gradient of a gain.
//
//   z[m, n] = factor * sum_s partial[s, m, n]
//   y[m, n] = z[m, n] * out_gain[c, n] + bias[c, n]                                (finish.cu)
//   gain_grad[c, n] = sum over the rows m of c: other[m, n] * z[m, n]              (gradient.cu, with y)
//
// Here is what the kernels take, how they part it, and what their index needs of scratch.
// Invariant: bits are a function of shapes and contexts. Each step rounds on its own, the splits are summed
// upward; for the order of a gradient's sums, see gradient.cu.
#pragma once

#include "dense.h"
#include "fragment.h"

namespace nmkern::cuda {

constexpr int kLoads = 16;      // of partial sums that a thread has in flight
constexpr int kRowsAtOnce = 8;  // of a large batch

struct Finish {
  float* partial;                        // the gradient's stages write sums over the one that they have read
  int64_t splits, partial_stride, skip;  // skip: outputs of the first patch before the matrix
  int64_t batch, outputs;
  float factor;
  Bank out_gain, bias;
  const int64_t* context;
  Matrix y;
  Matrix other;
  Bank gain_grad;
  bool add;              // to a gain_grad of one row, instead of overwriting it
  unsigned char* index;  // of index_bytes
};

inline Finish finish_of(const Dense& call, int64_t splits, int64_t stride, int64_t skip) {
  Finish f{};
  f.splits = splits;
  f.partial_stride = stride;
  f.skip = skip;
  f.batch = call.batch;
  f.outputs = call.outputs();
  f.factor = call.factor;
  f.out_gain = call.out_gain;
  f.bias = call.bias;
  f.context = call.context;
  f.y = call.y;
  f.other = call.other;
  f.gain_grad = call.gain_grad;
  return f;
}

// Rows that a thread takes there: one where splits keep loads in flight enough, or where eight a thread would
// leave multiprocessors of an H100 idle (132 of 768 threads).
inline int rows_at_once(const Finish& f) {
  const bool many = f.batch >= kRowsAtOnce && f.batch * f.outputs >= int64_t{1} << 20;
  return many && f.splits <= kLoads / kRowsAtOnce ? kRowsAtOnce : 1;
}

// Eight warps of 16 rows, in two turns of eight: 16 loads in flight in each, with other's.
constexpr int kChunkRows = 128;
constexpr int kGradientWarps = 8;
constexpr int kGradientThreads = kGradientWarps * kLanes;

enum class Gradient { of_one, of_each, by_context };  // rows of gain_grad: one, one for each row, contexts

inline Gradient gradient_of(const Finish& f) {
  return f.gain_grad.rows == 1 ? Gradient::of_one : f.context ? Gradient::by_context : Gradient::of_each;
}

// The rows of a chunk by context: order has them sorted, each context's upward; count and start are those of
// a context at its first row, count is 0 elsewhere.
struct RowGroups {
  uint8_t order[kChunkRows], start[kChunkRows], count[kChunkRows];
};

constexpr uint8_t kAbsent = 255;  // from a chunk: a context, whose first row it else is
static_assert(kChunkRows < kAbsent && kChunkRows <= kGradientThreads);

// Of an index: RowGroups of each chunk, then the contexts of each.
NMKERN_HD int64_t chunks_of(int64_t batch) { return (batch + kChunkRows - 1) / kChunkRows; }
NMKERN_HD int64_t contexts_stride(const Finish& f) { return (f.gain_grad.rows + 3) / 4 * 4; }

// Of scratch that a chunk takes where there are more than one.
inline int64_t chunk_index_bytes(const Finish& f) { return int64_t{sizeof(RowGroups)} + contexts_stride(f); }
inline int64_t index_bytes(const Finish& f) {
  const bool indexed = f.gain_grad.data && gradient_of(f) == Gradient::by_context && f.batch > kChunkRows;
  return indexed ? chunks_of(f.batch) * chunk_index_bytes(f) : 0;
}

// Enqueues it, with the gradient where there is one; a cudaError_t.
int launch_finish(const Finish& finish, void* stream);
int launch_gradient(const Finish& finish, void* stream);  // where there is one

}  // namespace nmkern::cuda
