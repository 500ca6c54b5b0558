// The second stage of a dense product with the gradient of a gain: finish.h says what it computes.
//
//   partial, other -> (index_kernel) -> gradient_kernel -> y, sums of chunks -> (gather_kernel) -> gain_grad
//
// A block owns 32 outputs of a chunk of 128 rows, whatever the contexts are: one that has all rows keeps as
// many blocks at work as one of each row. Sums of a chunk go straight into gain_grad where there is one chunk
// only, so that a small batch takes one launch. Else they overwrite partial sums that the block has read and
// no other block reads: that of the chunk's first row, or of a context's first row in the chunk.
// gather_kernel adds them up; by context, index_kernel has told it where they are, and the blocks which rows
// belong together.
//
// Invariant: there are no atomics. The sum of a chunk is that of its eight warps upward, each of its rows
// upward (gain_grad of one row), or of the context's rows upward; the chunks' are added upward to what is
// there.
#include "enqueue.h"
#include "finish.cuh"

namespace nmkern::cuda {
namespace {

NMKERN_DEVICE int chunk_rows(const Finish& f, int64_t first) {
  return int(f.batch - first < kChunkRows ? f.batch - first : kChunkRows);
}
NMKERN_DEVICE RowGroups* groups_of(const Finish& f, int64_t chunk) {
  return reinterpret_cast<RowGroups*>(f.index) + chunk;
}
NMKERN_DEVICE uint8_t* contexts_of(const Finish& f, int64_t chunk) {
  return reinterpret_cast<uint8_t*>(groups_of(f, chunks_of(f.batch))) + chunk * contexts_stride(f);
}
NMKERN_DEVICE float* partial_at(const Finish& f, int64_t m, int64_t n) {
  return f.partial + m * f.partial_stride + f.skip + n;
}

// The groups of a chunk's rows: of thread i, row i, which has context `mine`. Shared memory `context` has
// them afterwards, in range.
NMKERN_DEVICE void group_rows(const Finish& f, int rows, int64_t mine, int64_t* context, RowGroups& groups) {
  const int row = thread_id();
  if (row < rows) context[row] = bank_row(f.gain_grad, &mine, 0);
  __syncthreads();
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
  __syncthreads();
}

// Block x takes chunk x.
__global__ void __launch_bounds__(kGradientThreads) index_kernel(const Finish f) {
  __shared__ int64_t context[kChunkRows];
  __shared__ RowGroups groups;
  await_previous();
  const int64_t chunk = blockIdx.x, first = chunk * kChunkRows;
  const int rows = chunk_rows(f, first), row = thread_id();
  auto* words = reinterpret_cast<uint32_t*>(contexts_of(f, chunk));
  for (int64_t i = row; i < contexts_stride(f) / 4; i += kGradientThreads) words[i] = kAbsent * 0x01010101u;
  group_rows(f, rows, row < rows ? f.context[first + row] : 0, context, groups);
  if (row >= rows) return;
  RowGroups& to = *groups_of(f, chunk);
  to.order[row] = groups.order[row];
  to.start[row] = groups.start[row];
  to.count[row] = groups.count[row];
  if (groups.count[row]) contexts_of(f, chunk)[context[row]] = uint8_t(row);
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
template <int count>
NMKERN_DEVICE void product_rows(const Finish& f, int64_t first, int rows, int64_t n,
                                float (&product)[count]) {
  const bool modulated = f.y.data && f.out_gain.data;
  float gain[count] = {}, z[count];
  uint32_t bits[count];
  if (modulated) load_vectors(f, f.out_gain, first, rows, n, gain);
  load_rows(f.other, first, rows, n, bits);
  unmodulated(f, first, rows, n, z);
  values_of(f.other.dtype, bits, product);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    product[i] = __fmul_rn(product[i], z[i]);
    if (modulated) z[i] = __fmul_rn(z[i], gain[i]);
  }
  if (f.y.data) store_rows(f.y, first, rows, n, z);
}

struct GradientShared {
  float product[kChunkRows * kLanes];
  int64_t context[kChunkRows];
  RowGroups groups;
};

template <Gradient kind>
constexpr int kSharedBytes = kind == Gradient::by_context ? int(sizeof(GradientShared))
                             : kind == Gradient::of_one   ? kGradientThreads * 4
                                                          : 0;

// Block (x, y) takes outputs 32 x and on, of chunk y. Three blocks a multiprocessor: left to choose, ptxas
// aimed at four, and with 64 registers let most loads of a turn wait for each other.
template <Gradient kind>
__global__ void __launch_bounds__(kGradientThreads, 3) gradient_kernel(const Finish f) {
  __shared__ __align__(16) unsigned char shared[kSharedBytes<kind> + 16];
  await_previous();
  const int warp = thread_id() / kLanes, lane = lane_id();
  const int64_t n = int64_t{blockIdx.x} * kLanes + lane;
  const int64_t chunk = blockIdx.y, first = chunk * kChunkRows;
  const int rows = chunk_rows(f, first), share = (rows + kGradientWarps - 1) / kGradientWarps;
  const int end = (warp + 1) * share < rows ? (warp + 1) * share : rows;
  const bool here = n < f.outputs, only = f.batch <= kChunkRows;
  auto& memory = *reinterpret_cast<GradientShared*>(shared);

  // What the groups of rows need, here, so that it has come by then.
  constexpr int kWords = sizeof(RowGroups) / 4;
  int64_t mine = 0;
  uint32_t word = 0;
  if constexpr (kind == Gradient::by_context) {
    if (only && thread_id() < rows) mine = f.context[thread_id()];
    if (!only && thread_id() < kWords)
      word = reinterpret_cast<const uint32_t*>(groups_of(f, chunk))[thread_id()];
  }

  float sum = 0;
  const auto take = [&](int row, int left, const auto& product) {
#pragma unroll
    for (int i = 0; i < int(sizeof product / sizeof product[0]); ++i) {
      if (i >= left) continue;
      if constexpr (kind == Gradient::of_one) sum = __fadd_rn(sum, product[i]);
      if constexpr (kind == Gradient::of_each)
        f.gain_grad.data[(first + row + i) * f.outputs + n] = product[i];
      if constexpr (kind == Gradient::by_context) memory.product[(row + i) * kLanes + lane] = product[i];
    }
  };
  // Few rows of many splits are taken one by one: 16 loads in flight either way, and fewer turns.
  for (int row = warp * share; row < end && here;) {
    const int left = end - row < kRowsAtOnce ? end - row : kRowsAtOnce;
    if (left * kLoads > kRowsAtOnce * f.splits) {
      float product[kRowsAtOnce];
      product_rows(f, first + row, left, n, product);
      take(row, left, product);
      row += left;
    } else {
      float product[1];
      product_rows(f, first + row, 1, n, product);
      take(row, 1, product);
      ++row;
    }
  }

  if constexpr (kind == Gradient::of_one) {
    auto* sums = reinterpret_cast<float*>(shared);
    sums[thread_id()] = sum;
    __syncthreads();
    if (warp > 0 || !here) return;
#pragma unroll
    for (int i = 1; i < kGradientWarps; ++i)
      if (i < f.batch) sum = __fadd_rn(sum, sums[i * kLanes + lane]);
    float* to = only ? f.gain_grad.data + n : partial_at(f, first, n);
    *to = only && f.add ? __fadd_rn(*to, sum) : sum;
  }
  if constexpr (kind == Gradient::by_context) {
    if (only) {
      group_rows(f, rows, mine, memory.context, memory.groups);
    } else {
      if (thread_id() < kWords) reinterpret_cast<uint32_t*>(&memory.groups)[thread_id()] = word;
      __syncthreads();
    }
    for (int row = warp; row < rows && here; row += kGradientWarps) {
      const int count = memory.groups.count[row];
      if (count == 0) continue;
      const uint8_t* order = memory.groups.order + memory.groups.start[row];
      sum = memory.product[row * kLanes + lane];
#pragma unroll 8
      for (int i = 1; i < count; ++i) sum = __fadd_rn(sum, memory.product[order[i] * kLanes + lane]);
      if (only) {
        float* to = f.gain_grad.data + memory.context[row] * f.outputs + n;
        *to = __fadd_rn(*to, sum);
      } else {
        *partial_at(f, first + row, n) = sum;
      }
    }
  }
}

// Block y * blocks_x + x takes outputs 256 x and on, of row y of gain_grad; or where rows are fewer than
// contexts, of the context of row y of the batch, if it is the context's first.
template <Gradient kind>
__global__ void __launch_bounds__(kGradientThreads) gather_kernel(const Finish f, uint32_t blocks_x) {
  await_previous();
  const int64_t block_x = blockIdx.x % blocks_x, block_y = blockIdx.x / blocks_x;
  const int64_t n = block_x * kGradientThreads + thread_id();
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
      row[i] = i >= left ? kAbsent : kind == Gradient::by_context ? contexts_of(f, first + i)[to_row] : 0;
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i)
      part[i] = row[i] == kAbsent ? 0 : *partial_at(f, (first + i) * kChunkRows + row[i], n);
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (row[i] == kAbsent) continue;
      if (by_row && !any && (first + i) * kChunkRows + row[i] != block_y) return;
      any = true;
      sum = __fadd_rn(sum, part[i]);
    }
  }
  if (any) *to = sum;
}

// Threads of a block: a warp for each row of the least batches.
int gradient_threads(const Finish& f) {
  return f.batch < kGradientWarps ? int(f.batch) * kLanes : kGradientThreads;
}

// Blocks of gather: 256 outputs of a context, or where rows are fewer, of the context of a row.
int64_t gather_blocks_x(const Finish& f) { return (f.outputs + kGradientThreads - 1) / kGradientThreads; }
int64_t gather_rows(const Finish& f) {
  if (f.batch <= kChunkRows || gradient_of(f) == Gradient::of_each) return 0;
  return f.gain_grad.rows < f.batch ? f.gain_grad.rows : f.batch;
}

template <Gradient kind>
int launch(const Finish& f, cudaStream_t on) {
  const auto chunks = uint32_t(chunks_of(f.batch));
  if (index_bytes(f))
    if (const int error = enqueue(index_kernel, chunks, kGradientThreads, 0, on, f)) return error;
  const dim3 grid(uint32_t((f.outputs + kLanes - 1) / kLanes), chunks);
  if (const int error = enqueue(gradient_kernel<kind>, grid, gradient_threads(f), 0, on, f)) return error;
  if constexpr (kind != Gradient::of_each)
    if (const int64_t rows = gather_rows(f)) {
      const int64_t blocks_x = gather_blocks_x(f);
      return enqueue(gather_kernel<kind>, uint32_t(blocks_x * rows), kGradientThreads, 0, on, f,
                     uint32_t(blocks_x));
    }
  return cudaSuccess;
}

}  // namespace

int launch_gradient(const Finish& f, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (gradient_of(f)) {
    case Gradient::of_one:
      return launch<Gradient::of_one>(f, on);
    case Gradient::of_each:
      return launch<Gradient::of_each>(f, on);
    default:
      return launch<Gradient::by_context>(f, on);
  }
}

}  // namespace nmkern::cuda
