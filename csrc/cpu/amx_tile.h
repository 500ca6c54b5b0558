// The dense tile kernels over a matrix unit, AMX: 8,192 products of bfloat16 an instruction, or 16,384 of bytes.
//
//   sums[o, m] = sum_k W[o, k] * x[m, k]        o over the tile's outputs, see kernels.h
//
// Weights are exact in bfloat16, and so is a float32 as the sum of three of them (24 = 8 + 8 + 8 bits): a
// float32 product is three products, at five times the peak of AVX-512's float32 multiplies. A decoded vector
// of weights, 16 outputs of a pair of reduction steps each, is one row of a tile register on the B side; x
// lies on the A side, a row of the batch a row of the register. Bytes are as the hash leaves them (bytes.h).
//
// Weights go through two panels in L1: while one is multiplied with every block of rows, the next is
// generated, a word at a time between the products, which take nothing but their own unit. Two words at a
// time, which fill more of the reorder buffer, were 5 to 9 % slower at 64 rows and more; panels of 128 steps,
// no faster.
//
// On an Emerald Rapids at 2.6 GHz generating uniform alone takes 3.5 clocks a vector (90 instructions of two
// ports a word, 16 vectors); 8192 x 8192 on 2 threads so at least 1.4 ms, and takes 1.9 up to 16 rows of
// bfloat16. A product takes 16 clocks; at times, on a shared machine, 50 and more, as if each waited for the
// one before, and then the order below, which loads least, is the best of four that were tried.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "avx512_bf16.h"
#include "bytes.h"

namespace nmkern::cpu {
namespace {

// As Bf16Codec, but for the last step of normal: to pick bytes from two registers is three instructions on
// Intel's CPUs, two of them for one port; a shift and a blend take both ports. With one instruction less for
// the index (avx512.h), generating normal takes 23 % less time.
template <Family F>
struct UnitCodec : Bf16Codec<F> {
  using typename Bf16Codec<F>::Weight, typename Bf16Codec<F>::Prepared;
  static constexpr bool bytes = false;
  static constexpr int elements = 2;  // of a step

  template <int Field>
  static NMKERN_INLINE Weight decode(const Prepared& word) {
    if constexpr (F != Family::normal)
      return Bf16Codec<F>::template decode<Field>(word);
    else if constexpr (Field == 0)
      return _mm512_mask_blend_epi8(kOddBytes, word.low, _mm512_slli_epi16(word.high, 8));
    else
      return _mm512_mask_blend_epi8(kOddBytes, _mm512_srli_epi16(word.low, 8), word.high);
  }

 private:
  static constexpr __mmask64 kOddBytes = 0xAAAAAAAAAAAAAAAA;
};

// The weights of a tile, panel_steps(...) reduction steps (a panel) at a time. Forward, a panel is a run of
// columns; transposed, of kTileWords patches of rows, and of each word four fields, a chunk.
//
// A word's hash is a chain of some 60 clocks and its decoding waits for that: words are hashed `ahead` of
// their use, where others are decoded.
template <class S, class C, bool Transposed>
class Panels {
  using Words = typename S::U[4];
  using Hasher = std::conditional_t<Transposed, ColumnHasher<S, StoredKeys>, RowHasher<S, StoredKeys>>;
  static constexpr int64_t kAhead = Transposed ? kTileWords : 4;

  const Tile& t_;
  const Hasher hash_;
  Words* const words_;

  static NMKERN_INLINE void arrange(Words& word) {
    if constexpr (Transposed) C::arrange_rows(word);
  }

 public:
  using Codec = C;
  static constexpr int chunks = Transposed ? C::columns / kVectors : 1;
  static constexpr int together = 1;   // chunks that are generated at a time
  static constexpr int64_t least = 1;  // words likewise, but at the end of a panel
  static constexpr int word_steps = Transposed ? C::patch_steps : C::forward_steps;
  static constexpr int64_t words = panel_steps(Transposed, C::elements) / word_steps;
  static_assert(!Transposed || words == kTileWords);

  explicit Panels(const Tile& t)
      : t_(t), hash_(t.key, uint32_t(C::family), t.output_word), words_(static_cast<Words*>(t.words)) {
    for (int64_t i = 0; i < kAhead && i < t.reduction_words; ++i) {
      hash_(t.reduction_word + uint32_t(i), words_[i]);
      arrange(words_[i]);
    }
  }

  // The steps of words [i, i + count) of the reduction, a chunk of them.
  NMKERN_INLINE void generate(int64_t i, int64_t count, int chunk, typename C::Weight* to) const {
    for (const int64_t end = i + count; i < end; ++i, to += word_steps * kVectors) {
      const bool replace = chunk + 1 == chunks && i + kAhead < t_.reduction_words;
      if (replace)
        write<true>(i, chunk, to);
      else
        write<false>(i, chunk, to);
    }
  }

 private:
  template <bool Replace>
  NMKERN_INLINE void write(int64_t i, int chunk, typename C::Weight* to) const {
    if constexpr (!Transposed || chunks == 1) {
      write_chunk<Replace>(i, std::integral_constant<int, 0>{}, to);
    } else if constexpr (Replace) {
      write_chunk<true>(i, std::integral_constant<int, chunks - 1>{}, to);
    } else if constexpr (chunks == 2) {
      if (chunk == 0)
        write_chunk<false>(i, std::integral_constant<int, 0>{}, to);
      else
        write_chunk<false>(i, std::integral_constant<int, 1>{}, to);
    } else {
      write_chunk<false>(i, chunk, to);
    }
  }
  template <bool Replace, class Chunk>
  NMKERN_INLINE void write_chunk(int64_t i, Chunk chunk, typename C::Weight* to) const {
    Words& word = words_[i % kAhead];
    Rounds<S> state;
    typename C::Prepared prepared[4];
    if constexpr (!Transposed) unroll<4>([&](auto r) NMKERN_FLAT { prepared[r] = C::prepare(word[r]); });
    unroll<word_steps>([&](auto step) NMKERN_FLAT {
      typename C::Weight w[kVectors];
      if constexpr (C::bytes)
        C::decode_rows(w, word, chunk);
      else if constexpr (Transposed)
        decode_step<S, C, 0, kVectors>(w, word, step, chunk);
      else
        unroll<4>([&](auto r) NMKERN_FLAT { w[r] = C::template decode<step>(prepared[r]); });
      unroll<kVectors>([&](auto v) NMKERN_FLAT { to[step * kVectors + v] = w[v]; });
      if constexpr (Replace) {
        hash_stages<step * kStages / word_steps, (step + 1) * kStages / word_steps>(
            hash_, t_.reduction_word + uint32_t(i + kAhead), state, word);
      }
    });
    if constexpr (Replace) arrange(word);
  }
};

// One panel, `steps` reduction steps from `x` on, with all rows of x; between the products, next(first,
// count), [0, words) in all. Sums that are not `resident` are in memory between panels.
template <class Unit, int Parts, class P, class Next>
void multiply_panel(const Tile& t, const typename P::Codec::Weight* weights, const uint32_t* x, int64_t steps,
                    float* sums, bool start, bool resident, bool end, int64_t words, Next&& next) {
  const int64_t tile = t.block * kUnitSteps;  // elements of a register of sums or of x
  const int64_t items = t.batch / t.block * (steps / kUnitSteps);
  const auto load_sums = [&](auto v, const float* from) NMKERN_FLAT {
    if (start)
      Unit::template zero<v>();
    else if (!resident)
      Unit::template load<v>(from + v * tile, kUnitSteps * sizeof(float));
  };
  unroll<kVectors>([&](auto v) NMKERN_FLAT { load_sums(v, sums); });
  int64_t left = items, made = 0, owed = 0;
  for (int64_t m = 0; m < t.batch; m += t.block, sums += kVectors * tile) {
    for (int64_t s = 0; s < steps; s += kUnitSteps, x += Parts * tile) {
      unroll<Parts>([&](auto p) NMKERN_FLAT {
        Unit::template load<kVectors + p>(x + p * tile, kUnitSteps * sizeof(*x));
      });
      unroll<kVectors>([&](auto v) NMKERN_FLAT {
        Unit::template load<7>(weights + s * kVectors + v, kVectors * sizeof(*weights));
        unroll<Parts>([&](auto p) NMKERN_FLAT {
          if constexpr (P::Codec::bytes)
            Unit::template multiply_bytes<v, kVectors + p, 7>();
          else
            Unit::template multiply<v, kVectors + p, 7>();
        });
        // Sums go and the next come while other vectors' are at work: 5 to 8 % faster at 64 and 128 rows.
        if (s + kUnitSteps == steps) {
          if (end || !resident) Unit::template store<v>(sums + v * tile, kUnitSteps * sizeof(float));
          if (m + t.block < t.batch) load_sums(v, sums + kVectors * tile);
        }
      });
      owed += words;
      if (--left > 0 && owed < P::least * items) continue;
      int64_t due = 0;
      for (; owed >= items; owed -= items) ++due;
      if (due > 0) next(made, due);
      made += due;
    }
  }
}

template <class Unit, int Parts, class P>
void multiply_panels(const Tile& t, const P& panels, float* sums) {
  using Weight = typename P::Codec::Weight;
  constexpr int64_t kWords = P::words;
  constexpr int64_t kPanel = kWords * P::word_steps * kVectors;
  auto* now = static_cast<Weight*>(t.scratch);
  auto* then = t.reduction_words > kWords || P::chunks > P::together ? now + P::together * kPanel : now;
  const int64_t chunk_sums = t.batch * kVectors * kUnitSteps;
  const auto count = [&](int64_t begin) { return std::clamp<int64_t>(t.reduction_words - begin, 0, kWords); };
  const auto word = [](Weight* panel, int64_t i) { return panel + i * P::word_steps * kVectors; };
  // Sums of one block of rows and one chunk stay in the tile registers.
  const bool resident = t.batch == t.block && P::chunks == 1;
  panels.generate(0, count(0), 0, now);
  for (int64_t begin = 0; begin < t.reduction_words; begin += kWords) {
    const int64_t steps = count(begin) * P::word_steps;
    const auto* x = static_cast<const uint32_t*>(t.x) + begin * P::word_steps * t.batch * Parts;
    for (int chunk = 0; chunk < P::chunks; chunk += P::together) {
      const bool last = chunk + P::together == P::chunks;
      const int64_t following = last ? begin + kWords : begin;
      const int next_chunk = last ? 0 : chunk + 1;
      for (int c = 0; c < P::together; ++c) {
        const int64_t first = count(following) * c / P::together;
        const int64_t share = count(following) * (c + 1) / P::together - first;
        multiply_panel<Unit, Parts, P>(
            t, now + c * kPanel, x, steps, sums + (chunk + c) * chunk_sums, begin == 0, resident,
            following >= t.reduction_words, share, [&](int64_t i, int64_t some) NMKERN_FLAT {
              panels.generate(following + first + i, some, next_chunk, word(then, first + i));
            });
      }
      std::swap(now, then);
    }
  }
}

// sums[block of outputs and rows][kVectors][rows of the block] (+)= the parts that lay below each other
template <class S>
void collect(const Tile& t, int64_t blocks, int stacked, const float* from) {
  const int64_t rows = t.block * S::lanes;
  for (int64_t i = 0; i < blocks * kVectors; ++i, from += stacked * rows) {
    float* to = t.sums + i * rows;
    for (int64_t at = 0; at < rows; at += S::lanes) {
      auto sum = S::load(from + at);
      for (int p = 1; p < stacked; ++p) sum = S::add(sum, S::load(from + p * rows + at));
      S::store(to + at, t.more ? S::add(S::load(to + at), sum) : sum);
    }
  }
}

// Integers: the digits of a block's rows lie below each other in one register.
template <class Unit, class S>
void run_digits(const Tile& t) {
  Tile u = t;
  u.block *= t.parts;
  u.batch *= t.parts;
  Unit::configure(int(u.block));
  const auto run = [&](const auto& panels) {
    multiply_panels<Unit, 1>(u, panels, t.chain);
    collect_digits(t, std::remove_cvref_t<decltype(panels)>::chunks, reinterpret_cast<int32_t*>(t.chain));
  };
  with_codec<ByteCodec>(t.family, [&](auto codec) {
    using Codec = decltype(codec);
    if (!t.transposed)
      run(BytePanels<S, Codec, false>(u));
    else if constexpr (Codec::chunks <= 2)
      run(BytePanels<S, Codec, true>(u));
    else  // eight chunks at once are beyond L1: 284 clocks a word for four rows, and 222 one by one
      run(Panels<S, Codec, true>(u));
  });
  Unit::release();
}

template <class Unit, class S, template <Family> class C>
void run_on_unit(const Tile& t) {
  if (t.fixed) return run_digits<Unit, S>(t);
  // Parts of few rows lie below each other in one register, which is one product for all.
  const int stacked = t.batch == t.block && t.parts * t.block <= kUnitRows ? t.parts : 1;
  Tile u = t;
  u.block *= stacked;
  u.batch *= stacked;
  u.parts /= stacked;
  float* sums = t.chain ? t.chain : t.sums;
  Unit::configure(int(u.block));
  with_codec<C>(t.family, [&](auto codec) {
    using Codec = decltype(codec);
    const auto run = [&](const auto& panels) {
      if (u.parts == 1)
        multiply_panels<Unit, 1>(u, panels, sums);
      else if (u.parts == 2)
        multiply_panels<Unit, 2>(u, panels, sums);
      else
        multiply_panels<Unit, 3>(u, panels, sums);
      const int chunks = std::remove_cvref_t<decltype(panels)>::chunks;
      if (t.chain) collect<S>(t, t.batch / t.block * chunks, stacked, sums);
    };
    if (t.transposed)
      run(Panels<S, Codec, true>(u));
    else
      run(Panels<S, Codec, false>(u));
  });
  Unit::release();
}

// See MatrixUnit::pack.
uint8_t pack(const float* row, int64_t steps, int group, int parts, float scale, uint32_t* to, int64_t rows) {
  alignas(64) uint32_t low[16], high[16];
  for (int s = 0; s < 16; ++s) {
    low[s] = uint32_t(s / group * 2 * group + s % group);
    high[s] = low[s] + uint32_t(group);
  }
  const __m512i pick_low = _mm512_load_si512(low), pick_high = _mm512_load_si512(high);
  const __m512i leading = _mm512_set1_epi32(int(0xFFFF0000));
  const __m512 factor = _mm512_set1_ps(scale);
  const auto take = [&](__m512& rest) NMKERN_FLAT {
    const __m512 part = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(rest), leading));
    rest = _mm512_sub_ps(rest, part);
    return _mm512_castps_si512(part);
  };
  // The first part of an infinity or a NaN is all of it.
  const auto take_first = [&](__m512& rest) NMKERN_FLAT {
    const __mmask16 special = _mm512_fpclass_ps_mask(rest, 0x99), nan = _mm512_fpclass_ps_mask(rest, 0x81);
    __m512i part = take(rest);
    rest = _mm512_mask_mov_ps(rest, special, _mm512_setzero_ps());
    return _mm512_mask_or_epi32(part, nan, part, _mm512_set1_epi32(0x7FC00000));
  };
  __mmask16 large = 0, nonzero = 0;
  for (int64_t s = 0; s < steps; s += 16, row += 32) {
    const __m512 a = _mm512_loadu_ps(row), b = _mm512_loadu_ps(row + 16);
    __m512 even = _mm512_mul_ps(factor, _mm512_permutex2var_ps(a, pick_low, b));
    __m512 odd = _mm512_mul_ps(factor, _mm512_permutex2var_ps(a, pick_high, b));
    const __m512 largest = _mm512_castsi512_ps(  // NaN are the largest
        _mm512_max_epu32(_mm512_castps_si512(_mm512_abs_ps(even)), _mm512_castps_si512(_mm512_abs_ps(odd))));
    large |= _mm512_cmp_ps_mask(largest, _mm512_set1_ps(kTiny), _CMP_NLT_UQ);
    nonzero |= _mm512_cmp_ps_mask(largest, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    for (int p = 0; p < parts; ++p) {
      const __m512i one = p == 0 ? take_first(even) : take(even),
                    other = p == 0 ? take_first(odd) : take(odd);
      const __m512i pair = _mm512_or_si512(_mm512_srli_epi32(one, 16), other);
      _mm512_storeu_si512(to + (s * parts + 16 * p) * rows, pair);
    }
  }
  return uint8_t((large ? kLarge : 0) | (nonzero ? kNonzero : 0));
}

// See MatrixUnit::untile.
void untile(const float* sums, int64_t chunk_stride, int64_t vector_stride, int64_t vectors, float factor,
            float* row) {
  const __m512 scale = _mm512_set1_ps(factor);
  for (int64_t first = 0; first < vectors; first += kVectors, sums += chunk_stride, row += kVectors) {
    __m512 v[kVectors];
    for (int i = 0; i < kVectors; ++i) v[i] = _mm512_mul_ps(scale, _mm512_loadu_ps(sums + i * vector_stride));
    transpose_quads(v);  // v[i]: all four vectors of each of the lanes i, i + 4, i + 8 and i + 12
    unroll<4>([&](auto i) {
      unroll<4>([&](auto j) { _mm_storeu_ps(row + (i + 4 * j) * vectors, _mm512_extractf32x4_ps(v[i], j)); });
    });
  }
}

// Tile::scratch has room for two panels.
static_assert(2 * panel_steps(false, 2) * kVectors * int64_t{sizeof(__m512i)} <= tile_bytes<Avx512>());

template <class Unit>
constexpr MatrixUnit matrix_unit() {
  return {run_on_unit<Unit, Avx512, UnitCodec>, pack, largest, pack_digits, untile};
}

}  // namespace
}  // namespace nmkern::cpu
