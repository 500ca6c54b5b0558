// Kernels for AVX2 and FMA: 8 lanes, 3 rows of x a block.
//
// On Zen 3 a weight vector of `uniform` takes 7.5 vector instructions at M = 1 (3 of them hash) or, as fields, 5, and
// at most four are issued a clock: measured 2.2 and 1.8 clocks.
#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#include <array>

#include "codec.h"
#include "fields.h"
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
  // Of the normal family: the bytes of |code|, and the sign bits of the codes, field by field.
  struct Bytes {
    U magnitude, sign;
  };
  template <Family Fam>
  using Prepared = std::conditional_t<Fam == Family::normal, Bytes, U>;
  static constexpr int lanes = 8;
  static constexpr int hash_vectors = 2;
  static constexpr int max_block = 3;  // 12 sums, 1 weight, 3 x of 16 registers; 2 rows: 15 % slower at M = 256
  static constexpr int tile_block = 3;
  static constexpr int fused_block = 2;  // 8 sums, 4 weights, 1 x, 2 constants
  static constexpr bool interleaved = false;
  static constexpr int unrolled_chunks = 8;  // rademacher at M = 2 without a register for the shift: 2.5 ms against 4.1

  static NMKERN_INLINE V set1(uint32_t v) { return _mm256_set1_epi32(int(v)); }
  static NMKERN_INLINE V xor2(V a, V b) { return _mm256_xor_si256(a, b); }
  static NMKERN_INLINE V xor3(V a, V b, V c) { return xor2(xor2(a, b), c); }
  static NMKERN_INLINE V high(V p) { return _mm256_srli_epi64(p, 32); }
  static NMKERN_INLINE V multiply(V a, uint32_t b) { return _mm256_mul_epu32(a, set1(b)); }
  static NMKERN_INLINE V lanes_from(uint32_t first, int odd) {
    const V all = _mm256_add_epi32(set1(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return odd ? high(all) : all;
  }
  static NMKERN_INLINE U merge(const V (&p)[2]) {
    return _mm256_blend_epi32(p[0], _mm256_slli_epi64(p[1], 32), 0xAA);
  }
  static NMKERN_INLINE U merge_high(const V (&p)[2]) { return _mm256_blend_epi32(high(p[0]), p[1], 0xAA); }
  static NMKERN_INLINE U xor_words(U a, U b, U c) { return xor3(a, b, c); }

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

  // to[j * stride + i] = from[i * From + j] for lanes x kBatch, 8 x 8 at a time
  template <int From>
  static NMKERN_INLINE void transpose(const float* from, float* to, int64_t stride) {
    for (int half = 0; half < 2; ++half, from += 8, to += 8 * stride) {
      F a[8], b[8];
      unroll<8>([&](auto i) NMKERN_FLAT { a[i] = load(from + i * From); });
      unroll<4>([&](auto i) NMKERN_FLAT {
        b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
      });
      unroll<2>([&](auto i) NMKERN_FLAT {
        a[4 * i] = _mm256_shuffle_ps(b[4 * i], b[4 * i + 2], 0x44);
        a[4 * i + 1] = _mm256_shuffle_ps(b[4 * i], b[4 * i + 2], 0xEE);
        a[4 * i + 2] = _mm256_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0x44);
        a[4 * i + 3] = _mm256_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0xEE);
      });
      // a[4 i + c] holds columns c and c + 4 (its 128-bit lanes) of rows 4 i to 4 i + 3.
      unroll<4>([&](auto c) NMKERN_FLAT {
        store(to + c * stride, _mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
        store(to + (c + 4) * stride, _mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
      });
    }
  }

  static NMKERN_INLINE U shift_right(U v, int bits) {
    return _mm256_srl_epi32(v, _mm_cvtsi32_si128(bits));
  }
  static NMKERN_INLINE F zero() { return _mm256_setzero_ps(); }
  static NMKERN_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  static NMKERN_INLINE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static NMKERN_INLINE F broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static NMKERN_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

  // |code| of four fields of every lane: byte lookups in eight tables of 16, of which three bits of the
  // index choose one. At M = 1, 8192 x 8192 (Zen 3, 2 threads): 8.1 ms; gathers of 256 floats 16.4.
  static NMKERN_INLINE Bytes normal_bytes(U word) {
    // The distance from the middle is u - 128 above it and 127 - u, so ~u without its top bit, below.
    const U below = _mm256_cmpgt_epi8(word, _mm256_set1_epi8(-1));
    const U index = xor2(word, below);
    const U low = _mm256_and_si256(index, _mm256_set1_epi8(15));
    const U bit4 = _mm256_slli_epi16(index, 3), bit5 = _mm256_slli_epi16(index, 2),
            bit6 = _mm256_slli_epi16(index, 1);
    // One after the other, so that what is found stays in registers: 3 % over eight lookups first.
    const auto find = [&](int table) NMKERN_FLAT {
      const auto* from = reinterpret_cast<const __m128i*>(kNormal + 16 * table);
      return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(from)), low);
    };
    const auto find_of_2 = [&](int table) NMKERN_FLAT {
      const U clear = find(table);
      return _mm256_blendv_epi8(clear, find(table + 1), bit4);
    };
    const auto find_of_4 = [&](int table) NMKERN_FLAT {
      const U clear = find_of_2(table);
      return _mm256_blendv_epi8(clear, find_of_2(table + 2), bit5);
    };
    const U clear = find_of_4(0);
    return {_mm256_blendv_epi8(clear, find_of_4(4), bit6), _mm256_and_si256(below, _mm256_set1_epi8(-128))};
  }

  template <Family Fam>
  static NMKERN_INLINE Prepared<Fam> prepare(U word) {
    if constexpr (Fam == Family::normal) return normal_bytes(word);
    else return word;
  }

  // first, first + step, ... in the four lanes of each half
  static NMKERN_INLINE U spread(int first, int step) {
    return _mm256_broadcastsi128_si256(
        _mm_setr_epi32(first, first + step, first + 2 * step, first + 3 * step));
  }

  template <Family Fam, int Field>
  static NMKERN_INLINE F decode(const Prepared<Fam>& word) {
    if constexpr (Fam == Family::uniform) {
      // The field where it stands, u * 16^Field, converts exactly; one fma makes it 2 u - 15.
      constexpr uint32_t kMask = 15u << (Field < 7 ? 4 * Field : 0);
      constexpr float kUnit = 2.0f / float(Field < 7 ? 1u << (4 * Field) : 1u);
      const U field = Field < 7 ? _mm256_and_si256(word, set1(kMask)) : _mm256_srli_epi32(word, 28);
      return _mm256_fmadd_ps(_mm256_cvtepi32_ps(field), _mm256_set1_ps(kUnit), _mm256_set1_ps(-15));
    } else if constexpr (Fam == Family::rademacher) {
      // The blend reads the top bit of each lane: no mask, and nothing to compute the sign with.
      const F bit = _mm256_castsi256_ps(_mm256_slli_epi32(word, 31 - Field));
      return _mm256_blendv_ps(_mm256_set1_ps(-1), _mm256_set1_ps(1), bit);
    } else {
      // Byte `Field` of each lane, to its lowest byte and to its highest.
      constexpr int kLow = int(0x80808000u) + Field, kHigh = 0x00808080 + (Field << 24);
      const U low = spread(kLow, 4), top = spread(kHigh, 4 << 24);
      const F magnitude = _mm256_cvtepi32_ps(_mm256_shuffle_epi8(word.magnitude, low));
      return _mm256_xor_ps(magnitude, _mm256_castsi256_ps(_mm256_shuffle_epi8(word.sign, top)));
    }
  }
};

// Weights that nothing decodes, see fields.h. Clocks a vector of 8 weights on a core of Zen 3, decoded and as fields:
//
//                           M = 1         2             4             6
//   uniform                 2.19 1.82     2.74 2.33     3.82 3.28     4.99 4.49
//   uniform, transposed     2.11 1.81     3.23 2.20     4.40 3.30     6.31 4.44
//   rademacher              1.54 1.01     2.02 1.55     3.27 2.56     4.30 3.95
//   rademacher, transposed  1.44 1.15     1.83 1.53     2.89 2.62     6.05 3.62
//
// The hash of uniform is 0.9 of them. normal, whose lookups are most of its work, would gain 5 %.
template <Family F>
struct FieldCodec : FloatCodec<Avx2>::Of<F> {
  static constexpr int run_steps = field_run(F);
  static constexpr int sums_at_once = 5;  // of M = 1, or each would wait for the multiply before

  // Loaded where it is used: GCC would keep the masks of all fields in registers, and sums in memory.
  template <int Field>
  static NMKERN_INLINE __m256i mask() {
    alignas(32) static constexpr auto kMask = [] {
      std::array<uint32_t, 8> lanes{};
      lanes.fill(field_mask(F) << field_place(F, Field));
      return lanes;
    }();
    __m256i loaded;
    asm volatile("vmovdqa %1, %0" : "=x"(loaded) : "m"(kMask));
    return loaded;
  }
  template <int Field>
  static NMKERN_INLINE __m256 decode(__m256i word, __m256i mask = FieldCodec::mask<Field>()) {
    if constexpr (field_bit(F, Field) >= kFieldBits) word = _mm256_srli_epi32(word, kFieldShift);
    return _mm256_castsi256_ps(_mm256_and_si256(word, mask));
  }
};

void run(const Tile& t) { run_family<Avx2, FloatCodec<Avx2>::Of>(t); }

// With subnormal numbers as they are, whatever torch.set_flush_denormal has said.
void run_fields(const Tile& t) {
  constexpr unsigned kFlush = 0x8040;  // their inputs and results to zero
  const unsigned mode = _mm_getcsr();
  if (mode & kFlush) _mm_setcsr(mode & ~kFlush);
  run_fields_family<Avx2, FieldCodec>(t);
  if (mode & kFlush) _mm_setcsr(mode);
}

constexpr Kernels kKernels = kernels_of<Avx2>("avx2", false, run);
constexpr Kernels kSubnormalKernels = [] {
  Kernels k = kKernels;
  k.name = "avx2_subnormal";
  k.run_fields = run_fields;
  return k;
}();
}  // namespace
const Kernels* avx2_kernels() { return &kKernels; }
const Kernels* avx2_subnormal_kernels() { return &kSubnormalKernels; }
}  // namespace nmkern::cpu
#else
#include "kernels.h"
namespace nmkern::cpu {
const Kernels* avx2_kernels() { return nullptr; }
const Kernels* avx2_subnormal_kernels() { return nullptr; }
}  // namespace nmkern::cpu
#endif
