// The fused FlyNet: hidden units are gathered, modulated and read out without leaving a block's registers.
//
//   draw_block       counts[k] = how many units draw input k                            (of sparse_kernel.h)
//   stage_rows       mean[m] = encoder_factor * (sum_k counts[k] * x[m, k]) / hidden
//   hidden_units     r[u, m] = max(0, encoder_factor * sum over s: x[m, column(u, s)] - mean[m])
//   logits_block     partial[s, m, c] = sum over the units u of split s: code[c, u] * (gain[t, u] * r[u, m])
//   gain_grad_block  partial[s, t, u] = sum over the rows m of t in split s:
//                                       r[u, m] * decoder_factor * sum_c code[c, u] * d[m, c]
//
//   x -> stage_tile -> shared memory -> gather -> r -> times gain and codes -> added over a lane's units, lanes,
//   warps and splits -> logits
//
// A block holds 16 rows of x and takes 512 units at a time, a lane 4 rows of 4 units. So many rows whatever
// the device has room for: 32 would be read without bank conflicts, but 784 inputs of them do not fit a block
// of sm_89. Codes are decoded once for a block and kTilePatches patches of classes.
//
// Invariant: a sum is taken in an order that shapes fix: units of a lane, lanes, warps, splits; the counts
// are integers.
#pragma once

#include "sparse_kernel.h"

namespace nmkern::cuda {

using FlyTile = Tile<16>;

constexpr int kTilePatches = 3;  // of 4 classes
constexpr int kTileClasses = kTilePatches * kRowsPerPatch;
constexpr int kFlyRows = FlyTile::kRows, kFlyUnits = FlyTile::kUnits;
static_assert(kFlyUnits == kTileThreads && kFlyRows == kTileWarps, "a thread owns a unit, a warp a row");
constexpr int kPatchSums = kRowsPerPatch * kFlyRows;  // of a warp
constexpr int kFlyParts = kTileThreads / FlyTile::kChunks;
constexpr int kPartPitch = kFlyParts + 2;  // floats: chunks are 8 banks apart
constexpr int kProductPitch = kFlyUnits + 4;

struct Network {
  TileSource source;
  uint32_t fan_in;
  const uint32_t* columns;  // [fan_in][columns_stride], FlyTile offsets
  int64_t columns_stride;
  const uint32_t* counts;  // [inputs]
  float encoder_factor;
  int64_t hidden;

  Family family;
  Key key;               // of the decoder
  uint32_t class_patch;  // the patch of the first class, and how many of its rows lie before the class
  int32_t class_skip;
  int64_t patches, classes;
  int64_t decoder_col;
  float decoder_factor;
  const int64_t* context;
};

// Shared memory behind the tile; reused areas say for what.
struct FlyShared {
  alignas(16) float codes[kTileClasses][kFlyUnits];
  union {
    float parts[kFlyRows][kPartPitch];                             // of the means
    alignas(16) float sums[kTilePatches][kTileWarps][kPatchSums];  // of the logits
  };
  alignas(16) float d[kTileClasses][kFlyRows];  // gradients of the logits
  float mean[kFlyRows];
  int64_t row[kFlyRows];  // of the bank, -1 beyond the batch
  float counts[1];        // [inputs]: it is the last
};

// The tile is where products go too, once it has been read.
NMKERN_HD constexpr int64_t fly_tile_bytes(int64_t inputs) {
  const int64_t products = int64_t{kFlyRows} * kProductPitch * 4, tile = FlyTile::bytes(inputs);
  return whole(tile > products ? tile : products, 16);
}
NMKERN_HD constexpr int64_t fly_shared_bytes(int64_t inputs) {
  return fly_tile_bytes(inputs) + int64_t{sizeof(FlyShared)} + inputs * 4;
}

template <Family kFamily, class Machine>
NMKERN_DEVICE float code_of(const Machine& machine, uint32_t field) {
  if constexpr (kFamily == Family::normal)
    return float_of(machine.table().entry[field] << 16);
  else  // decode's, whose table of normal is not the device's
    return float(2 * int(field) - (kFamily == Family::rademacher ? 1 : 15));
}

template <Family kFamily, class Machine>
NMKERN_DEVICE void stage_codes(const Network& p, const Machine& machine, int64_t first_unit,
                               int64_t first_patch, FlyShared& shared) {
  constexpr int kColumns = columns_per_word(kFamily), kBits = 32 / kColumns;
  constexpr uint32_t kMask = (1u << kBits) - 1;
  const int64_t base = p.decoder_col + first_unit;
  const int skip = int(base % kColumns), words = (skip + kFlyUnits + kColumns - 1) / kColumns;
  for (int i = machine.thread(); i < kTilePatches * words; i += kTileThreads) {
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
        for (int j = 0; j < kEach; ++j)
          four.v[j] = code_of<kFamily>(machine, drawn.w[r] >> ((f + j) * kBits) & kMask);
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
template <class Machine>
NMKERN_DEVICE void stage_codes(const Network& p, const Machine& machine, int64_t first_unit,
                               int64_t first_patch, FlyShared& shared) {
  if (p.family == Family::rademacher)
    stage_codes<Family::rademacher>(p, machine, first_unit, first_patch, shared);
  else if (p.family == Family::uniform)
    stage_codes<Family::uniform>(p, machine, first_unit, first_patch, shared);
  else
    stage_codes<Family::normal>(p, machine, first_unit, first_patch, shared);
}

// x of kFlyRows rows, and their means: ends with all of it there for all threads.
template <class Machine, class Meanwhile>
NMKERN_DEVICE void stage_rows(const Network& p, Machine& machine, int64_t batch_first, float* tile,
                              FlyShared& shared, const Meanwhile& meanwhile) {
  stage_tile<FlyTile>(p.source, machine, batch_first, tile, [&] {
    for (int k = machine.thread(); k < int(p.source.cols); k += kTileThreads)
      shared.counts[k] = float(p.counts[k]);
    meanwhile();
  });
  machine.wait();
  const int part = machine.thread() / FlyTile::kChunks, chunk = machine.thread() % FlyTile::kChunks;
  float sum[kEach] = {};
  for (int k = part; k < int(p.source.cols); k += kFlyParts) {
    const float count = shared.counts[k];
    if (count == 0) continue;  // not even a NaN of an input that no unit draws
    const auto x =
        *reinterpret_cast<const Four*>(tile + (FlyTile::offset(uint32_t(k)) ^ uint32_t(chunk) * 16) / 4);
#pragma unroll
    for (int e = 0; e < kEach; ++e) sum[e] = Machine::multiply_add(count, x.v[e], sum[e]);
  }
#pragma unroll
  for (int e = 0; e < kEach; ++e) shared.parts[chunk * kEach + e][part] = sum[e];
  machine.wait();
  const int row = machine.thread() / kLanes;
  float total = 0;
#pragma unroll
  for (int i = machine.lane(); i < kFlyParts; i += kLanes)
    total = Machine::rounded_sum(total, shared.parts[row][i]);
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    total = Machine::rounded_sum(total, machine.from_lane(total, machine.lane() ^ distance));
  if (machine.lane() == 0)
    shared.mean[row] = Machine::rounded_product(total, p.encoder_factor) / float(p.hidden);
  machine.wait();
}

// r of the lane's 4 units from `unit` on and its 4 rows; zero where there is no such unit.
template <class Machine>
NMKERN_DEVICE void hidden_units(const Network& p, const Machine& machine, int64_t unit, const float* tile,
                                const FlyShared& shared, float (&r)[kEach][kEach]) {
  gather<FlyTile, 8>(machine, tile, p.fan_in, r, [&](uint32_t s) {
    return *reinterpret_cast<const FourWords*>(p.columns + s * p.columns_stride + unit);
  });
  const float* mean = shared.mean + FlyTile::chunk_of(machine.lane()) * kEach;
#pragma unroll
  for (int u = 0; u < kEach; ++u)
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const float value = Machine::rounded_sum(Machine::rounded_product(r[u][e], p.encoder_factor), -mean[e]);
      r[u][e] = value < 0.0f || unit + u >= p.hidden ? 0.0f : value;  // comparing so keeps a NaN
    }
}

struct Logits {
  Network net;
  Bank gain;
  int64_t groups, block_groups;  // of kFlyUnits units: all, and those that a block (a split) takes in order
  float* partial;                // [splits][M][patches * 4]
};

// Adds v over the 8 lanes that have other units. A lane is left with the sums of one class and two rows of its
// own: bits 2 and 3 of its number say which class, bit 4 which rows.
template <class Machine>
NMKERN_DEVICE void add_lanes(Machine& machine, const float (&v)[kRowsPerPatch][kEach], float (&out)[2]) {
  const int lane = machine.lane();
  const bool high = lane & 4, odd = lane & 8, upper = lane & 16;
  float half[2][kEach], quarter[kEach];
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int e = 0; e < kEach; ++e)
      half[r][e] = Machine::rounded_sum(high ? v[r + 2][e] : v[r][e],
                                        machine.from_lane(high ? v[r][e] : v[r + 2][e], lane ^ 4));
#pragma unroll
  for (int e = 0; e < kEach; ++e)
    quarter[e] = Machine::rounded_sum(odd ? half[1][e] : half[0][e],
                                      machine.from_lane(odd ? half[0][e] : half[1][e], lane ^ 8));
#pragma unroll
  for (int e = 0; e < 2; ++e)
    out[e] = Machine::rounded_sum(upper ? quarter[e + 2] : quarter[e],
                                  machine.from_lane(upper ? quarter[e] : quarter[e + 2], lane ^ 16));
}

template <class Machine>
NMKERN_DEVICE void logits_block(const Logits& p, Machine& machine, unsigned char* memory) {
  const Network& net = p.net;
  auto* tile = reinterpret_cast<float*>(memory);
  auto& shared = *reinterpret_cast<FlyShared*>(memory + fly_tile_bytes(net.source.cols));
  const int64_t batch_first = int64_t{machine.block_x()} * kFlyRows, split = machine.block_y();
  const int warp = machine.thread() / kLanes, lane = machine.lane();
  const int64_t first = split * p.block_groups;
  const int64_t end = first + p.block_groups < p.groups ? first + p.block_groups : p.groups;
  const int64_t m = batch_first + FlyTile::chunk_of(lane) * kEach;
  stage_rows(net, machine, batch_first, tile, shared,
             [&] { stage_codes(net, machine, first * kFlyUnits, 0, shared); });
  for (int64_t group = first; group < end; ++group) {
    const int64_t unit = group * kFlyUnits + FlyTile::unit_of(machine.thread());
    float h[kEach][kEach];
    hidden_units(net, machine, unit, tile, shared, h);
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      if (m + e >= net.source.batch) continue;
      const float* gain = p.gain.data + bank_row(p.gain, net.context, m + e) * net.hidden + unit;
#pragma unroll
      for (int u = 0; u < kEach; ++u)
        if (unit + u < net.hidden) h[u][e] = Machine::rounded_product(h[u][e], gain[u]);
    }
    for (int64_t patch = 0; patch < net.patches; patch += kTilePatches) {
      if (group != first || patch != 0) {
        stage_codes(net, machine, group * kFlyUnits, patch, shared);
        machine.wait();
      }
#pragma unroll 1
      for (int i = 0; i < kTilePatches; ++i) {
        float v[kRowsPerPatch][kEach];
#pragma unroll
        for (int r = 0; r < kRowsPerPatch; ++r) {
          const auto code = *reinterpret_cast<const Four*>(
              &shared.codes[i * kRowsPerPatch + r][FlyTile::unit_of(machine.thread())]);
#pragma unroll
          for (int e = 0; e < kEach; ++e) {
            v[r][e] = Machine::rounded_product(code.v[0], h[0][e]);
#pragma unroll
            for (int u = 1; u < kEach; ++u) v[r][e] = Machine::multiply_add(code.v[u], h[u][e], v[r][e]);
          }
        }
        float sum[2];
        add_lanes(machine, v, sum);
        const int r = (lane >> 1 & 2) + (lane >> 3 & 1);
        float* to = &shared.sums[i][warp][r * kFlyRows + FlyTile::chunk_of(lane) * kEach + (lane >> 4) * 2];
        to[0] = sum[0], to[1] = sum[1];
      }
      machine.wait();  // the codes have been read too
      if (machine.thread() < kTilePatches * kPatchSums) {
        const int i = machine.thread() / kPatchSums, at = machine.thread() % kPatchSums;
        const int64_t row = batch_first + at % kFlyRows;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < kTileWarps; ++w) sum = Machine::rounded_sum(sum, shared.sums[i][w][at]);
        if (patch + i < net.patches && row < net.source.batch) {
          float* to = p.partial + (split * net.source.batch + row) * net.patches * kRowsPerPatch +
                      (patch + i) * kRowsPerPatch + at / kFlyRows;
          *to = group == first ? sum : Machine::rounded_sum(*to, sum);
        }
      }
    }
  }
}

struct FinishLogits {
  const float* partial;
  int64_t splits, stride, skip, batch, classes;
  float factor;
  Matrix y;
};

template <class Machine>
NMKERN_DEVICE void finish_logit(const FinishLogits& f, int64_t m, int64_t c) {
  float sum = 0;
#pragma unroll 16
  for (int64_t s = 0; s < f.splits; ++s)
    sum = Machine::rounded_sum(sum, f.partial[(s * f.batch + m) * f.stride + f.skip + c]);
  write_element(f.y, m, c, Machine::rounded_product(sum, f.factor));
}

struct GainGrad {
  Network net;
  Matrix d_logits;
  int64_t row_groups, split_groups;  // of kFlyRows rows: all, and those that a block takes in order
  bool each;                         // a row of the result for every row of the batch
  int64_t rows;                      // of the result
  float* result;  // [splits][rows][hidden]; with several rows and not `each`, zeros that are added to
};

// Gradients of the logits for kFlyRows rows, and the rows of the result that those belong to.
template <class Machine>
NMKERN_DEVICE void stage_gradients(const GainGrad& p, const Machine& machine, int64_t batch_first,
                                   int64_t first_patch, FlyShared& shared) {
  if (machine.thread() < kTileClasses * kFlyRows) {
    const int i = machine.thread() % kTileClasses, row = machine.thread() / kTileClasses;
    const int64_t c = first_patch * kRowsPerPatch + i - p.net.class_skip, m = batch_first + row;
    const bool here = c >= 0 && c < p.net.classes && m < p.net.source.batch;
    shared.d[i][row] = here ? read_element(p.d_logits, m, c) : 0.0f;
  } else if (machine.thread() >= kTileThreads - kFlyRows) {
    const int row = machine.thread() - (kTileThreads - kFlyRows);
    const int64_t m = batch_first + row;
    shared.row[row] = m < p.net.source.batch ? bank_row({nullptr, p.rows}, p.net.context, m) : -1;
  }
}

// The sum of the products of all rows, from i on, that belong to the same row of the result as i; false where
// an earlier one does, or none.
template <class Machine>
NMKERN_DEVICE bool add_rows(const FlyShared& shared, const float* products, int i, float& sum) {
  const int64_t row = shared.row[i];
  if (row < 0) return false;
  for (int j = 0; j < i; ++j)
    if (shared.row[j] == row) return false;
  sum = products[i * kProductPitch];
  for (int j = i + 1; j < kFlyRows; ++j)
    if (shared.row[j] == row) sum = Machine::rounded_sum(sum, products[j * kProductPitch]);
  return true;
}

template <class Machine>
NMKERN_DEVICE void gain_grad_block(const GainGrad& p, Machine& machine, unsigned char* memory) {
  const Network& net = p.net;
  auto* tile = reinterpret_cast<float*>(memory);
  auto& shared = *reinterpret_cast<FlyShared*>(memory + fly_tile_bytes(net.source.cols));
  const int64_t split = machine.block_x(), first_unit = int64_t{machine.block_y()} * kFlyUnits;
  const int chunk = FlyTile::chunk_of(machine.lane()), unit = FlyTile::unit_of(machine.thread());
  const int64_t first = split * p.split_groups;
  const int64_t end = first + p.split_groups < p.row_groups ? first + p.split_groups : p.row_groups;
  const int64_t own = first_unit + machine.thread();  // the unit whose sums this thread owns
  float* const result = p.result + (p.each ? 0 : split * p.rows * net.hidden);
  float total = 0;
  for (int64_t group = first; group < end; ++group) {
    const int64_t batch_first = group * kFlyRows, m = batch_first + chunk * kEach;
    stage_rows(net, machine, batch_first, tile, shared, [&] {
      stage_codes(net, machine, first_unit, 0, shared);
      stage_gradients(p, machine, batch_first, 0, shared);
    });
    float r[kEach][kEach], pulled[kEach][kEach] = {};
    hidden_units(net, machine, first_unit + unit, tile, shared, r);
    for (int64_t patch = 0; patch < net.patches; patch += kTilePatches) {
      if (patch != 0) {
        machine.wait();
        stage_codes(net, machine, first_unit, patch, shared);
        stage_gradients(p, machine, batch_first, patch, shared);
        machine.wait();
      }
#pragma unroll 4
      for (int c = 0; c < kTileClasses; ++c) {
        const auto code = *reinterpret_cast<const Four*>(&shared.codes[c][unit]);
        const auto d = *reinterpret_cast<const Four*>(&shared.d[c][chunk * kEach]);
#pragma unroll
        for (int u = 0; u < kEach; ++u)
#pragma unroll
          for (int e = 0; e < kEach; ++e)
            pulled[u][e] = Machine::multiply_add(code.v[u], d.v[e], pulled[u][e]);
      }
    }
#pragma unroll
    for (int u = 0; u < kEach; ++u)
#pragma unroll
      for (int e = 0; e < kEach; ++e)
        r[u][e] =
            Machine::rounded_product(r[u][e], Machine::rounded_product(pulled[u][e], net.decoder_factor));
    if (p.each) {
#pragma unroll
      for (int e = 0; e < kEach; ++e)
#pragma unroll
        for (int u = 0; u < kEach; ++u)
          if (m + e < net.source.batch && first_unit + unit + u < net.hidden)
            result[(m + e) * net.hidden + first_unit + unit + u] = r[u][e];
      machine.wait();  // the tile has been read
      continue;
    }
    machine.wait();
#pragma unroll
    for (int e = 0; e < kEach; ++e)
      *reinterpret_cast<Four*>(tile + (chunk * kEach + e) * kProductPitch + unit) =
          Four{{r[0][e], r[1][e], r[2][e], r[3][e]}};
    machine.wait();
    const float* const products = tile + machine.thread();
    for (int i = 0; own < net.hidden && i < kFlyRows; ++i) {
      float sum;
      if (!add_rows<Machine>(shared, products, i, sum)) continue;
      float* const to = result + shared.row[i] * net.hidden + own;
      if (p.rows == 1)
        total = group == first ? sum : Machine::rounded_sum(total, sum);
      else
        *to = Machine::rounded_sum(*to, sum);
    }
    machine.wait();
  }
  if (p.rows == 1 && !p.each && own < net.hidden) result[own] = total;
}

struct FinishGainGrad {
  const float* partial;
  int64_t splits, values;  // values: of the result
  float* gain_grad;
};

template <class Machine>
NMKERN_DEVICE void finish_gain_grad(const FinishGainGrad& f, int64_t i) {
  float sum = 0;
#pragma unroll 16
  for (int64_t s = 0; s < f.splits; ++s) sum = Machine::rounded_sum(sum, f.partial[s * f.values + i]);
  f.gain_grad[i] = sum;
}

}  // namespace nmkern::cuda
