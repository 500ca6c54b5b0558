// The tile kernels, written once over a SIMD policy and compiled once per instruction set.
//
//   sums[o, m] = sum_k W[o, k] * x[m, k]        o over the tile's outputs, see kernels.h
//
// Up to `max_block` rows of x: weights go from the hash through the decoder straight into the multiply.
// More rows: a block of weights is decoded into a tile in L1 and multiplied with every row block.
// The policy S gives: U (32-bit words), F (floats), lanes, max_block, hashers, decoders, fma.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels.h"

#define NMKERN_FLAT __attribute__((always_inline))  // of a lambda: its body stays in the caller's registers
#define NMKERN_INLINE inline __attribute__((always_inline))

namespace nmkern::cpu {
namespace {  // a copy per instruction set: never merged by the linker

template <int... I, class Body>
NMKERN_INLINE void unroll(std::integer_sequence<int, I...>, Body&& body) {
  (body(std::integral_constant<int, I>{}), ...);
}
template <int N, class Body>
NMKERN_INLINE void unroll(Body&& body) {
  unroll(std::make_integer_sequence<int, N>{}, body);
}

constexpr int kTilePatches = 32;  // transposed: patches whose words are kept between chunks

// One reduction step: kVectors vectors of weights times one value (or pair) of each row of x.
template <class S, class C, int Rows>
NMKERN_INLINE void multiply(typename S::F (&sum)[kVectors][Rows],
                            const typename C::Weight (&w)[kVectors], const typename C::X* x) {
  unroll<Rows>([&](auto m) NMKERN_FLAT {
    const auto value = C::broadcast(x + m);
    unroll<kVectors>([&](auto o) NMKERN_FLAT { sum[o][m] = C::fma(w[o], value, sum[o][m]); });
  });
}

template <class S, int Rows>
NMKERN_INLINE void load_sums(typename S::F (&sum)[kVectors][Rows], const float* from) {
  unroll<kVectors>([&](auto o) NMKERN_FLAT {
    unroll<Rows>([&](auto m) NMKERN_FLAT { sum[o][m] = S::load(from + (o * Rows + m) * S::lanes); });
  });
}

template <class S, int Rows>
NMKERN_INLINE void store_sums(const typename S::F (&sum)[kVectors][Rows], float* to) {
  unroll<kVectors>([&](auto o) NMKERN_FLAT {
    unroll<Rows>([&](auto m) NMKERN_FLAT { S::store(to + (o * Rows + m) * S::lanes, sum[o][m]); });
  });
}

template <class S, int Rows>
NMKERN_INLINE void clear(typename S::F (&sum)[kVectors][Rows]) {
  unroll<kVectors>([&](auto o) NMKERN_FLAT {
    unroll<Rows>([&](auto m) NMKERN_FLAT { sum[o][m] = S::zero(); });
  });
}

// Call body(integral_constant<Rows>) for rows in 1..Max.
template <int Max, class Body>
NMKERN_INLINE void with_rows(int rows, Body&& body) {
  unroll<Max>([&](auto i) NMKERN_FLAT {
    if (rows == i + 1) body(std::integral_constant<int, i + 1>{});
  });
}

// Multiply a decoded tile, steps [first, first + steps), with every row block; the sums live in memory
// between tiles.
template <class S, class C>
void multiply_tile(const Tile& t, const typename C::Weight* weights, int64_t first, int64_t steps,
                   float* sums) {
  using X = typename C::X;
  const X* x = static_cast<const X*>(t.x) + first * t.batch;
  for (int64_t m = 0; m < t.batch; m += t.block) {
    const int rows = int(t.batch - m < t.block ? t.batch - m : t.block);
    with_rows<S::max_block>(rows, [&](auto r) NMKERN_FLAT {
      constexpr int kRows = decltype(r)::value;
      typename S::F sum[kVectors][kRows];
      float* home = sums + m * kVectors * S::lanes;
      if (first == 0) clear<S, kRows>(sum);
      else load_sums<S, kRows>(sum, home);
      const typename C::Weight* w = weights;
      for (int64_t k = 0; k < steps; ++k, w += kVectors, x += kRows) {
        const typename C::Weight now[kVectors] = {w[0], w[1], w[2], w[3]};
        multiply<S, C, kRows>(sum, now, x);
      }
      store_sums<S, kRows>(sum, home);
    });
  }
}

// ---- forward: lanes are patches of rows, a word holds P columns = C::forward_steps steps

template <class S, class C, int Rows>
void forward_fused(const Tile& t) {
  using X = typename C::X;
  const typename S::RowHasher hash(t.key, uint32_t(C::family), t.output_word);
  const X* x = static_cast<const X*>(t.x);
  typename S::F sum[kVectors][Rows];
  clear<S, Rows>(sum);
  for (int64_t i = 0; i < t.reduction_words; ++i) {
    typename S::U word[4];
    hash(t.reduction_word + uint32_t(i), word);
    typename C::Prepared prepared[4];
    unroll<4>([&](auto r) NMKERN_FLAT { prepared[r] = C::prepare(word[r]); });
    unroll<C::forward_steps>([&](auto f) NMKERN_FLAT {
      typename C::Weight w[kVectors];
      unroll<4>([&](auto r) NMKERN_FLAT { w[r] = C::template decode<f>(prepared[r]); });
      multiply<S, C, Rows>(sum, w, x + f * Rows);
    });
    x += C::forward_steps * Rows;
  }
  store_sums<S, Rows>(sum, t.sums);
}

// Words [begin, end) of the reduction as weights: to[step][kVectors].
template <class S, class C>
void decode_words(const Tile& t, int64_t begin, int64_t end, typename C::Weight* to) {
  const typename S::RowHasher hash(t.key, uint32_t(C::family), t.output_word);
  for (int64_t i = begin; i < end; ++i, to += C::forward_steps * kVectors) {
    typename S::U word[4];
    hash(t.reduction_word + uint32_t(i), word);
    typename C::Prepared prepared[4];
    unroll<4>([&](auto r) NMKERN_FLAT { prepared[r] = C::prepare(word[r]); });
    unroll<C::forward_steps>([&](auto f) NMKERN_FLAT {
      unroll<4>([&](auto r) NMKERN_FLAT {
        to[f * kVectors + r] = C::template decode<f>(prepared[r]);
      });
    });
  }
}

template <class S, class C>
void forward(const Tile& t) {
  if (t.batch <= t.block) {
    with_rows<S::max_block>(int(t.batch),
                            [&](auto r) NMKERN_FLAT { forward_fused<S, C, decltype(r)::value>(t); });
    return;
  }
  auto* weights = static_cast<typename C::Weight*>(t.scratch);
  constexpr int64_t kWords = tile_steps(false, C::halves == 2) / C::forward_steps;
  for (int64_t begin = 0; begin < t.reduction_words; begin += kWords) {
    const int64_t end = begin + kWords < t.reduction_words ? begin + kWords : t.reduction_words;
    decode_words<S, C>(t, begin, end, weights);
    multiply_tile<S, C>(t, weights, begin * C::forward_steps, (end - begin) * C::forward_steps,
                        t.sums);
  }
}

// ---- transposed: lanes are words of columns, a patch holds C::patch_steps steps

template <class S, class C, int Chunk>
NMKERN_INLINE void decode_step(typename C::Weight (&w)[kVectors], const typename S::U (&word)[4],
                               int step) {
  typename S::U halves[C::halves];
  C::gather_rows(word, step, halves);
  unroll<kVectors>([&](auto j) NMKERN_FLAT {
    constexpr int kField = Chunk * kVectors + j;
    constexpr int kPerHalf = C::columns / C::halves;
    w[j] = C::template decode<kField % kPerHalf>(C::prepare(halves[kField / kPerHalf]));
  });
}

template <class S, class C, int Chunk>
void transposed_chunk(const Tile& t, const typename S::U (*words)[4], int64_t begin, int64_t end,
                      typename C::Weight* weights, float* sums) {
  using X = typename C::X;
  static_assert(kTilePatches * C::patch_steps == tile_steps(true, C::halves == 2));
  if (t.batch <= t.block) {
    with_rows<S::max_block>(int(t.batch), [&](auto r) NMKERN_FLAT {
      constexpr int kRows = decltype(r)::value;
      typename S::F sum[kVectors][kRows];
      if (begin == 0) clear<S, kRows>(sum);
      else load_sums<S, kRows>(sum, sums);
      const X* x = static_cast<const X*>(t.x) + begin * C::patch_steps * kRows;
      for (int64_t i = 0; i < end - begin; ++i) {
        unroll<C::patch_steps>([&](auto step) NMKERN_FLAT {
          typename C::Weight w[kVectors];
          decode_step<S, C, Chunk>(w, words[i], step);
          multiply<S, C, kRows>(sum, w, x);
          x += kRows;
        });
      }
      store_sums<S, kRows>(sum, sums);
    });
    return;
  }
  auto* to = weights;
  for (int64_t i = 0; i < end - begin; ++i) {
    unroll<C::patch_steps>([&](auto step) NMKERN_FLAT {
      typename C::Weight w[kVectors];
      decode_step<S, C, Chunk>(w, words[i], step);
      unroll<kVectors>([&](auto o) NMKERN_FLAT { to[o] = w[o]; });
      to += kVectors;
    });
  }
  multiply_tile<S, C>(t, weights, begin * C::patch_steps, (end - begin) * C::patch_steps, sums);
}

template <class S, class C>
void transposed(const Tile& t) {
  const typename S::ColumnHasher hash(t.key, uint32_t(C::family), t.output_word);
  auto* weights = static_cast<typename C::Weight*>(t.scratch);
  typename S::U words[kTilePatches][4];
  const int64_t chunk_sums = t.batch * kVectors * S::lanes;
  for (int64_t begin = 0; begin < t.reduction_words; begin += kTilePatches) {
    int64_t end = begin + kTilePatches;
    if (end > t.reduction_words) end = t.reduction_words;
    for (int64_t i = begin; i < end; ++i) hash(t.reduction_word + uint32_t(i), words[i - begin]);
    unroll<C::columns / kVectors>([&](auto chunk) NMKERN_FLAT {
      transposed_chunk<S, C, chunk>(t, words, begin, end, weights, t.sums + chunk * chunk_sums);
    });
  }
}

template <template <Family> class C, class Body>
NMKERN_INLINE void with_codec(Family family, Body&& body) {
  switch (family) {
    case Family::rademacher: return body(C<Family::rademacher>{});
    case Family::uniform: return body(C<Family::uniform>{});
    case Family::normal: return body(C<Family::normal>{});
  }
}

template <class S, template <Family> class C>
void run_family(const Tile& t) {
  with_codec<C>(t.family, [&](auto codec) {
    if (t.transposed) transposed<S, decltype(codec)>(t);
    else forward<S, decltype(codec)>(t);
  });
}

template <class S, template <Family> class C>
void decode_family(const Tile& t, float* weights) {
  with_codec<C>(t.family, [&](auto codec) {
    decode_words<S, decltype(codec)>(t, 0, t.reduction_words,
                                     reinterpret_cast<typename S::F*>(weights));
  });
}

template <class S>
constexpr int64_t tile_bytes() {
  return int64_t{tile_steps(false, false)} * kVectors * S::lanes * 4;
}

}  // namespace
}  // namespace nmkern::cpu
