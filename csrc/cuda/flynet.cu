// The fused FlyNet: hidden units are gathered, modulated and read out without leaving a block's registers.
//
//   draw_kernel       counts[k] = how many units draw input k
//   stage_rows        mean[m] = encoder_factor * (sum_k counts[k] * x[m, k]) / hidden
//   hidden_units      r[u, m] = max(0, encoder_factor * sum over s: x[m, column(u, s)] - mean[m])
//   logits_kernel     partial[s, m, c] = sum over the units u of split s: code[c, u] * (gain[t, u] * r[u, m])
//   gain_grad_kernel  partial[s, t, u] = sum over the rows m of t in split s:
//                                        r[u, m] * decoder_factor * sum_c code[c, u] * d[m, c]
//
//   x -> stage_tile -> shared memory -> gather -> r -> times gain and codes -> added over a lane's units,
//   lanes, warps and splits -> logits
//
// A block holds 16 rows of x and takes 512 units at a time, a lane 4 rows of 4 units. So many rows whatever
// the device has room for: 32 would be read without bank conflicts, but 784 inputs of them do not fit a block
// of sm_89. Codes are decoded once for a block and kTilePatches patches of classes.
//
// Invariant: a sum is taken in an order that shapes fix: units of a lane, lanes, warps, splits; the counts
// are integers.
//
// flynet_plan.h says how a call is split.
#include "enqueue.h"
#include "flynet.h"
#include "flynet_plan.h"
#include "sparse_tile.cuh"
#include "table.cuh"

namespace nmkern::cuda {
namespace {

constexpr int kFinishThreads = 128;

__global__ void __launch_bounds__(kDrawThreads) draw_kernel(const Drawing p) {
  await_previous();
  draw_columns<FlyTile>(p);
}

template <Family kFamily>
NMKERN_DEVICE float code_of(uint32_t field) {
  if constexpr (kFamily == Family::normal)
    return float_of(kNormalTable.entry[field] << 16);
  else  // decode's, whose table of normal is not the device's
    return float(2 * int(field) - (kFamily == Family::rademacher ? 1 : 15));
}

template <Family kFamily>
NMKERN_DEVICE void stage_codes(const Network& p, int64_t first_unit, int64_t first_patch, FlyShared& shared) {
  constexpr int kColumns = columns_per_word(kFamily), kBits = 32 / kColumns;
  constexpr uint32_t kMask = (1u << kBits) - 1;
  const int64_t base = p.decoder_col + first_unit;
  const int skip = int(base % kColumns), words = (skip + kFlyUnits + kColumns - 1) / kColumns;
  for (int i = thread_id(); i < kTilePatches * words; i += kTileThreads) {
    const int patch = i / words, first = i % words * kColumns - skip;
    const Words drawn =
        philox4x32(uint32_t(base / kColumns) + uint32_t(i % words),
                   p.class_patch + uint32_t(first_patch) + uint32_t(patch), 0, uint32_t(kFamily), p.key);
#pragma unroll
    for (int r = 0; r < kRowsPerPatch; ++r) {
      float* to = &shared.codes[patch * kRowsPerPatch + r][0] + first;
#pragma unroll
      for (int f = 0; f < kColumns; f += kEach) {
        Four four;
#pragma unroll
        for (int j = 0; j < kEach; ++j) four.v[j] = code_of<kFamily>(drawn.w[r] >> ((f + j) * kBits) & kMask);
        if (skip == 0) {
          *reinterpret_cast<Four*>(to + f) = four;
        } else {
#pragma unroll
          for (int j = 0; j < kEach; ++j)
            if (first + f + j >= 0 && first + f + j < kFlyUnits) to[f + j] = four.v[j];
        }
      }
    }
  }
}

// Codes of kTilePatches patches of classes from first_patch on, for the kFlyUnits units from first_unit on.
NMKERN_DEVICE void stage_codes(const Network& p, int64_t first_unit, int64_t first_patch, FlyShared& shared) {
  if (p.family == Family::rademacher)
    stage_codes<Family::rademacher>(p, first_unit, first_patch, shared);
  else if (p.family == Family::uniform)
    stage_codes<Family::uniform>(p, first_unit, first_patch, shared);
  else
    stage_codes<Family::normal>(p, first_unit, first_patch, shared);
}

// x of kFlyRows rows, and their means: ends with all of it there for all threads.
template <class Meanwhile>
NMKERN_DEVICE void stage_rows(const Network& p, int64_t batch_first, float* tile, FlyShared& shared,
                              const Meanwhile& meanwhile) {
  stage_tile<FlyTile>(p.source, batch_first, tile, [&] {
    for (int k = thread_id(); k < int(p.source.cols); k += kTileThreads)
      shared.counts[k] = float(p.counts[k]);
    meanwhile();
  });
  __syncthreads();
  const int part = thread_id() / FlyTile::kChunks, chunk = thread_id() % FlyTile::kChunks;
  float sum[kEach] = {};
  for (int k = part; k < int(p.source.cols); k += kFlyParts) {
    const float count = shared.counts[k];
    if (count == 0) continue;  // not even a NaN of an input that no unit draws
    const auto x =
        *reinterpret_cast<const Four*>(tile + (FlyTile::offset(uint32_t(k)) ^ uint32_t(chunk) * 16) / 4);
#pragma unroll
    for (int e = 0; e < kEach; ++e) sum[e] = __fmaf_rn(count, x.v[e], sum[e]);
  }
#pragma unroll
  for (int e = 0; e < kEach; ++e) shared.parts[chunk * kEach + e][part] = sum[e];
  __syncthreads();
  const int row = thread_id() / kLanes;
  float total = 0;
#pragma unroll
  for (int i = lane_id(); i < kFlyParts; i += kLanes) total = __fadd_rn(total, shared.parts[row][i]);
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    total = __fadd_rn(total, from_lane(total, lane_id() ^ distance));
  if (lane_id() == 0) shared.mean[row] = __fmul_rn(total, p.encoder_factor) / float(p.hidden);
  __syncthreads();
}

// r of the lane's 4 units from `unit` on and its 4 rows; zero where there is no such unit.
NMKERN_DEVICE void hidden_units(const Network& p, int64_t unit, const float* tile, const FlyShared& shared,
                                float (&r)[kEach][kEach]) {
  gather<FlyTile, 8>(tile, p.fan_in, r, [&](uint32_t s) {
    return *reinterpret_cast<const FourWords*>(p.columns + s * p.columns_stride + unit);
  });
  const float* mean = shared.mean + FlyTile::chunk_of(lane_id()) * kEach;
#pragma unroll
  for (int u = 0; u < kEach; ++u)
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const float value = __fadd_rn(__fmul_rn(r[u][e], p.encoder_factor), -mean[e]);
      r[u][e] = value < 0.0f || unit + u >= p.hidden ? 0.0f : value;  // comparing so keeps a NaN
    }
}

// Adds v over the 8 lanes that have other units. A lane is left with the sums of one class and two rows of
// its own: bits 2 and 3 of its number say which class, bit 4 which rows.
NMKERN_DEVICE void add_lanes(const float (&v)[kRowsPerPatch][kEach], float (&out)[2]) {
  const int lane = lane_id();
  const bool high = lane & 4, odd = lane & 8, upper = lane & 16;
  float half[2][kEach], quarter[kEach];
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int e = 0; e < kEach; ++e)
      half[r][e] = __fadd_rn(high ? v[r + 2][e] : v[r][e], from_lane(high ? v[r][e] : v[r + 2][e], lane ^ 4));
#pragma unroll
  for (int e = 0; e < kEach; ++e)
    quarter[e] = __fadd_rn(odd ? half[1][e] : half[0][e], from_lane(odd ? half[0][e] : half[1][e], lane ^ 8));
#pragma unroll
  for (int e = 0; e < 2; ++e)
    out[e] = __fadd_rn(upper ? quarter[e + 2] : quarter[e],
                       from_lane(upper ? quarter[e] : quarter[e + 2], lane ^ 16));
}

__global__ void __launch_bounds__(kTileThreads) logits_kernel(const Logits p) {
  extern __shared__ __align__(128) unsigned char memory[];
  await_previous();
  const Network& net = p.net;
  auto* tile = reinterpret_cast<float*>(memory);
  auto& shared = *reinterpret_cast<FlyShared*>(memory + fly_tile_bytes(net.source.cols));
  const int64_t batch_first = int64_t{blockIdx.x} * kFlyRows, split = blockIdx.y;
  const int warp = thread_id() / kLanes, lane = lane_id();
  const int64_t first = split * p.block_groups;
  const int64_t end = first + p.block_groups < p.groups ? first + p.block_groups : p.groups;
  const int64_t m = batch_first + FlyTile::chunk_of(lane) * kEach;
  stage_rows(net, batch_first, tile, shared, [&] { stage_codes(net, first * kFlyUnits, 0, shared); });
  for (int64_t group = first; group < end; ++group) {
    const int64_t unit = group * kFlyUnits + FlyTile::unit_of(thread_id());
    float h[kEach][kEach];
    hidden_units(net, unit, tile, shared, h);
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      if (m + e >= net.source.batch) continue;
      const float* gain = p.gain.data + bank_row(p.gain, net.context, m + e) * net.hidden + unit;
#pragma unroll
      for (int u = 0; u < kEach; ++u)
        if (unit + u < net.hidden) h[u][e] = __fmul_rn(h[u][e], gain[u]);
    }
    for (int64_t patch = 0; patch < net.patches; patch += kTilePatches) {
      if (group != first || patch != 0) {
        stage_codes(net, group * kFlyUnits, patch, shared);
        __syncthreads();
      }
#pragma unroll 1
      for (int i = 0; i < kTilePatches; ++i) {
        float v[kRowsPerPatch][kEach];
#pragma unroll
        for (int r = 0; r < kRowsPerPatch; ++r) {
          const auto code = *reinterpret_cast<const Four*>(
              &shared.codes[i * kRowsPerPatch + r][FlyTile::unit_of(thread_id())]);
#pragma unroll
          for (int e = 0; e < kEach; ++e) {
            v[r][e] = __fmul_rn(code.v[0], h[0][e]);
#pragma unroll
            for (int u = 1; u < kEach; ++u) v[r][e] = __fmaf_rn(code.v[u], h[u][e], v[r][e]);
          }
        }
        float sum[2];
        add_lanes(v, sum);
        const int r = (lane >> 1 & 2) + (lane >> 3 & 1);
        float* to = &shared.sums[i][warp][r * kFlyRows + FlyTile::chunk_of(lane) * kEach + (lane >> 4) * 2];
        to[0] = sum[0], to[1] = sum[1];
      }
      __syncthreads();  // the codes have been read too
      if (thread_id() < kTilePatches * kPatchSums) {
        const int i = thread_id() / kPatchSums, at = thread_id() % kPatchSums;
        const int64_t row = batch_first + at % kFlyRows;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < kTileWarps; ++w) sum = __fadd_rn(sum, shared.sums[i][w][at]);
        if (patch + i < net.patches && row < net.source.batch) {
          float* to = p.partial + (split * net.source.batch + row) * net.patches * kRowsPerPatch +
                      (patch + i) * kRowsPerPatch + at / kFlyRows;
          *to = group == first ? sum : __fadd_rn(*to, sum);
        }
      }
    }
  }
}

__global__ void __launch_bounds__(kFinishThreads) finish_logits_kernel(const FinishLogits f) {
  await_previous();
  const int64_t i = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  if (i >= f.batch * f.classes) return;
  const int64_t m = i / f.classes, c = i % f.classes;
  float sum = 0;
#pragma unroll 16
  for (int64_t s = 0; s < f.splits; ++s)
    sum = __fadd_rn(sum, f.partial[(s * f.batch + m) * f.stride + f.skip + c]);
  write_element(f.y, m, c, __fmul_rn(sum, f.factor));
}

// Gradients of the logits for kFlyRows rows, and the rows of the result that those belong to.
NMKERN_DEVICE void stage_gradients(const GainGrad& p, int64_t batch_first, int64_t first_patch,
                                   FlyShared& shared) {
  if (thread_id() < kTileClasses * kFlyRows) {
    const int i = thread_id() % kTileClasses, row = thread_id() / kTileClasses;
    const int64_t c = first_patch * kRowsPerPatch + i - p.net.class_skip, m = batch_first + row;
    const bool here = c >= 0 && c < p.net.classes && m < p.net.source.batch;
    shared.d[i][row] = here ? read_element(p.d_logits, m, c) : 0.0f;
  } else if (thread_id() >= kTileThreads - kFlyRows) {
    const int row = thread_id() - (kTileThreads - kFlyRows);
    const int64_t m = batch_first + row;
    shared.row[row] = m < p.net.source.batch ? bank_row({nullptr, p.rows}, p.net.context, m) : -1;
  }
}

// The sum of the products of all rows, from i on, that belong to the same row of the result as i; false where
// an earlier one does, or none.
NMKERN_DEVICE bool add_rows(const FlyShared& shared, const float* products, int i, float& sum) {
  const int64_t row = shared.row[i];
  if (row < 0) return false;
  for (int j = 0; j < i; ++j)
    if (shared.row[j] == row) return false;
  sum = products[i * kProductPitch];
  for (int j = i + 1; j < kFlyRows; ++j)
    if (shared.row[j] == row) sum = __fadd_rn(sum, products[j * kProductPitch]);
  return true;
}

__global__ void __launch_bounds__(kTileThreads) gain_grad_kernel(const GainGrad p) {
  extern __shared__ __align__(128) unsigned char memory[];
  await_previous();
  const Network& net = p.net;
  auto* tile = reinterpret_cast<float*>(memory);
  auto& shared = *reinterpret_cast<FlyShared*>(memory + fly_tile_bytes(net.source.cols));
  const int64_t split = blockIdx.x, first_unit = int64_t{blockIdx.y} * kFlyUnits;
  const int chunk = FlyTile::chunk_of(lane_id()), unit = FlyTile::unit_of(thread_id());
  const int64_t first = split * p.split_groups;
  const int64_t end = first + p.split_groups < p.row_groups ? first + p.split_groups : p.row_groups;
  const int64_t own = first_unit + thread_id();  // the unit whose sums this thread owns
  float* const result = p.result + (p.each ? 0 : split * p.rows * net.hidden);
  float total = 0;
  for (int64_t group = first; group < end; ++group) {
    const int64_t batch_first = group * kFlyRows, m = batch_first + chunk * kEach;
    stage_rows(net, batch_first, tile, shared, [&] {
      stage_codes(net, first_unit, 0, shared);
      stage_gradients(p, batch_first, 0, shared);
    });
    float r[kEach][kEach], pulled[kEach][kEach] = {};
    hidden_units(net, first_unit + unit, tile, shared, r);
    for (int64_t patch = 0; patch < net.patches; patch += kTilePatches) {
      if (patch != 0) {
        __syncthreads();
        stage_codes(net, first_unit, patch, shared);
        stage_gradients(p, batch_first, patch, shared);
        __syncthreads();
      }
#pragma unroll 4
      for (int c = 0; c < kTileClasses; ++c) {
        const auto code = *reinterpret_cast<const Four*>(&shared.codes[c][unit]);
        const auto d = *reinterpret_cast<const Four*>(&shared.d[c][chunk * kEach]);
#pragma unroll
        for (int u = 0; u < kEach; ++u)
#pragma unroll
          for (int e = 0; e < kEach; ++e) pulled[u][e] = __fmaf_rn(code.v[u], d.v[e], pulled[u][e]);
      }
    }
#pragma unroll
    for (int u = 0; u < kEach; ++u)
#pragma unroll
      for (int e = 0; e < kEach; ++e)
        r[u][e] = __fmul_rn(r[u][e], __fmul_rn(pulled[u][e], net.decoder_factor));
    if (p.each) {
#pragma unroll
      for (int e = 0; e < kEach; ++e)
#pragma unroll
        for (int u = 0; u < kEach; ++u)
          if (m + e < net.source.batch && first_unit + unit + u < net.hidden)
            result[(m + e) * net.hidden + first_unit + unit + u] = r[u][e];
      __syncthreads();  // the tile has been read
      continue;
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kEach; ++e)
      *reinterpret_cast<Four*>(tile + (chunk * kEach + e) * kProductPitch + unit) =
          Four{{r[0][e], r[1][e], r[2][e], r[3][e]}};
    __syncthreads();
    const float* const products = tile + thread_id();
    for (int i = 0; own < net.hidden && i < kFlyRows; ++i) {
      float sum;
      if (!add_rows(shared, products, i, sum)) continue;
      float* const to = result + shared.row[i] * net.hidden + own;
      if (p.rows == 1)
        total = group == first ? sum : __fadd_rn(total, sum);
      else
        *to = __fadd_rn(*to, sum);
    }
    __syncthreads();
  }
  if (p.rows == 1 && !p.each && own < net.hidden) result[own] = total;
}

__global__ void __launch_bounds__(kFinishThreads) finish_gain_grad_kernel(const FinishGainGrad f) {
  await_previous();
  const int64_t i = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  if (i >= f.values) return;
  float sum = 0;
#pragma unroll 16
  for (int64_t s = 0; s < f.splits; ++s) sum = __fadd_rn(sum, f.partial[s * f.values + i]);
  f.gain_grad[i] = sum;
}

uint32_t finish_blocks(int64_t values) { return uint32_t((values + kFinishThreads - 1) / kFinishThreads); }

int launch_logits(const FlyNet& net, const FlyPlan& plan, float* partial, cudaStream_t stream) {
  const Logits logits = logits_of(net, plan, partial);
  const dim3 grid(uint32_t(plan.row_groups), uint32_t(plan.splits));
  if (const int error = enqueue(logits_kernel, grid, kTileThreads, plan.shared_bytes, stream, logits))
    return error;
  return enqueue(finish_logits_kernel, finish_blocks(net.batch * net.classes), kFinishThreads, 0, stream,
                 finish_of(net, logits, plan.splits));
}

int launch_gain_grad(const FlyNet& net, const FlyPlan& plan, float* partial, cudaStream_t stream) {
  const GainGrad grad = gain_grad_of(net, plan, partial);
  const int64_t values = grad.rows * net.hidden;
  if (grad.rows > 1 && !grad.each)
    if (const int error = cudaMemsetAsync(grad.result, 0, plan.splits * values * 4, stream)) return error;
  const dim3 grid(uint32_t(plan.splits), uint32_t(plan.unit_groups));
  const int error = enqueue(gain_grad_kernel, grid, kTileThreads, plan.shared_bytes, stream, grad);
  if (error || plan.partial_bytes == 0) return error;
  return enqueue(finish_gain_grad_kernel, finish_blocks(values), kFinishThreads, 0, stream,
                 {partial, plan.splits, values, net.gain_grad.data});
}

}  // namespace

int64_t flynet_scratch(const FlyNet& net, int64_t shared_bytes) { return scratch_of(net, shared_bytes); }

int flynet_sweep(const FlyNet& net, void* scratch, void* stream) {
  if (net.batch == 0) return cudaSuccess;
  const auto queue = static_cast<cudaStream_t>(stream);
  FlyPlan plan = plan_of(net);
  float* partial = plan.place(scratch);
  if (const int error = cudaMemsetAsync(plan.drawing.counts, 0, plan.counts_bytes, queue)) return error;
  if (const int error =
          enqueue(draw_kernel, uint32_t(plan.draw_blocks()), kDrawThreads, 0, queue, plan.drawing))
    return error;
  return is_backward(net) ? launch_gain_grad(net, plan, partial, queue)
                          : launch_logits(net, plan, partial, queue);
}

}  // namespace nmkern::cuda
