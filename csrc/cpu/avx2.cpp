// Kernels for AVX2 and FMA: 8 lanes, 2 rows of x a block.
#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#include "codec.h"
#include "hash.h"
#include "tables.h"
#include "flynet_tile.h"
#include "tile.h"

namespace nmkern::cpu {
namespace {

struct Avx2 {
  using U = __m256i;
  using V = __m256i;
  using F = __m256;
  using RowHasher = cpu::RowHasher<Avx2>;
  using ColumnHasher = cpu::ColumnHasher<Avx2>;
  template <Family>
  using Prepared = U;
  static constexpr int lanes = 8;
  static constexpr int max_block = 2;  // 8 sums, 4 weights, 1 x, 2 constants of 16 registers

  static NMKERN_INLINE V set1(uint32_t v) { return _mm256_set1_epi32(int(v)); }
  static NMKERN_INLINE V xor2(V a, V b) { return _mm256_xor_si256(a, b); }
  static NMKERN_INLINE V xor3(V a, V b, V c) { return xor2(xor2(a, b), c); }
  static NMKERN_INLINE V high(V p) { return _mm256_srli_epi64(p, 32); }
  static NMKERN_INLINE V multiply(V a, uint32_t b) { return _mm256_mul_epu32(a, set1(b)); }
  static NMKERN_INLINE V lanes_from(uint32_t first, int odd) {
    const V all = _mm256_add_epi32(set1(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return odd ? high(all) : all;
  }
  static NMKERN_INLINE U merge(V even, V odd) {
    return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  }

  static NMKERN_INLINE U set_words(uint32_t v) { return set1(v); }
  static NMKERN_INLINE U load_words(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static NMKERN_INLINE void store_words(uint32_t* p, U v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
  }
  static NMKERN_INLINE U subtract(U a, U b) { return _mm256_sub_epi32(a, b); }
  static NMKERN_INLINE U min_words(U a, U b) { return _mm256_min_epu32(a, b); }
  static NMKERN_INLINE U or_equal(U mask, U a, U b) {
    return _mm256_or_si256(mask, _mm256_cmpeq_epi32(a, b));
  }
  static NMKERN_INLINE U choose(U mask, U yes, U no) { return _mm256_blendv_epi8(no, yes, mask); }
  static NMKERN_INLINE U multiply_high(U a, uint32_t b) {
    return _mm256_blend_epi32(high(multiply(a, b)), multiply(high(a), b), 0xAA);
  }
  static NMKERN_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  static NMKERN_INLINE F subtract(F a, F b) { return _mm256_sub_ps(a, b); }
  static NMKERN_INLINE F multiply(F a, F b) { return _mm256_mul_ps(a, b); }
  static NMKERN_INLINE F relu(F v) { return _mm256_max_ps(zero(), v); }  // a NaN stays one
  static NMKERN_INLINE F gather(const float* x, U index) { return _mm256_i32gather_ps(x, index, 4); }

  // to[j * kSparseRows + i] = from[i * kBatch + j] for lanes x kBatch
  static NMKERN_INLINE void transpose(const float* from, float* to) {
    for (int j = 0; j < kBatch; ++j)
      for (int i = 0; i < lanes; ++i) to[j * kSparseRows + i] = from[i * kBatch + j];
  }

  static NMKERN_INLINE U shift_right(U v, int bits) {
    return _mm256_srl_epi32(v, _mm_cvtsi32_si128(bits));
  }
  static NMKERN_INLINE F zero() { return _mm256_setzero_ps(); }
  static NMKERN_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  static NMKERN_INLINE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static NMKERN_INLINE F broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static NMKERN_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

  template <Family>
  static NMKERN_INLINE U prepare(U word) {
    return word;
  }

  template <Family Fam, int Field>
  static NMKERN_INLINE F decode(U word) {
    if constexpr (Fam == Family::uniform) {
      // The field where it stands, u * 16^Field, converts exactly; one fma makes it 2 u - 15.
      constexpr uint32_t kMask = 15u << (Field < 7 ? 4 * Field : 0);
      constexpr float kUnit = 2.0f / float(Field < 7 ? 1u << (4 * Field) : 1u);
      const U field = Field < 7 ? _mm256_and_si256(word, set1(kMask)) : _mm256_srli_epi32(word, 28);
      return _mm256_fmadd_ps(_mm256_cvtepi32_ps(field), _mm256_set1_ps(kUnit), _mm256_set1_ps(-15));
    } else if constexpr (Fam == Family::rademacher) {
      // (bit << 31) ^ -1.0f: one bit gives +1, zero gives -1.
      const U bit = _mm256_and_si256(_mm256_slli_epi32(word, 31 - Field), set1(0x80000000));
      return _mm256_castsi256_ps(xor2(bit, set1(0xBF800000)));
    } else {
      const U index = _mm256_and_si256(_mm256_srli_epi32(word, 8 * Field), set1(255));
      return _mm256_i32gather_ps(kNormalFloats.code, index, 4);
    }
  }
};

void run(const Tile& t) { run_family<Avx2, FloatCodec<Avx2>::Of>(t); }
constexpr Kernels kKernels{"avx2", Avx2::lanes, Avx2::max_block, false, tile_bytes<Avx2>(), run, decode_family<Avx2, FloatCodec<Avx2>::Of>, sparse_kernels<Avx2>(), fly_kernels<Avx2>()};
}  // namespace
const Kernels* avx2_kernels() { return &kKernels; }
}  // namespace nmkern::cpu
#else
#include "kernels.h"
namespace nmkern::cpu {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace nmkern::cpu
#endif
