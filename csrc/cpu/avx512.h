// The AVX-512 policy (F, BW, DQ, VL; VBMI where compiled for it): 16 lanes, 6 rows of x a block.
#pragma once

#include <immintrin.h>

#include "codec.h"
#include "hash.h"
#include "flynet_tile.h"
#include "tables.h"
#include "tile.h"

namespace nmkern::cpu {
namespace {

struct Avx512 {
  using U = __m512i;
  using V = __m512i;
  using F = __m512;
  using RowHasher = cpu::RowHasher<Avx512>;
  using ColumnHasher = cpu::ColumnHasher<Avx512>;
  static constexpr int lanes = 16;
  static constexpr int hash_vectors = 2;
  static constexpr int max_block = 6;  // 24 sums, 4 weights, 1 x, 1 to 3 constants of 32 registers
  static constexpr int tile_block = 4;  // 16 sums: leaves room for a hash, see multiply_replacing
  static constexpr int fused_block = 6;
  static constexpr bool interleaved = true;
  static constexpr int unrolled_chunks = 2;  // all of rademacher took the compiler 78 s for one file, now 29

  static NMKERN_INLINE V set1(uint32_t v) { return _mm512_set1_epi32(int(v)); }
  static NMKERN_INLINE V xor2(V a, V b) { return _mm512_xor_si512(a, b); }
  static NMKERN_INLINE V xor3(V a, V b, V c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
  static NMKERN_INLINE V high(V p) { return _mm512_srli_epi64(p, 32); }
  static NMKERN_INLINE V multiply(V a, uint32_t b) { return _mm512_mul_epu32(a, set1(b)); }
  static NMKERN_INLINE V lanes_from(uint32_t first, int odd) {
    const V all = _mm512_add_epi32(
        set1(first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    return odd ? high(all) : all;
  }
  static NMKERN_INLINE U merge(const V (&p)[2]) {
    return _mm512_mask_shuffle_epi32(p[0], 0xAAAA, p[1], _MM_PERM_CCAA);
  }
  static NMKERN_INLINE U merge_high(const V (&p)[2]) {
    return _mm512_mask_shuffle_epi32(p[1], 0x5555, p[0], _MM_PERM_DDBB);
  }
  static NMKERN_INLINE U xor_words(U a, U b, U c) { return xor3(a, b, c); }

  static NMKERN_INLINE U set_words(uint32_t v) { return set1(v); }
  static NMKERN_INLINE U load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static NMKERN_INLINE void store_words(uint32_t* p, U v) { _mm512_storeu_si512(p, v); }
  static NMKERN_INLINE U subtract(U a, U b) { return _mm512_sub_epi32(a, b); }
  static NMKERN_INLINE U min_words(U a, U b) { return _mm512_min_epu32(a, b); }
  static NMKERN_INLINE U or_equal(U mask, U a, U b) {
    return _mm512_mask_mov_epi32(mask, _mm512_cmpeq_epi32_mask(a, b), set1(~0u));
  }
  static NMKERN_INLINE U choose(U mask, U yes, U no) {
    return _mm512_ternarylogic_epi32(mask, yes, no, 0xCA);
  }
  static NMKERN_INLINE U multiply_high(U a, uint32_t b) {
    return _mm512_mask_mov_epi32(high(multiply(a, b)), 0xAAAA, multiply(high(a), b));
  }
  static NMKERN_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static NMKERN_INLINE F subtract(F a, F b) { return _mm512_sub_ps(a, b); }
  static NMKERN_INLINE F multiply(F a, F b) { return _mm512_mul_ps(a, b); }
  static NMKERN_INLINE F relu(F v) { return _mm512_max_ps(zero(), v); }  // a NaN stays one
  static NMKERN_INLINE F gather(const float* x, U index) { return _mm512_i32gather_ps(index, x, 4); }

  // to[j * stride + i] = from[i * From + j] for 16 x 16
  template <int From>
  static NMKERN_INLINE void transpose(const float* from, float* to, int64_t stride) {
    F rows[16];
    unroll<16>([&](auto i) NMKERN_FLAT { rows[i] = load(from + i * From); });
    transpose(rows, to, stride);
  }
  static NMKERN_INLINE void transpose(F (&a)[16], float* to, int64_t stride) {
    F b[16];
    unroll<8>([&](auto i) NMKERN_FLAT {
      b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
      b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
    });
    unroll<4>([&](auto i) NMKERN_FLAT {
      a[4 * i] = _mm512_shuffle_ps(b[4 * i], b[4 * i + 2], 0x44);
      a[4 * i + 1] = _mm512_shuffle_ps(b[4 * i], b[4 * i + 2], 0xEE);
      a[4 * i + 2] = _mm512_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0x44);
      a[4 * i + 3] = _mm512_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0xEE);
    });
    // a[4 i + c] holds columns c, c + 4, c + 8, c + 12 (its 128-bit lanes) of rows 4 i to 4 i + 3.
    unroll<4>([&](auto c) NMKERN_FLAT {
      const __m512 low01 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x44);
      const __m512 high01 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xEE);
      const __m512 low23 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x44);
      const __m512 high23 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xEE);
      store(to + c * stride, _mm512_shuffle_f32x4(low01, low23, 0x88));
      store(to + (c + 4) * stride, _mm512_shuffle_f32x4(low01, low23, 0xDD));
      store(to + (c + 8) * stride, _mm512_shuffle_f32x4(high01, high23, 0x88));
      store(to + (c + 12) * stride, _mm512_shuffle_f32x4(high01, high23, 0xDD));
    });
  }

  static NMKERN_INLINE U shift_right(U v, int bits) {
    return _mm512_srl_epi32(v, _mm_cvtsi32_si128(bits));
  }
  static NMKERN_INLINE F zero() { return _mm512_setzero_ps(); }
  static NMKERN_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static NMKERN_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static NMKERN_INLINE F broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static NMKERN_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

#if defined(__AVX512VBMI__)
  // |code| as bfloat16 is two bytes, and two byte lookups serve 64 weights: index 0 to 127 is the
  // distance from the middle, the sign is bit 7 of the field.
  struct Bytes {
    U high, low;
  };
  template <Family Fam>
  using Prepared = std::conditional_t<Fam == Family::normal, Bytes, U>;

  static NMKERN_INLINE __mmask64 normal_negative(U word) {
    return _mm512_testn_epi8_mask(word, _mm512_set1_epi8(-128));
  }
  static NMKERN_INLINE U normal_index(U word, __mmask64 negative) {
    return _mm512_mask_sub_epi8(word, negative, _mm512_set1_epi8(-1), word);  // -1 - word = ~word
  }
  static NMKERN_INLINE Bytes normal_bytes(U word) {
    const U index = normal_index(word, normal_negative(word));
    const U high = _mm512_permutex2var_epi8(_mm512_load_si512(kNormalBytes.high), index,
                                            _mm512_load_si512(kNormalBytes.high + 64));
    const U low = _mm512_permutex2var_epi8(_mm512_load_si512(kNormalBytes.low), index,
                                           _mm512_load_si512(kNormalBytes.low + 64));
    // high | (~word & 0x80)
    return {_mm512_ternarylogic_epi32(high, word, _mm512_set1_epi8(-128), 0xF2), low};
  }
#else
  template <Family>
  using Prepared = U;
#endif

  template <Family Fam>
  static NMKERN_INLINE Prepared<Fam> prepare(U word) {
#if defined(__AVX512VBMI__)
    if constexpr (Fam == Family::normal) return normal_bytes(word);
    else return word;
#else
    return word;
#endif
  }

  template <Family Fam, int Field>
  static NMKERN_INLINE F decode(const Prepared<Fam>& word) {
    if constexpr (Fam == Family::uniform) {
      // vpermps reads the low four bits of each index: no mask.
      const F table = _mm512_setr_ps(-15, -13, -11, -9, -7, -5, -3, -1, 1, 3, 5, 7, 9, 11, 13, 15);
      return _mm512_permutexvar_ps(_mm512_srli_epi32(word, 4 * Field), table);
    } else if constexpr (Fam == Family::rademacher) {
      // (bit << 31) ^ -1.0f: one bit gives +1, zero gives -1.
      const U bit = _mm512_slli_epi32(word, 31 - Field);
      return _mm512_castsi512_ps(
          _mm512_ternarylogic_epi32(bit, set1(0x80000000), set1(0xBF800000), 0x6A));
    } else {
#if defined(__AVX512VBMI__)
      // Bytes 2 and 3 of a float32 are those of its bfloat16.
      const U select = _mm512_load_si512(kNormalSelect.to_float[Field]);
      return _mm512_castsi512_ps(
          _mm512_maskz_permutex2var_epi8(0xCCCCCCCCCCCCCCCC, word.low, select, word.high));
#else
      const U index = _mm512_and_si512(_mm512_srli_epi32(word, 8 * Field), set1(255));
      return _mm512_i32gather_ps(index, kNormalFloats.code, 4);
#endif
    }
  }
};

}  // namespace
}  // namespace nmkern::cpu
