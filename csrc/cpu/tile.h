// The tile kernels, written once over a SIMD policy and compiled once per instruction set.
//
//   sums[o, m] = sum_k W[o, k] * x[m, k]        o over the tile's outputs, see kernels.h
//
// Up to twice `max_block` rows of x: weights go from the decoder straight into the multiply.
// More rows: a block of weights is decoded into a tile in L1 and multiplied with every row block.
// At that border, uniform in float32, 8192 x 8192 on 2 threads: AVX2 (Zen 3) M = 6 7.2 ms, 8 10.1, 12 13.5;
// a tile for all M > 2 took 6.2 at M = 4 where fusing takes 5.3, and fusing more rows has no registers.
// The policy S gives: U (32-bit words), F (floats), lanes, max_block, hashers, decoders, fma.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels.h"

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

// Calls whose words are hashed ahead of their use. Hashing on its own overlaps the chains of rounds of
// several calls: 8192 x 8192 at M = 4 in bfloat16 (Zen 5, 2 threads) fell from 1.79 ms, interleaved with
// decoding, to 1.28. 16 calls were 2 to 10 % slower.
constexpr int kTileWords = 32;
// Fields of a word that are decoded by unrolled code. A rademacher word has 32: looping over pieces of 8
// costs a shift a piece and takes the compiler a quarter of the time.
constexpr int kUnrolled = 8;

// One reduction step: Vectors vectors of weights times one value (or pair) of each row of x.
template <class S, class C, int Vectors, int Rows>
NMKERN_INLINE void multiply(typename S::F (&sum)[Vectors][Rows],
                            const typename C::Weight (&w)[Vectors], const typename C::X* x) {
  // Whichever are fewer stay in registers and the others are loaded one at a time: AVX2 has 16 registers.
  if constexpr (Rows < Vectors) {
    typename C::Weight value[Rows];
    unroll<Rows>([&](auto m) NMKERN_FLAT { value[m] = C::broadcast(x + m); });
    unroll<Vectors>([&](auto o) NMKERN_FLAT {
      unroll<Rows>([&](auto m) NMKERN_FLAT { sum[o][m] = C::fma(w[o], value[m], sum[o][m]); });
    });
  } else {
    unroll<Rows>([&](auto m) NMKERN_FLAT {
      const auto value = C::broadcast(x + m);
      unroll<Vectors>([&](auto o) NMKERN_FLAT { sum[o][m] = C::fma(w[o], value, sum[o][m]); });
    });
  }
}

template <class S, int Vectors, int Rows>
NMKERN_INLINE void clear_sums(typename S::F (&sum)[Vectors][Rows]) {
  unroll<Vectors>([&](auto o) NMKERN_FLAT {
    unroll<Rows>([&](auto m) NMKERN_FLAT { sum[o][m] = S::zero(); });
  });
}

// Each run of the reduction is summed on its own and then added to the sums in memory: with one sum over all
// steps, the relative error at K = 8192 was 1.6e-6 on average and, on 24 outputs, 2.3e-6; design: 2e-6.
template <class S, int Vectors, int Rows>
NMKERN_INLINE void add_sums(const typename S::F (&sum)[Vectors][Rows], float* to, bool start) {
  unroll<Vectors>([&](auto o) NMKERN_FLAT {
    unroll<Rows>([&](auto m) NMKERN_FLAT {
      float* at = to + (o * Rows + m) * S::lanes;
      S::store(at, start ? sum[o][m] : S::add(S::load(at), sum[o][m]));
    });
  });
}

// Call body(integral_constant<Rows>) for rows in 1..Max.
template <int Max, class Body>
NMKERN_INLINE void with_rows(int rows, Body&& body) {
  unroll<Max>([&](auto i) NMKERN_FLAT {
    if (rows == i + 1) body(std::integral_constant<int, i + 1>{});
  });
}

// Call body(first vector, sums) for weights that are decoded as they are multiplied. More rows than
// registers hold sums of four vectors for, beside what decoding takes, go two vectors at a time.
template <class S, class C, class Body>
NMKERN_INLINE void multiply_fused(const Tile& t, float* sums, bool start, Body&& body) {
  with_rows<2 * S::max_block>(int(t.batch), [&](auto r) NMKERN_FLAT {
    constexpr int kRows = decltype(r)::value;
    constexpr int kNow = kRows <= S::fused_block ? kVectors : kVectors / 2;
    unroll<kVectors / kNow>([&](auto pass) NMKERN_FLAT {
      constexpr int kFirst = pass * kNow;
      typename S::F sum[kNow][kRows];
      float* home = sums + kFirst * kRows * S::lanes;
      clear_sums<S, kNow, kRows>(sum);
      body(std::integral_constant<int, kFirst>{}, sum);
      add_sums<S, kNow, kRows>(sum, home, start);
    });
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
      clear_sums<S, kVectors, kRows>(sum);
      const typename C::Weight* w = weights;
      for (int64_t k = 0; k < steps; ++k, w += kVectors, x += kRows) {
        const typename C::Weight now[kVectors] = {w[0], w[1], w[2], w[3]};
        multiply<S, C, kVectors, kRows>(sum, now, x);
      }
      add_sums<S, kVectors, kRows>(sum, home, first == 0);
    });
  }
}

// ---- forward: lanes are patches of rows, a word holds P columns = C::forward_steps steps

template <class S, class C>
void forward_fused(const Tile& t) {
  using X = typename C::X;
  const typename S::RowHasher hash(t.key, uint32_t(C::family), t.output_word);
  typename S::U words[kTileWords][4];
  constexpr int kSteps = C::forward_steps < kUnrolled ? C::forward_steps : kUnrolled;
  for (int64_t begin = 0; begin < t.reduction_words; begin += kTileWords) {
    int64_t count = t.reduction_words - begin;
    if (count > kTileWords) count = kTileWords;
    for (int64_t i = 0; i < count; ++i) hash(t.reduction_word + uint32_t(begin + i), words[i]);
    const X* all = static_cast<const X*>(t.x) + begin * C::forward_steps * t.batch;
    multiply_fused<S, C>(t, t.sums, begin == 0, [&](auto first, auto& sum) NMKERN_FLAT {
      constexpr int kNow = std::extent_v<std::remove_reference_t<decltype(sum)>, 0>;
      constexpr int kRows = std::extent_v<std::remove_reference_t<decltype(sum)>, 1>;
      const X* x = all;
      for (int64_t i = 0; i < count; ++i) {
        for (int piece = 0; piece < C::forward_steps / kSteps; ++piece, x += kSteps * kRows) {
          typename C::Prepared prepared[kNow];
          unroll<kNow>([&](auto r) NMKERN_FLAT {
            const auto word = words[i][first + r];
            prepared[r] = C::prepare(C::forward_steps == kSteps ? word : C::skip(word, piece * kSteps));
          });
          unroll<kSteps>([&](auto f) NMKERN_FLAT {
            typename C::Weight w[kNow];
            unroll<kNow>([&](auto r) NMKERN_FLAT { w[r] = C::template decode<f>(prepared[r]); });
            multiply<S, C, kNow, kRows>(sum, w, x + f * kRows);
          });
        }
      }
    });
  }
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
  if (t.batch <= t.block) return forward_fused<S, C>(t);
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

// Vectors First to First + Vectors of a chunk of kVectors fields, for one step of a patch whose words have
// been arranged by C::arrange_rows: [step][half], fields of a half in order. A chunk known to the compiler
// costs no shift (uniform at M = 8, 4096 x 4096 on one thread: 1.44 ms against 1.80).
template <class S, class C, int First, int Vectors, class Chunk>
NMKERN_INLINE void decode_step(typename C::Weight (&w)[Vectors], const typename S::U (&word)[4],
                               int step, Chunk chunk) {
  constexpr int kPerHalf = C::columns / C::halves;
  if constexpr (kPerHalf < kVectors) {  // normal in bfloat16: the one chunk spans both halves
    unroll<Vectors>([&](auto j) NMKERN_FLAT {
      constexpr int kField = First + j;
      w[j] = C::template decode<kField % kPerHalf>(
          C::prepare(word[C::halves * step + kField / kPerHalf]));
    });
  } else {
    constexpr int kChunks = kPerHalf / kVectors;  // of a half
    const auto half = word[C::halves * step + chunk / kChunks];
    if constexpr (std::is_same_v<Chunk, int>) {
      const auto rest = C::prepare(C::skip(half, chunk % kChunks * kVectors));
      unroll<Vectors>([&](auto j) NMKERN_FLAT { w[j] = C::template decode<First + j>(rest); });
    } else {
      constexpr int kField = Chunk::value % kChunks * kVectors + First;
      const auto all = C::prepare(half);
      unroll<Vectors>([&](auto j) NMKERN_FLAT { w[j] = C::template decode<kField + j>(all); });
    }
  }
}

template <class S, class C, class Chunk>
void transposed_chunk(const Tile& t, const typename S::U (*words)[4], int64_t begin, int64_t end,
                      Chunk chunk, typename C::Weight* weights, float* sums) {
  using X = typename C::X;
  static_assert(kTileWords * C::patch_steps == tile_steps(true, C::halves == 2));
  const bool one_block = t.batch <= t.block;
  const X* all = static_cast<const X*>(t.x) + begin * C::patch_steps * t.batch;
  // A word whose preparation is work of its own is not prepared again for a second pass over its fields:
  // normal at M = 6, 8192 x 8192 (Zen 3, 2 threads): 11.4 ms against 18.0.
  constexpr bool kPrepares = !std::is_same_v<typename C::Prepared, typename S::U>;
  if (one_block && !(kPrepares && t.batch > S::fused_block)) {
    multiply_fused<S, C>(t, sums, begin == 0, [&](auto first, auto& sum) NMKERN_FLAT {
      constexpr int kNow = std::extent_v<std::remove_reference_t<decltype(sum)>, 0>;
      constexpr int kRows = std::extent_v<std::remove_reference_t<decltype(sum)>, 1>;
      const X* x = all;
      for (int64_t i = 0; i < end - begin; ++i) {
        unroll<C::patch_steps>([&](auto step) NMKERN_FLAT {
          typename C::Weight w[kNow];
          decode_step<S, C, first, kNow>(w, words[i], step, chunk);
          multiply<S, C, kNow, kRows>(sum, w, x);
          x += kRows;
        });
      }
    });
    return;
  }
  auto* to = weights;
  for (int64_t i = 0; i < end - begin; ++i) {
    unroll<C::patch_steps>([&](auto step) NMKERN_FLAT {
      typename C::Weight w[kVectors];
      decode_step<S, C, 0, kVectors>(w, words[i], step, chunk);
      unroll<kVectors>([&](auto o) NMKERN_FLAT { to[o] = w[o]; });
      to += kVectors;
    });
  }
  const int64_t steps = (end - begin) * C::patch_steps;
  if constexpr (kPrepares) {
    if (one_block) {
      multiply_fused<S, C>(t, sums, begin == 0, [&](auto first, auto& sum) NMKERN_FLAT {
        constexpr int kNow = std::extent_v<std::remove_reference_t<decltype(sum)>, 0>;
        constexpr int kRows = std::extent_v<std::remove_reference_t<decltype(sum)>, 1>;
        const typename C::Weight* from = weights + first;
        const X* x = all;
        for (int64_t k = 0; k < steps; ++k, from += kVectors, x += kRows) {
          typename C::Weight w[kNow];
          unroll<kNow>([&](auto o) NMKERN_FLAT { w[o] = from[o]; });
          multiply<S, C, kNow, kRows>(sum, w, x);
        }
      });
      return;
    }
  }
  multiply_tile<S, C>(t, weights, begin * C::patch_steps, steps, sums);
}

template <class S, class C>
void transposed(const Tile& t) {
  const typename S::ColumnHasher hash(t.key, uint32_t(C::family), t.output_word);
  auto* weights = static_cast<typename C::Weight*>(t.scratch);
  typename S::U words[kTileWords][4];
  const int64_t chunk_sums = t.batch * kVectors * S::lanes;
  for (int64_t begin = 0; begin < t.reduction_words; begin += kTileWords) {
    int64_t end = begin + kTileWords;
    if (end > t.reduction_words) end = t.reduction_words;
    for (int64_t i = begin; i < end; ++i) {
      hash(t.reduction_word + uint32_t(i), words[i - begin]);
      C::arrange_rows(words[i - begin]);
    }
    const auto run = [&](auto chunk) {
      transposed_chunk<S, C>(t, words, begin, end, chunk, weights, t.sums + chunk * chunk_sums);
    };
    constexpr int kChunks = C::columns / kVectors;
    if constexpr (kChunks <= S::unrolled_chunks) unroll<kChunks>(run);
    else
      for (int chunk = 0; chunk < kChunks; ++chunk) run(chunk);
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
