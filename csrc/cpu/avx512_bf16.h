// Pairs of bfloat16 over the AVX-512 policy, for CPUs with VBMI (byte lookups).
//
// In bfloat16 a reduction step is a pair: forward, fields f and f + P/2 of a word, which lie in the two
// 16-bit halves of a lane and are decoded in place; transposed, two rows of a patch, whose 16-bit
// halves are brought into one lane first. x is packed in the same pairs.
#pragma once

#include "avx512.h"

namespace nmkern::cpu {
namespace {

template <Family F>
struct Bf16Codec {
  using Weight = __m512i;  // pairs of bfloat16
  using X = uint32_t;
  using U = __m512i;
  using Prepared = Avx512::Prepared<F>;
  static constexpr Family family = F;
  static constexpr int columns = columns_per_word(F);
  static constexpr int halves = 2;
  static constexpr int forward_steps = columns / 2;
  static constexpr int patch_steps = kRowsPerPatch / 2;
  static constexpr int run_steps = 0;
  static constexpr int sums_at_once = 1;

  static NMKERN_INLINE Prepared prepare(U word) { return Avx512::prepare<F>(word); }

  template <int Field>
  static NMKERN_INLINE Weight decode(const Prepared& word) {
    if constexpr (F == Family::uniform) {
      // vpermw reads five bits of each index; the fifth is the next field's and picks a copy.
      alignas(64) static constexpr uint16_t kCodes[32] = {
          0xC170, 0xC150, 0xC130, 0xC110, 0xC0E0, 0xC0A0, 0xC040, 0xBF80, 0x3F80, 0x4040, 0x40A0,
          0x40E0, 0x4110, 0x4130, 0x4150, 0x4170, 0xC170, 0xC150, 0xC130, 0xC110, 0xC0E0, 0xC0A0,
          0xC040, 0xBF80, 0x3F80, 0x4040, 0x40A0, 0x40E0, 0x4110, 0x4130, 0x4150, 0x4170};
      return _mm512_permutexvar_epi16(_mm512_srli_epi32(word, 4 * Field), _mm512_load_si512(kCodes));
    } else if constexpr (F == Family::rademacher) {
      const U bit = _mm512_slli_epi16(word, 15 - Field);
      return _mm512_ternarylogic_epi32(bit, Avx512::set1(0x80008000), Avx512::set1(0xBF80BF80), 0x6A);
    } else {
      const U select = _mm512_load_si512(kNormalSelect.to_pair[Field]);
      return _mm512_permutex2var_epi8(word.low, select, word.high);
    }
  }

  // Each half of a lane with its first `fields` fields shifted out.
  static NMKERN_INLINE U skip(U word, int fields) {
    return _mm512_srl_epi16(word, _mm_cvtsi32_si128(fields * (32 / columns)));
  }
  // Rows r and r + 1 side by side: [pair][half] of (low or high half of row r, the same of row r + 1).
  static NMKERN_INLINE void arrange_rows(U (&word)[4]) {
    for (int pair = 0; pair < 2; ++pair) {
      const U a = word[2 * pair], b = word[2 * pair + 1];
      word[2 * pair] = _mm512_mask_blend_epi16(0xAAAAAAAA, a, _mm512_slli_epi32(b, 16));
      word[2 * pair + 1] = _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(a, 16), b);
    }
  }
  static NMKERN_INLINE Weight broadcast(const uint32_t* x) { return _mm512_set1_epi32(int(*x)); }
  static NMKERN_INLINE __m512 fma(Weight w, Weight x, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
  }
};

}  // namespace
}  // namespace nmkern::cpu
