// The sparse projection: x in shared memory forward, and an index of bits transposed.
//
//   y[m, n] = factor * sum over s < fan_in: x[m, column(n, s)]                               (forward_kernel)
//   y[m, k] = factor * sum over the rows n that drew k, upward: x[m, n]        (prepare_kernel,
//   column_kernel)
//
// Forward, a block holds all columns of some rows of x and draws the columns of its units itself, so that one
// launch does it all: x -> stage_tile -> shared memory -> gather -> y. Where the draws of a block's units
// have no room beside the tile, draw_kernel has drawn them into memory before.
//
// Transposed, bit n of column k says whether row n drew k: a row draws a column at most once, and which of
// two rows set its bit first leaves no trace. A warp owns a column, lists its rows and adds what x has for
// them, 128 rows of the batch at a time, from x transposed, where those are neighbours.
//
// Invariant: a sum has one owner, and the order of the draws or of the rows; the only atomics set bits.
//
// sparse_plan.h says which kernels serve a call.
#include "enqueue.h"
#include "sparse.h"
#include "sparse_plan.h"
#include "sparse_tile.cuh"

namespace nmkern::cuda {
namespace {

// Four values of neighbouring columns; `fours`: takes_four(y), and then col is a multiple of 4.
NMKERN_DEVICE void write_four(const Matrix& y, bool fours, int64_t row, int64_t col, int64_t cols,
                              const Four& value) {
  if (fours && col + kEach <= cols) {
    store_four(y, row, col, value.v);
    return;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (col + i < cols) write_element(y, row, col + i, value.v[i]);
}

template <class T>
__global__ void __launch_bounds__(kDrawThreads) draw_kernel(const Drawing p) {
  await_previous();
  draw_columns<T>(p);
}

template <class T>
__global__ void __launch_bounds__(kTileThreads) forward_kernel(const Forward p) {
  extern __shared__ __align__(128) unsigned char shared[];
  await_previous();
  auto* tile = reinterpret_cast<float*>(shared);
  auto* table = reinterpret_cast<uint32_t*>(shared + T::bytes(p.source.cols));
  const int64_t batch_first = int64_t{blockIdx.x} * T::kRows;
  const int first = int(blockIdx.y) * p.block_groups;
  const int end = first + p.block_groups < p.groups ? first + p.block_groups : p.groups;
  const int unit = T::unit_of(thread_id());
  for (int group = first; group < end; ++group) {
    const auto draw = [&] {
      if (p.columns) return;
      for (int u = thread_id(); u < T::kUnits; u += kTileThreads) {
        uint32_t* const to = table + u;
        draw_row(p.draws, uint32_t(group) * T::kUnits + u, to, T::kUnits, [&](uint32_t s, uint32_t column) {
          to[s * T::kUnits] = T::offset(p.draws.in_view(column));
        });
      }
    };
    if (group == first)
      stage_tile<T>(p.source, batch_first, tile, draw);
    else
      draw();
    __syncthreads();
    const int64_t n = int64_t{group} * T::kUnits + unit;
    float sums[kEach][kEach];
    if (p.columns)
      gather<T, 8>(tile, p.draws.fan_in, sums, [&](uint32_t s) {
        return *reinterpret_cast<const FourWords*>(p.columns + s * p.columns_stride + n);
      });
    else
      gather<T, 2>(tile, p.draws.fan_in, sums, [&](uint32_t s) {
        return *reinterpret_cast<const FourWords*>(table + s * T::kUnits + unit);
      });
    const int64_t m = batch_first + T::chunk_of(lane_id()) * kEach;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      if (m + e >= p.source.batch) continue;
      Four value;
#pragma unroll
      for (int u = 0; u < kEach; ++u) value.v[u] = __fmul_rn(sums[u][e], p.factor);
      write_four(p.y, p.fours, m + e, n, p.outputs, value);
    }
    __syncthreads();  // the table is drawn anew
  }
}

__global__ void __launch_bounds__(kDrawThreads) prepare_kernel(const Prepare p) {
  __shared__ float shared[kSquare][kSquare + 1];  // one more, so that columns lie in 32 banks
  await_previous();
  const int64_t block = blockIdx.x;
  if (block < p.draw_blocks) {
    const int64_t n = block * kDrawThreads + thread_id();
    if (n >= p.rows) return;
    draw_row(p.draws, uint32_t(n), p.earlier + n, p.rows, [&](uint32_t, uint32_t column) {
      const uint32_t k = p.draws.in_view(column);
      if (k < p.draws.cols) atomicOr(p.bits + k * p.words + n / 32, uint32_t{1} << n % 32);
    });
    return;
  }
  const int64_t squares = (p.rows + kSquare - 1) / kSquare, square = block - p.draw_blocks;
  const int64_t n0 = square % squares * kSquare, m0 = square / squares * kSquare;
  const int warp = thread_id() / kLanes, lane = lane_id();
#pragma unroll
  for (int i = warp; i < kSquare; i += kDrawThreads / kLanes) {
    const bool inside = m0 + i < p.batch && n0 + lane < p.rows;
    shared[i][lane] = inside ? read_element(p.x, m0 + i, n0 + lane) : 0.0f;
  }
  __syncthreads();
#pragma unroll
  for (int i = warp; i < kSquare; i += kDrawThreads / kLanes)
    if (n0 + i < p.rows && m0 + lane < p.stride) p.across[(n0 + i) * p.stride + m0 + lane] = shared[lane][i];
}

// The set bits of a warp's kListWords words, in order; their number.
NMKERN_DEVICE int list_bits(const FourWords& words, uint16_t* list) {
  const int lane = lane_id();
  int count = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) count += __popc(words.v[i]);
  int before = count;  // and including this lane's
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const int theirs = from_lane(before, lane - distance);
    if (lane >= distance) before += theirs;
  }
  const int total = from_lane(before, kLanes - 1);
  uint16_t* at = list + before - count;
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    for (uint32_t bits = words.v[i]; bits; bits &= bits - 1)
      *at++ = uint16_t((lane * kEach + i) * 32 + __ffs(int(bits)) - 1);
  return total;
}

__global__ void __launch_bounds__(kColumnThreads) column_kernel(const Columns p) {
  extern __shared__ __align__(128) unsigned char shared[];
  await_previous();
  constexpr int kTurns = 8;  // loads of a lane that are in flight together, 32 registers
  struct alignas(16) Listed {
    uint16_t n[kTurns];
  };
  const int warp = thread_id() / kLanes, lane = lane_id();
  auto* list = reinterpret_cast<uint16_t*>(shared + warp * kListBytes);
  auto* slab = reinterpret_cast<float*>(shared + kColumnWarps * kListBytes);
  const int64_t first = int64_t{blockIdx.y} * kColumnWarps, k = first + warp;
  const int64_t m0 = int64_t{blockIdx.x} * kSlab, m = m0 + lane * kEach;
  Four sum{};
  for (int64_t base = 0; k < p.cols && base < p.words; base += kListWords) {
    const auto words = *reinterpret_cast<const FourWords*>(p.bits + k * p.words + base + lane * kEach);
    const int total = list_bits(words, list);
    __syncwarp();
    const float* const from = p.across + base * 32 * p.stride + m;
    // Beyond the list's end the first entry is read again, and not added: no branch parts the loads.
    for (int i = 0; i < total && m < p.stride; i += kTurns) {
      const Listed listed = *reinterpret_cast<const Listed*>(list + i);
      Four value[kTurns];
#pragma unroll
      for (int j = 0; j < kTurns; ++j)
        value[j] =
            *reinterpret_cast<const Four*>(from + (i + j < total ? listed.n[j] : listed.n[0]) * p.stride);
#pragma unroll
      for (int j = 0; j < kTurns; ++j)
#pragma unroll
        for (int e = 0; e < kEach; ++e)
          sum.v[e] = i + j < total ? __fadd_rn(sum.v[e], value[j].v[e]) : sum.v[e];
    }
    __syncwarp();
  }
#pragma unroll
  for (int e = 0; e < kEach; ++e) sum.v[e] = __fmul_rn(sum.v[e], p.factor);
  *reinterpret_cast<Four*>(slab + warp * kSlabPitch + lane * kEach) = sum;
  __syncthreads();
  for (int i = thread_id(); i < kSlab * kColumnWarps; i += kColumnThreads) {
    const int row = i / kColumnWarps, column = i % kColumnWarps;
    if (m0 + row < p.batch && first + column < p.cols)
      write_element(p.y, m0 + row, first + column, slab[column * kSlabPitch + row]);
  }
}

struct LaunchForward {
  void* scratch;
  cudaStream_t stream;

  template <class T>
  int operator()(ForwardPlan plan) const {
    if (plan.scratch_bytes) {
      plan.forward.columns = plan.drawing.columns = static_cast<uint32_t*>(scratch);
      const int64_t blocks = (plan.drawing.stride + kDrawThreads - 1) / kDrawThreads;
      if (const int error = enqueue(draw_kernel<T>, uint32_t(blocks), kDrawThreads, 0, stream, plan.drawing))
        return error;
    }
    const dim3 grid(uint32_t(plan.blocks_x), uint32_t(plan.blocks_y));
    return enqueue(forward_kernel<T>, grid, kTileThreads, plan.shared_bytes, stream, plan.forward);
  }
};

int launch_transposed(const Sparse& call, void* scratch, cudaStream_t stream) {
  TransposedPlan plan = transposed_plan_of(call);
  plan.place(scratch);
  if (const int error = cudaMemsetAsync(plan.prepare.bits, 0, plan.bits_bytes, stream)) return error;
  if (const int error =
          enqueue(prepare_kernel, uint32_t(plan.prepare_blocks), kDrawThreads, 0, stream, plan.prepare))
    return error;
  const dim3 grid(uint32_t(plan.blocks_x), uint32_t(plan.blocks_y));
  return enqueue(column_kernel, grid, kColumnThreads, kColumnBytes, stream, plan.columns);
}

}  // namespace

int64_t sparse_scratch(const Sparse& call, int64_t shared_bytes) { return scratch_of(call, shared_bytes); }

int sparse_product(const Sparse& call, int64_t shared_bytes, void* scratch, void* stream) {
  if (call.batch == 0 || call.rows == 0 || call.cols == 0) return cudaSuccess;
  const auto queue = static_cast<cudaStream_t>(stream);
  if (call.transposed) return launch_transposed(call, scratch, queue);
  return with_plan(call, shared_bytes, LaunchForward{scratch, queue},
                   [] { return int(cudaErrorInvalidValue); });
}

}  // namespace nmkern::cuda
