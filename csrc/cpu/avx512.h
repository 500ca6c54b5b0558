// The AVX-512 policy (F, BW, DQ, VL; VBMI where compiled for it): 16 lanes, 6 rows of x a block.
#pragma once

#include <immintrin.h>

#include "codec.h"
#include "hash.h"
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
  static constexpr int max_block = 6;  // 24 sums, 4 weights, 1 x, 1 to 3 constants of 32 registers

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
  static NMKERN_INLINE U merge(V even, V odd) {
    return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
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

  static NMKERN_INLINE Bytes normal_bytes(U word) {
    static const NormalBytes table;
    const __mmask64 positive = _mm512_movepi8_mask(word);
    const U index = _mm512_mask_blend_epi8(positive, xor2(word, _mm512_set1_epi8(-1)), word);
    const U high = _mm512_permutex2var_epi8(_mm512_load_si512(table.high), index,
                                            _mm512_load_si512(table.high + 64));
    const U low = _mm512_permutex2var_epi8(_mm512_load_si512(table.low), index,
                                           _mm512_load_si512(table.low + 64));
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
      // Bytes 2 and 3 of a float32 are those of its bfloat16: (low, high) of byte Field.
      const U select = _mm512_add_epi32(
          set1(uint32_t(Field) << 16 | uint32_t(64 + Field) << 24),
          _mm512_mullo_epi32(set1(0x04040000),
                             _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
      return _mm512_castsi512_ps(
          _mm512_maskz_permutex2var_epi8(0xCCCCCCCCCCCCCCCC, word.low, select, word.high));
#else
      static const NormalFloats table;
      const U index = _mm512_and_si512(_mm512_srli_epi32(word, 8 * Field), set1(255));
      return _mm512_i32gather_ps(index, table.code, 4);
#endif
    }
  }
};

}  // namespace
}  // namespace nmkern::cpu
