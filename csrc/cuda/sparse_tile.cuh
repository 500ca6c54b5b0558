// What the sparse projection and FlyNet share: drawing a row's columns, x in shared memory, gathering.
//
//   draw_row      the columns of a row of the matrix, by Floyd's sampling, one thread a row
//   draw_columns  those of all rows, into memory
//   stage_tile    R rows of the batch and all their columns into shared memory, batch rows innermost
//   gather        sums[u][e] += tile[column drawn by unit u][row e] for 4 units and 4 rows of a lane
#pragma once

#include "elements.cuh"
#include "sparse_tile.h"

namespace nmkern::cuda {

struct alignas(16) Four {
  float v[4];
};
struct alignas(16) FourWords {
  uint32_t v[4];
};
struct alignas(8) TwoWords {
  uint32_t v[2];
};

// The columns of a row, in order: use(s, column). Beyond kHeld, `earlier[s * stride]` is this thread's memory
// for a draw each.
template <class Use>
NMKERN_DEVICE void draw_row(const Draws& d, uint32_t row, uint32_t* earlier, int64_t stride, const Use& use) {
  const uint32_t lowest = d.lowest();
  if (d.fan_in <= kHeld) {
    uint32_t chosen[kHeld];
    Words words{};
#pragma unroll
    for (uint32_t s = 0; s < kHeld; ++s) {
      if (s < d.fan_in) {
        if (s % 4 == 0) words = philox4x32(s / 4, d.first_row + row, 0, kSparseTag, d.key);
        uint32_t t = sparse_draw(words.w[s % 4], lowest + s);
        bool taken = false;
#pragma unroll
        for (uint32_t p = 0; p < s; ++p) taken |= chosen[p] == t;
        chosen[s] = taken ? lowest + s : t;
        use(s, chosen[s]);
      }
    }
    return;
  }
  Words words{};
  for (uint32_t first = 0; first < d.fan_in; first += 4) {
    words = philox4x32(first / 4, d.first_row + row, 0, kSparseTag, d.key);
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t s = first + i;
      if (s >= d.fan_in) break;
      const uint32_t t = sparse_draw(words.w[i], lowest + s);
      bool taken = false;
#pragma unroll 4
      for (uint32_t p = 0; p < s; ++p) taken |= earlier[p * stride] == t;
      earlier[s * stride] = taken ? lowest + s : t;
    }
  }
  for (uint32_t s = 0; s < d.fan_in; ++s) use(s, earlier[s * stride]);
}

template <class T>
NMKERN_DEVICE void draw_columns(const Drawing& p) {
  const int64_t n = int64_t{blockIdx.x} * kDrawThreads + thread_id();
  if (n >= p.stride) return;
  uint32_t* const to = p.columns + n;
  draw_row(p.draws, uint32_t(n), to, p.stride, [&](uint32_t s, uint32_t column) {
    const uint32_t k = p.draws.in_view(column);
    to[s * p.stride] = T::offset(k);
    if (p.counts && n < p.rows && k < p.draws.cols) atomicAdd(p.counts + k, 1);
  });
}

// The float32 of four elements of 16 bits, which the first two words hold.
NMKERN_DEVICE FourWords widened(const FourWords& raw, Dtype dtype) {
  FourWords four;
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    four.v[i] = bits_of(float_of_half(uint16_t(raw.v[i / 2] >> (i % 2 * 16)), dtype));
  return four;
}

// Rows [batch_first, batch_first + T::kRows) of x. `meanwhile()` hides the latency of the first loads.
//
// A lane keeps its row and goes along it, so that all addresses are sums with constants: a warp takes 4 rows
// and 32 columns at a time, the block's warps the other rows and the next columns.
template <class T, class Meanwhile>
NMKERN_DEVICE void stage_tile(const TileSource& source, int64_t batch_first, float* tile,
                              const Meanwhile& meanwhile) {
  constexpr int kTurns = 7;   // loads of a lane in flight together: half of 784 columns of 32 rows
  constexpr int kGroups = 8;  // of 4 columns
  constexpr int kStep = kTileWarps / T::kChunks * kGroups * kEach;
  static_assert(kStep / kEach % T::kChunks == 0, "the swizzle is the same at every step");
  const int warp = thread_id() / kLanes, lane = thread_id() % kLanes;
  const int chunk = warp % T::kChunks, row = lane / kGroups;
  const int begin = (warp / T::kChunks * kGroups + lane % kGroups) * kEach;
  const int cols = int(source.cols), columns = int(T::columns(cols));
  const int64_t m = batch_first + chunk * kEach + row;
  const bool here = m < source.batch;
  float* to = tile + (T::offset(uint32_t(begin)) ^ uint32_t(chunk) * 16) / 4 + row;
  const auto put = [&](int k, int i, float value) { to[(k - begin + i) * T::kRows] = value; };
  if (!source.fours) {
    meanwhile();
    for (int k = begin; k < columns; k += kStep)
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        put(k, i, here && k + i < cols ? read_element(source.x, m, k + i) : 0.0f);
    return;
  }
  const bool wide = source.x.dtype == Dtype::float32;
  const int bytes = wide ? 4 : 2;
  const auto* from = static_cast<const unsigned char*>(source.x.data) + m * source.x.row_stride * bytes;
  FourWords raw[kTurns];
  const auto load = [&](int turn, int k) {
    raw[turn] = {};
    if (!here || k + kEach > cols) return;
    if (wide) {
      raw[turn] = *reinterpret_cast<const FourWords*>(from + k * 4);
    } else {
      const auto halves = *reinterpret_cast<const TwoWords*>(from + k * 2);
      raw[turn].v[0] = halves.v[0], raw[turn].v[1] = halves.v[1];
    }
  };
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) load(turn, begin + turn * kStep);
  meanwhile();
  for (int first = begin; first < columns; first += kTurns * kStep) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int k = first + turn * kStep;
      if (!wide) raw[turn] = widened(raw[turn], source.x.dtype);
      if (k < columns)
#pragma unroll
        for (int i = 0; i < kEach; ++i) put(k, i, float_of(raw[turn].v[i]));
      load(turn, k + kTurns * kStep);
    }
  }
  const int rest = cols / kEach * kEach;  // columns that are no four
  if (here && rest < cols && rest >= begin && (rest - begin) % kStep == 0)
    for (int i = 0; rest + i < cols; ++i) put(rest, i, read_element(source.x, m, rest + i));
}

// offsets(s): T::offset of what the lane's four units drew in step s, which is asked for `ahead` steps at
// once: 2 of shared memory keep the loads busy, of global memory more hide the latency.
template <class T, int ahead, class Offsets>
NMKERN_DEVICE void gather(const float* tile, uint32_t fan_in, float (&sums)[kEach][kEach],
                          const Offsets& offsets) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(tile);
  const uint32_t chunk = uint32_t(T::chunk_of(lane_id())) * 16;
#pragma unroll
  for (int u = 0; u < kEach; ++u)
#pragma unroll
    for (int e = 0; e < kEach; ++e) sums[u][e] = 0;
#pragma unroll 1
  for (uint32_t first = 0; first < fan_in; first += ahead) {
    FourWords at[ahead];
#pragma unroll
    for (int i = 0; i < ahead; ++i)
      if (first + i < fan_in) at[i] = offsets(first + i);
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      if (first + i >= fan_in) continue;
#pragma unroll
      for (int u = 0; u < kEach; ++u) {
        const Four x = *reinterpret_cast<const Four*>(bytes + (at[i].v[u] ^ chunk));
#pragma unroll
        for (int e = 0; e < kEach; ++e) sums[u][e] = __fadd_rn(sums[u][e], x.v[e]);
      }
    }
  }
}

}  // namespace nmkern::cuda
