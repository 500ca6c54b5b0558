// The sparse projection: x in shared memory forward, and an index of bits transposed.
//
//   y[m, n] = factor * sum over s < fan_in: x[m, column(n, s)]                               (forward_block)
//   y[m, k] = factor * sum over the rows n that drew k, upward: x[m, n]        (prepare_block, column_block)
//
// Forward, a block holds all columns of some rows of x and draws the columns of its units itself, so that one
// launch does it all: x -> stage_tile -> shared memory -> gather -> y. Where the draws of a block's units
// have no room beside the tile, draw_block has drawn them into memory before.
//
// Transposed, bit n of column k says whether row n drew k: a row draws a column at most once, and which of
// two rows set its bit first leaves no trace. A warp owns a column, lists its rows and adds what x has for
// them, 128 rows of the batch at a time, from x transposed, where those are neighbours.
//
// Invariant: a sum has one owner, and the order of the draws or of the rows; the only atomics set bits.
#pragma once

#include <bit>

#include "sparse_tile.h"

namespace nmkern::cuda {

// Four values of neighbouring columns; `fours`: takes_four(y), and then col is a multiple of 4.
NMKERN_DEVICE void store_four(const Matrix& y, bool fours, int64_t row, int64_t col, int64_t cols,
                              const Four& value) {
  if (fours && col + kEach <= cols) {
    const int64_t at = row * y.row_stride + col;
    if (y.dtype == Dtype::float32) {
      store(static_cast<float*>(y.data) + at, value);
    } else {
      const auto half = [&](int i) { return uint32_t{half_of(value.v[i], y.dtype)}; };
      store(static_cast<uint16_t*>(y.data) + at,
            TwoWords{{half(0) | half(1) << 16, half(2) | half(3) << 16}});
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (col + i < cols) write_element(y, row, col + i, value.v[i]);
}

struct Forward {
  TileSource source;
  Draws draws;
  int64_t outputs;
  int32_t groups;           // of Tile::kUnits outputs
  int32_t block_groups;     // that a block takes one after the other
  const uint32_t* columns;  // [fan_in][columns_stride], what draw_block has drawn; null: drawn here
  int64_t columns_stride;
  float factor;
  Matrix y;
  bool fours;  // takes_four(y)
};

template <class T, class Machine>
NMKERN_DEVICE void forward_block(const Forward& p, Machine& machine, unsigned char* shared) {
  auto* tile = reinterpret_cast<float*>(shared);
  auto* table = reinterpret_cast<uint32_t*>(shared + T::bytes(p.source.cols));
  const int64_t batch_first = int64_t{machine.block_x()} * T::kRows;
  const int first = int(machine.block_y()) * p.block_groups;
  const int end = first + p.block_groups < p.groups ? first + p.block_groups : p.groups;
  const int unit = T::unit_of(machine.thread());
  for (int group = first; group < end; ++group) {
    const auto draw = [&] {
      if (p.columns) return;
      for (int u = machine.thread(); u < T::kUnits; u += kTileThreads) {
        uint32_t* const to = table + u;
        draw_row(p.draws, uint32_t(group) * T::kUnits + u, to, T::kUnits, [&](uint32_t s, uint32_t column) {
          to[s * T::kUnits] = T::offset(p.draws.in_view(column));
        });
      }
    };
    if (group == first)
      stage_tile<T>(p.source, machine, batch_first, tile, draw);
    else
      draw();
    machine.wait();
    const int64_t n = int64_t{group} * T::kUnits + unit;
    float sums[kEach][kEach];
    if (p.columns)
      gather<T, 8>(machine, tile, p.draws.fan_in, sums, [&](uint32_t s) {
        return *reinterpret_cast<const FourWords*>(p.columns + s * p.columns_stride + n);
      });
    else
      gather<T, 2>(machine, tile, p.draws.fan_in, sums, [&](uint32_t s) {
        return *reinterpret_cast<const FourWords*>(table + s * T::kUnits + unit);
      });
    const int64_t m = batch_first + T::chunk_of(machine.lane()) * kEach;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      if (m + e >= p.source.batch) continue;
      Four value;
#pragma unroll
      for (int u = 0; u < kEach; ++u) value.v[u] = Machine::rounded_product(sums[u][e], p.factor);
      store_four(p.y, p.fours, m + e, n, p.outputs, value);
    }
    machine.wait();  // the table is drawn anew
  }
}

constexpr int kDrawThreads = 128;

// Draws as Tile offsets, once for all blocks, and how often each column of the view is drawn by a row.
struct Drawing {
  Draws draws;
  int64_t rows;
  uint32_t* columns;  // [fan_in][stride]
  int64_t stride;     // at least `rows`: what follows is drawn too, and not counted
  uint32_t* counts;   // [cols] or null; added to
};

template <class T, class Machine>
NMKERN_DEVICE void draw_block(const Drawing& p, const Machine& machine) {
  const int64_t n = int64_t{machine.block_x()} * kDrawThreads + machine.thread();
  if (n >= p.stride) return;
  uint32_t* const to = p.columns + n;
  draw_row(p.draws, uint32_t(n), to, p.stride, [&](uint32_t s, uint32_t column) {
    const uint32_t k = p.draws.in_view(column);
    to[s * p.stride] = T::offset(k);
    if (p.counts && n < p.rows && k < p.draws.cols) machine.add(p.counts + k, 1);
  });
}

// What the transposed product needs first: blocks that draw, then blocks that transpose x.
struct Prepare {
  Draws draws;
  int64_t rows, draw_blocks;
  uint32_t* bits;     // [cols][words], zeros
  int64_t words;      // of a column, a multiple of kListWords
  uint32_t* earlier;  // [fan_in][rows]: scratch for more than kHeld draws
  Matrix x;           // [M, rows]
  int64_t batch;
  float* across;   // [rows][stride]
  int64_t stride;  // M and zeros up to a multiple of 4
};

constexpr int kSquare = 32;                // rows and columns that a block transposes
constexpr int kSquarePitch = kSquare + 1;  // floats; one more, so that columns lie in 32 banks
constexpr int kPrepareBytes = kSquare * kSquarePitch * 4;

template <class Machine>
NMKERN_DEVICE void prepare_block(const Prepare& p, Machine& machine, float* shared) {
  const int64_t block = machine.block_x();
  if (block < p.draw_blocks) {
    const int64_t n = block * kDrawThreads + machine.thread();
    if (n >= p.rows) return;
    draw_row(p.draws, uint32_t(n), p.earlier + n, p.rows, [&](uint32_t, uint32_t column) {
      const uint32_t k = p.draws.in_view(column);
      if (k < p.draws.cols) machine.set_bits(p.bits + k * p.words + n / 32, uint32_t{1} << n % 32);
    });
    return;
  }
  const int64_t squares = (p.rows + kSquare - 1) / kSquare, square = block - p.draw_blocks;
  const int64_t n0 = square % squares * kSquare, m0 = square / squares * kSquare;
  const int warp = machine.thread() / kLanes, lane = machine.lane();
#pragma unroll
  for (int i = warp; i < kSquare; i += kDrawThreads / kLanes) {
    const bool inside = m0 + i < p.batch && n0 + lane < p.rows;
    shared[i * kSquarePitch + lane] = inside ? read_element(p.x, m0 + i, n0 + lane) : 0.0f;
  }
  machine.wait();
#pragma unroll
  for (int i = warp; i < kSquare; i += kDrawThreads / kLanes)
    if (n0 + i < p.rows && m0 + lane < p.stride)
      p.across[(n0 + i) * p.stride + m0 + lane] = shared[lane * kSquarePitch + i];
}

struct Columns {
  const uint32_t* bits;
  int64_t words;
  const float* across;
  int64_t stride, batch, cols;
  float factor;
  Matrix y;
};

constexpr int kColumnWarps = 8, kColumnThreads = kColumnWarps * kLanes;
constexpr int kListWords = kLanes * kEach;  // that a warp turns into a list at once
constexpr int kSlab = kLanes * kEach;       // rows of the batch
constexpr int kSlabPitch = kSlab + 4;       // floats: columns of y are 4 banks apart
constexpr int kListBytes = kListWords * 32 * 2;
constexpr int kColumnBytes = kColumnWarps * (kListBytes + kSlabPitch * 4);

NMKERN_DEVICE int bit_count(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __popc(bits);
#else
  return std::popcount(bits);
#endif
}

NMKERN_DEVICE int lowest_bit(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __ffs(int(bits)) - 1;
#else
  return std::countr_zero(bits);
#endif
}

// The set bits of a warp's kListWords words, in order; their number.
template <class Machine>
NMKERN_DEVICE int list_bits(const FourWords& words, Machine& machine, uint16_t* list) {
  const int lane = machine.lane();
  int count = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) count += bit_count(words.v[i]);
  int before = count;  // and including this lane's
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const int theirs = machine.from_lane(before, lane - distance);
    if (lane >= distance) before += theirs;
  }
  const int total = machine.from_lane(before, kLanes - 1);
  uint16_t* at = list + before - count;
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    for (uint32_t bits = words.v[i]; bits; bits &= bits - 1)
      *at++ = uint16_t((lane * kEach + i) * 32 + lowest_bit(bits));
  return total;
}

template <class Machine>
NMKERN_DEVICE void column_block(const Columns& p, Machine& machine, unsigned char* shared) {
  constexpr int kTurns = 8;  // loads of a lane that are in flight together, 32 registers
  struct alignas(16) Listed {
    uint16_t n[kTurns];
  };
  const int warp = machine.thread() / kLanes, lane = machine.lane();
  auto* list = reinterpret_cast<uint16_t*>(shared + warp * kListBytes);
  auto* slab = reinterpret_cast<float*>(shared + kColumnWarps * kListBytes);
  const int64_t first = int64_t{machine.block_y()} * kColumnWarps, k = first + warp;
  const int64_t m0 = int64_t{machine.block_x()} * kSlab, m = m0 + lane * kEach;
  Four sum{};
  for (int64_t base = 0; k < p.cols && base < p.words; base += kListWords) {
    const auto words = *reinterpret_cast<const FourWords*>(p.bits + k * p.words + base + lane * kEach);
    const int total = list_bits(words, machine, list);
    machine.wait_warp();
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
          sum.v[e] = i + j < total ? Machine::rounded_sum(sum.v[e], value[j].v[e]) : sum.v[e];
    }
    machine.wait_warp();
  }
#pragma unroll
  for (int e = 0; e < kEach; ++e) sum.v[e] = Machine::rounded_product(sum.v[e], p.factor);
  *reinterpret_cast<Four*>(slab + warp * kSlabPitch + lane * kEach) = sum;
  machine.wait();
  for (int i = machine.thread(); i < kSlab * kColumnWarps; i += kColumnThreads) {
    const int row = i / kColumnWarps, column = i % kColumnWarps;
    if (m0 + row < p.batch && first + column < p.cols)
      write_element(p.y, m0 + row, first + column, slab[column * kSlabPitch + row]);
  }
}

}  // namespace nmkern::cuda
