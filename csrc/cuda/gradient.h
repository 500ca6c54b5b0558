// The second stage of a dense product with the gradient of a gain: y and z as in finish.h, and
//
//   gain_grad[c, n] = sum over the rows m of c: other[m, n] * z[m, n]
//
//   partial, other -> (index_rows) -> finish_with_gradient -> y, sums of chunks -> (gather) -> gain_grad
//
// A block owns 32 outputs of a chunk of 128 rows, whatever the contexts are: one that has all rows keeps as
// many blocks at work as one of each row. Sums of a chunk go straight into gain_grad where there is one chunk
// only, so that a small batch takes one launch. Else they overwrite partial sums that the block has read and
// no other block reads: that of the chunk's first row, or of a context's first row in the chunk. gather adds
// them up; by context, index_rows has told it where they are, and the blocks which rows belong together.
//
// Invariant: bits are a function of shapes and contexts; there are no atomics. The sum of a chunk is that of
// its eight warps upward, each of its rows upward (gain_grad of one row), or of the context's rows upward; the
// chunks' are added upward to what is there.
#pragma once

#include "finish.h"

namespace nmkern::cuda {

// Eight warps of 16 rows, in two turns of eight: 16 loads in flight in each, with other's.
constexpr int kChunkRows = 128;
constexpr int kGradientWarps = 8;
constexpr int kGradientThreads = kGradientWarps * kLanes;

enum class Gradient { of_one, of_each, by_context };  // rows of gain_grad: one, one for each row, contexts

inline Gradient gradient_of(const Finish& f) {
  return f.gain_grad.rows == 1 ? Gradient::of_one : f.context ? Gradient::by_context : Gradient::of_each;
}

// The rows of a chunk by context: order has them sorted, each context's upward; count and start are those of a
// context at its first row, count is 0 elsewhere.
struct RowGroups {
  uint8_t order[kChunkRows], start[kChunkRows], count[kChunkRows];
};

constexpr uint8_t kAbsent = 255;  // from a chunk: a context, whose first row it else is
static_assert(kChunkRows < kAbsent && kChunkRows <= kGradientThreads);

// Of an index: RowGroups of each chunk, then the contexts of each.
NMKERN_HD int64_t chunks_of(int64_t batch) { return (batch + kChunkRows - 1) / kChunkRows; }
NMKERN_HD int64_t contexts_stride(const Finish& f) { return (f.gain_grad.rows + 3) / 4 * 4; }
NMKERN_HD RowGroups* groups_of(const Finish& f, int64_t chunk) {
  return reinterpret_cast<RowGroups*>(f.index) + chunk;
}
NMKERN_HD uint8_t* contexts_of(const Finish& f, int64_t chunk) {
  return reinterpret_cast<uint8_t*>(groups_of(f, chunks_of(f.batch))) + chunk * contexts_stride(f);
}

// Of scratch that a chunk takes where there are more than one.
inline int64_t chunk_index_bytes(const Finish& f) { return int64_t{sizeof(RowGroups)} + contexts_stride(f); }
inline int64_t index_bytes(const Finish& f) {
  const bool indexed = f.gain_grad.data && gradient_of(f) == Gradient::by_context && f.batch > kChunkRows;
  return indexed ? chunks_of(f.batch) * chunk_index_bytes(f) : 0;
}

// Blocks of gather: 256 outputs of a context, or where rows are fewer, of the context of a row.
inline int64_t gather_blocks_x(const Finish& f) {
  return (f.outputs + kGradientThreads - 1) / kGradientThreads;
}
inline int64_t gather_rows(const Finish& f) {
  if (f.batch <= kChunkRows || gradient_of(f) == Gradient::of_each) return 0;
  return f.gain_grad.rows < f.batch ? f.gain_grad.rows : f.batch;
}

NMKERN_DEVICE int chunk_rows(const Finish& f, int64_t first) {
  return int(f.batch - first < kChunkRows ? f.batch - first : kChunkRows);
}
NMKERN_DEVICE float* partial_at(const Finish& f, int64_t m, int64_t n) {
  return f.partial + m * f.partial_stride + f.skip + n;
}

// The groups of a chunk's rows: of thread i, row i, which has context `mine`. Shared memory `context` has them
// afterwards, in range.
template <class Machine>
NMKERN_DEVICE void group_rows(const Finish& f, Machine& machine, int rows, int64_t mine, int64_t* context,
                              RowGroups& groups) {
  const int row = machine.thread();
  if (row < rows) context[row] = bank_row(f.gain_grad, &mine, 0);
  machine.wait();
  if (row < rows) {
    const int64_t here = context[row];
    int less = 0, equal = 0, before = 0;
#pragma unroll 4
    for (int i = 0; i < rows; ++i) {
      less += context[i] < here;
      equal += context[i] == here;
      before += context[i] == here && i < row;
    }
    groups.order[less + before] = uint8_t(row);
    groups.start[row] = uint8_t(less);
    groups.count[row] = uint8_t(before ? 0 : equal);
  }
  machine.wait();
}

struct IndexShared {
  int64_t context[kChunkRows];
  RowGroups groups;
};

// Block x takes chunk x.
template <class Machine>
NMKERN_DEVICE void index_rows(const Finish& f, Machine& machine, unsigned char* shared) {
  auto& memory = *reinterpret_cast<IndexShared*>(shared);
  const int64_t chunk = machine.block_x(), first = chunk * kChunkRows;
  const int rows = chunk_rows(f, first), row = machine.thread();
  auto* words = reinterpret_cast<uint32_t*>(contexts_of(f, chunk));
  for (int64_t i = row; i < contexts_stride(f) / 4; i += kGradientThreads) words[i] = kAbsent * 0x01010101u;
  group_rows(f, machine, rows, row < rows ? f.context[first + row] : 0, memory.context, memory.groups);
  if (row >= rows) return;
  RowGroups& groups = *groups_of(f, chunk);
  groups.order[row] = memory.groups.order[row];
  groups.start[row] = memory.groups.start[row];
  groups.count[row] = memory.groups.count[row];
  if (memory.groups.count[row]) contexts_of(f, chunk)[memory.context[row]] = uint8_t(row);
}

// Elements of column n: their bits as they lie there, so that no load waits for another.
template <int count>
NMKERN_DEVICE void load_rows(const Matrix& a, int64_t first, int rows, int64_t n, uint32_t (&bits)[count]) {
  const int64_t at = first * a.row_stride + n * a.col_stride;
  if (a.dtype == Dtype::float32) {
    const float* from = static_cast<const float*>(a.data) + at;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      bits[i] = bits_of(*from);
      from += i + 1 < rows ? a.row_stride : 0;
    }
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(a.data) + at;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      bits[i] = *from;
      from += i + 1 < rows ? a.row_stride : 0;
    }
  }
}

template <int count>
NMKERN_DEVICE void values_of(Dtype dtype, const uint32_t (&bits)[count], float (&value)[count]) {
  if (dtype == Dtype::float32) {
#pragma unroll
    for (int i = 0; i < count; ++i) value[i] = float_of(bits[i]);
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) value[i] = float_of_half(uint16_t(bits[i]), dtype);
  }
}

// Output n of the rows [first, first + rows), at most `count`: y, and other * z.
template <class Machine, int count>
NMKERN_DEVICE void product_rows(const Finish& f, int64_t first, int rows, int64_t n, float (&product)[count]) {
  const bool modulated = f.y.data && f.out_gain.data;
  float gain[count] = {}, z[count];
  uint32_t bits[count];
  if (modulated) load_vectors(f, f.out_gain, first, rows, n, gain);
  load_rows(f.other, first, rows, n, bits);
  unmodulated<Machine>(f, first, rows, n, z);
  values_of(f.other.dtype, bits, product);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    product[i] = Machine::rounded_product(product[i], z[i]);
    if (modulated) z[i] = Machine::rounded_product(z[i], gain[i]);
  }
  if (f.y.data) store_rows(f.y, first, rows, n, z);
}

struct GradientShared {
  float product[kChunkRows * kLanes];
  int64_t context[kChunkRows];
  RowGroups groups;
};
NMKERN_HD constexpr int gradient_shared_bytes(Gradient kind) {
  return kind == Gradient::by_context ? int(sizeof(GradientShared))
         : kind == Gradient::of_one   ? kGradientThreads * 4
                                      : 0;
}

// Threads of a block: a warp for each row of the least batches.
inline int gradient_threads(const Finish& f) {
  return f.batch < kGradientWarps ? int(f.batch) * kLanes : kGradientThreads;
}

// Block (x, y) takes outputs 32 x and on, of chunk y.
template <Gradient kind, class Machine>
NMKERN_DEVICE void finish_with_gradient(const Finish& f, Machine& machine, unsigned char* shared) {
  const int warp = machine.thread() / kLanes, lane = machine.lane();
  const int64_t n = int64_t{machine.block_x()} * kLanes + lane;
  const int64_t chunk = machine.block_y(), first = chunk * kChunkRows;
  const int rows = chunk_rows(f, first), share = (rows + kGradientWarps - 1) / kGradientWarps;
  const int end = (warp + 1) * share < rows ? (warp + 1) * share : rows;
  const bool here = n < f.outputs, only = f.batch <= kChunkRows;
  auto& memory = *reinterpret_cast<GradientShared*>(shared);

  // What the groups of rows need, here, so that it has come by then.
  constexpr int kWords = sizeof(RowGroups) / 4;
  int64_t mine = 0;
  uint32_t word = 0;
  if constexpr (kind == Gradient::by_context) {
    if (only && machine.thread() < rows) mine = f.context[machine.thread()];
    if (!only && machine.thread() < kWords)
      word = reinterpret_cast<const uint32_t*>(groups_of(f, chunk))[machine.thread()];
  }

  float sum = 0;
  const auto take = [&](int row, int left, const auto& product) {
#pragma unroll
    for (int i = 0; i < int(sizeof product / sizeof product[0]); ++i) {
      if (i >= left) continue;
      if constexpr (kind == Gradient::of_one) sum = Machine::rounded_sum(sum, product[i]);
      if constexpr (kind == Gradient::of_each) f.gain_grad.data[(first + row + i) * f.outputs + n] = product[i];
      if constexpr (kind == Gradient::by_context) memory.product[(row + i) * kLanes + lane] = product[i];
    }
  };
  // Few rows of many splits are taken one by one: 16 loads in flight either way, and fewer turns.
  for (int row = warp * share; row < end && here;) {
    const int left = end - row < kRowsAtOnce ? end - row : kRowsAtOnce;
    if (left * kLoads > kRowsAtOnce * f.splits) {
      float product[kRowsAtOnce];
      product_rows<Machine>(f, first + row, left, n, product);
      take(row, left, product);
      row += left;
    } else {
      float product[1];
      product_rows<Machine>(f, first + row, 1, n, product);
      take(row, 1, product);
      ++row;
    }
  }

  if constexpr (kind == Gradient::of_one) {
    auto* sums = reinterpret_cast<float*>(shared);
    sums[machine.thread()] = sum;
    machine.wait();
    if (warp > 0 || !here) return;
#pragma unroll
    for (int i = 1; i < kGradientWarps; ++i)
      if (i < f.batch) sum = Machine::rounded_sum(sum, sums[i * kLanes + lane]);
    float* to = only ? f.gain_grad.data + n : partial_at(f, first, n);
    *to = only && f.add ? Machine::rounded_sum(*to, sum) : sum;
  }
  if constexpr (kind == Gradient::by_context) {
    if (only) {
      group_rows(f, machine, rows, mine, memory.context, memory.groups);
    } else {
      if (machine.thread() < kWords) reinterpret_cast<uint32_t*>(&memory.groups)[machine.thread()] = word;
      machine.wait();
    }
    for (int row = warp; row < rows && here; row += kGradientWarps) {
      const int count = memory.groups.count[row];
      if (count == 0) continue;
      const uint8_t* order = memory.groups.order + memory.groups.start[row];
      sum = memory.product[row * kLanes + lane];
#pragma unroll 8
      for (int i = 1; i < count; ++i) sum = Machine::rounded_sum(sum, memory.product[order[i] * kLanes + lane]);
      if (only) {
        float* to = f.gain_grad.data + memory.context[row] * f.outputs + n;
        *to = Machine::rounded_sum(*to, sum);
      } else {
        *partial_at(f, first + row, n) = sum;
      }
    }
  }
}

// Block (x, y) takes outputs 256 x and on, of row y of gain_grad; or where rows are fewer than contexts, of the
// context of row y of the batch, if it is the context's first.
template <Gradient kind, class Machine>
NMKERN_DEVICE void gather(const Finish& f, const Machine& machine, int64_t block_x, int64_t block_y) {
  const int64_t n = block_x * kGradientThreads + machine.thread();
  if (n >= f.outputs) return;
  const bool by_row = f.gain_grad.rows > f.batch;
  const int64_t to_row = by_row ? bank_row(f.gain_grad, f.context, block_y) : block_y;
  float* to = f.gain_grad.data + to_row * f.outputs + n;
  const int64_t chunks = chunks_of(f.batch);
  float sum = kind == Gradient::by_context || f.add ? *to : 0;
  bool any = false;
  for (int64_t first = 0; first < chunks; first += kRowsAtOnce) {
    const int left = int(chunks - first < kRowsAtOnce ? chunks - first : kRowsAtOnce);
    int row[kRowsAtOnce];
    float part[kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i)
      row[i] = i >= left                      ? kAbsent
               : kind == Gradient::by_context ? contexts_of(f, first + i)[to_row]
                                              : 0;
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i)
      part[i] = row[i] == kAbsent ? 0 : *partial_at(f, (first + i) * kChunkRows + row[i], n);
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (row[i] == kAbsent) continue;
      if (by_row && !any && (first + i) * kChunkRows + row[i] != block_y) return;
      any = true;
      sum = Machine::rounded_sum(sum, part[i]);
    }
  }
  if (any) *to = sum;
}

}  // namespace nmkern::cuda
