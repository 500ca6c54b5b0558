// The sparse kernels, written once over a SIMD policy: drawing columns, gathering and scattering.
//
// Drawing, lanes are rows of the matrix: word s mod 4 of the hash is draw s of every lane, and Floyd's
// check for repeats compares vectors. Multiplying, lanes are rows of the batch, kBatch of them.
#pragma once

#include "tile.h"

namespace nmkern::cpu {
namespace {

// kBatch floats as vectors of the policy.
template <class S>
struct Batch {
  static constexpr int kParts = kBatch / S::lanes;
  typename S::F part[kParts];

  static NMKERN_INLINE Batch load(const float* from) {
    Batch b;
    unroll<kParts>([&](auto i) NMKERN_FLAT { b.part[i] = S::load(from + i * S::lanes); });
    return b;
  }
  NMKERN_INLINE void store(float* to) const {
    unroll<kParts>([&](auto i) NMKERN_FLAT { S::store(to + i * S::lanes, part[i]); });
  }
  NMKERN_INLINE void operator+=(const Batch& other) {
    unroll<kParts>([&](auto i) NMKERN_FLAT { part[i] = S::add(part[i], other.part[i]); });
  }
};

template <class S>
void draw(const SparseRows& rows, uint32_t* columns) {
  for (int64_t first = 0; first < kSparseRows; first += S::lanes) {
    const typename S::RowHasher hash(rows.key, kSparseTag, rows.first_row + uint32_t(first));
    const typename S::U offset = S::set_words(rows.col_offset), limit = S::set_words(rows.cols);
    typename S::U word[4];
    for (uint32_t s = 0; s < rows.fan_in; ++s) {
      if (s % 4 == 0) hash(s / 4, word);
      const uint32_t j = rows.population - rows.fan_in + s;
      typename S::U t = S::multiply_high(word[s % 4], j + 1);
      // Earlier draws are kept unshifted in the output until the row is complete.
      typename S::U taken = S::set_words(0);
      for (uint32_t p = 0; p < s; ++p)
        taken = S::or_equal(taken, S::load_words(columns + p * S::lanes), t);
      S::store_words(columns + s * S::lanes, S::choose(taken, S::set_words(j), t));
    }
    for (uint32_t s = 0; s < rows.fan_in; ++s, columns += S::lanes)
      S::store_words(columns, S::min_words(S::subtract(S::load_words(columns), offset), limit));
  }
}

// sum[i][lane of the batch] = sum over the columns k of row i: x[k][lane], for Rows rows side by side: 784 -> 7840 at
// batch 128 on one thread of an Emerald Rapids takes 0.62 ms, row by row 0.71.
template <class S, int Rows>
NMKERN_INLINE void sum_rows(Batch<S> (&sum)[Rows], const uint32_t* columns, int64_t fan_in, const float* x) {
  const auto of = [&](int i) NMKERN_FLAT { return Batch<S>::load(x + int64_t{columns[i]} * kBatch); };
  unroll<Rows>([&](auto i) NMKERN_FLAT { sum[i] = of(i); });
  for (int64_t s = 1; s < fan_in; ++s) {
    columns += S::lanes;
    unroll<Rows>([&](auto i) NMKERN_FLAT { sum[i] += of(i); });
  }
}

// y[lane of the batch][row] = factor * sum over the row's columns k: x[k][lane]
template <class S>
void gather(const uint32_t* columns, int64_t fan_in, const float* x, float factor, float* y, int64_t stride) {
  constexpr int kNow = S::lanes == kBatch ? kBatch : 4;
  const auto scale = S::broadcast(&factor);
  for (int64_t first = 0; first < kSparseRows; first += S::lanes, columns += fan_in * S::lanes) {
    alignas(64) float rows[S::lanes][kBatch];
    for (int lane = 0; lane < S::lanes; lane += kNow) {
      Batch<S> sum[kNow];
      sum_rows<S, kNow>(sum, columns + lane, fan_in, x);
      unroll<kNow>([&](auto i) NMKERN_FLAT {
        unroll<Batch<S>::kParts>([&](auto p) NMKERN_FLAT { sum[i].part[p] = S::multiply(sum[i].part[p], scale); });
      });
      if constexpr (S::lanes == kBatch) {  // a square that never leaves the registers
        typename S::F square[kBatch];
        unroll<kBatch>([&](auto i) NMKERN_FLAT { square[i] = sum[i].part[0]; });
        S::transpose(square, y + first, stride);
      } else {
        unroll<kNow>([&](auto i) NMKERN_FLAT { sum[i].store(rows[lane + i]); });
      }
    }
    if constexpr (S::lanes != kBatch) S::template transpose<kBatch>(rows[0], y + first, stride);
  }
}

// y[k][lane] += tile[lane of the batch][row] for every row and each of its columns k, rows in order
template <class S>
void scatter(const uint32_t* columns, int64_t fan_in, int64_t rows, const float* x, float* y) {
  for (int64_t r = 0; r < rows; ++r, x += kBatch) {
    const auto value = Batch<S>::load(x);
    const uint32_t* column = columns + r / S::lanes * fan_in * S::lanes + r % S::lanes;
    for (int64_t s = 0; s < fan_in; ++s, column += S::lanes) {
      float* at = y + int64_t{*column} * kBatch;
      auto sum = Batch<S>::load(at);
      sum += value;
      sum.store(at);
    }
  }
}

// sums[row] = sum over the row's columns k: x[k]
template <class S>
void gather_one(const uint32_t* columns, int64_t fan_in, const float* x, float* sums) {
  for (int64_t first = 0; first < kSparseRows; first += S::lanes) {
    typename S::F sum = S::zero();
    for (int64_t s = 0; s < fan_in; ++s, columns += S::lanes)
      sum = S::add(sum, S::gather(x, S::load_words(columns)));
    S::store(sums + first, sum);
  }
}

template <class S>
void to_lanes(const float* rows, float* lanes) {
  for (int m = 0; m < kBatch; m += S::lanes)
    for (int k = 0; k < kSparseRows; k += kBatch)
      S::template transpose<kSparseRows>(rows + m * kSparseRows + k, lanes + k * kBatch + m, kBatch);
}

template <class S>
void from_lanes(const float* lanes, float* rows) {
  for (int k = 0; k < kSparseRows; k += S::lanes)
    S::template transpose<kBatch>(lanes + k * kBatch, rows + k, kSparseRows);
}

template <class S>
constexpr SparseKernels sparse_kernels() {
  return {draw<S>, gather<S>, gather_one<S>, scatter<S>, to_lanes<S>, from_lanes<S>};
}

}  // namespace
}  // namespace nmkern::cpu
