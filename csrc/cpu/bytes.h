// Weights as bytes, for a matrix unit's products of integers (by_digits.h).
//
//   sums[o, m] = sum_k byte[o, k] * digit[m, k]        four bytes a step
//
// A byte of a hash's word holds two fields of uniform, u + 16v, or eight of rademacher, and serves as it is but for
// a mask. A field in the upper bits makes the sum larger by a power of two; and what shares a byte with a field may
// be taken out of the sums again, which are exact:
//
//   uniform     forward      x * u + y * v = (16x * (u + 16v) + (y - 16x) * 16v) / 16: half of the masks
//               transposed   a mask for each half of a byte
//   rademacher  forward      a mask for each of four bits, and the upper four are shifted down before;
//                            x takes the factor that the four differ in
//               transposed   a mask for each bit
//
// Those of normal need nine bits, with their sign: x * code = 2x * (code if positive, else 0) - x * |code|. That is two
// bytes, but one lookup, where bfloat16 takes two, and more to bring their bytes together.
#pragma once

#include "avx512.h"

namespace nmkern::cpu {
namespace {

template <Family F>
struct ByteCodec {
  static constexpr bool kUniform = F == Family::uniform, kNormal = F == Family::normal;
  using Weight = __m512i;
  using U = __m512i;
  static constexpr Family family = F;
  static constexpr int columns = columns_per_word(F);
  static constexpr bool bytes = true;
  static constexpr int elements = digit_elements(F);  // of a step
  static constexpr int forward_steps = columns / elements;
  static constexpr int patch_steps = kRowsPerPatch / elements;

  struct Prepared {
    U first, second;
  };
  static NMKERN_INLINE Prepared prepare(U word) {
    if constexpr (kUniform) {
      return {word, word};
    } else if constexpr (kNormal) {
      const __mmask64 negative = Avx512::normal_negative(word);
      const U magnitude =
          _mm512_permutex2var_epi8(_mm512_loadu_si512(nmkern::kNormal), Avx512::normal_index(word, negative),
                                   _mm512_loadu_si512(nmkern::kNormal + 64));
      return {magnitude, _mm512_mask_mov_epi8(magnitude, negative, _mm512_setzero_si512())};
    } else {
      return {word, _mm512_srli_epi16(word, 4)};
    }
  }
  // Forward: byte i of step s has field 2i + s of uniform, 8i + s of rademacher, i of normal.
  template <int Step>
  static NMKERN_INLINE Weight decode(const Prepared& p) {
    if constexpr (kNormal)
      return Step ? p.second : p.first;
    else if constexpr (kUniform)
      return Step ? bits<4, 4>(p.first) : p.first;
    else
      return bits<Step % 4, 1>(Step < 4 ? p.first : p.second);
  }

  // Transposed: word l becomes, of the lanes 4q + l, the bytes of the patch's rows: byte b in lane 4q + b.
  static NMKERN_INLINE void arrange_rows(U (&word)[4]) {
    const U low[2] = {_mm512_unpacklo_epi8(word[0], word[1]), _mm512_unpacklo_epi8(word[2], word[3])};
    const U high[2] = {_mm512_unpackhi_epi8(word[0], word[1]), _mm512_unpackhi_epi8(word[2], word[3])};
    word[0] = _mm512_unpacklo_epi16(low[0], low[1]);
    word[1] = _mm512_unpackhi_epi16(low[0], low[1]);
    word[2] = _mm512_unpacklo_epi16(high[0], high[1]);
    word[3] = _mm512_unpackhi_epi16(high[0], high[1]);
  }
  // Transposed, a chunk is one field of each byte (of normal, both steps of it).
  static constexpr int chunks = columns / 4;
  template <class Chunk>
  static NMKERN_INLINE void decode_rows(Weight (&w)[kVectors], const U (&word)[4], Chunk chunk) {
    const U mask = _mm512_set1_epi8(char(kUniform ? 15 << 4 * chunk : 1 << chunk));
    unroll<kVectors>([&](auto v) NMKERN_FLAT { w[v] = _mm512_and_si512(word[v], mask); });
  }

 private:
  template <int First, int Count>
  static NMKERN_INLINE U bits(U word) {
    return _mm512_and_si512(word, _mm512_set1_epi8(char(((1 << Count) - 1) << First)));
  }
};

// As Panels in amx_tile.h, but bytes take so little beside the hash that all chunks of a word are written at once,
// each to a panel of its own, and words several at a time, with keys and masks in registers. Clocks a word of
// uniform with the products of 4 rows (the hash alone: 33): forward 50, where one at a time took 56; transposed 65,
// and a chunk at a time 104.
template <class S, class C, bool Transposed>
class BytePanels {
  using Words = typename S::U[4];
  using Hasher = std::conditional_t<Transposed, ColumnHasher<S, StoredKeys>, RowHasher<S, StoredKeys>>;

  const Tile& t_;
  const Hasher hash_;

 public:
  using Codec = C;
  static constexpr int chunks = Transposed ? C::chunks : 1;
  static constexpr int together = chunks;
  static constexpr int64_t least = 8;  // 16 rows of float32: 134 clocks a word, one at a time 147
  static constexpr int word_steps = Transposed ? C::patch_steps : C::forward_steps;
  static constexpr int64_t words = panel_steps(Transposed, C::elements) / word_steps;

  explicit BytePanels(const Tile& t) : t_(t), hash_(t.key, uint32_t(C::family), t.output_word) {}

  void generate(int64_t i, int64_t count, int, typename C::Weight* to) const {
    const Hasher hash = hash_;  // whatever is written does not change this one
    for (const int64_t end = i + count; i < end; ++i, to += word_steps * kVectors) {
      Words word;
      hash(t_.reduction_word + uint32_t(i), word);
      if constexpr (Transposed) C::arrange_rows(word);
      if constexpr (chunks > 1) {
        unroll<chunks>([&](auto chunk) NMKERN_FLAT {
          typename C::Weight w[kVectors];
          C::decode_rows(w, word, chunk);
          unroll<kVectors>([&](auto v) NMKERN_FLAT { to[chunk * (words * kVectors) + v] = w[v]; });
        });
      } else {
        typename C::Prepared prepared[4];
        unroll<4>([&](auto r) NMKERN_FLAT { prepared[r] = C::prepare(word[r]); });
        unroll<word_steps>([&](auto step) NMKERN_FLAT {
          unroll<4>([&](auto r) NMKERN_FLAT {
            to[step * kVectors + r] = C::template decode<step>(prepared[r]);
          });
        });
      }
    }
  }
};

// Sums of a chunk are so many bits larger than those of fields times x.
constexpr int byte_shift(Family family, bool transposed, int chunk) {
  if (family == Family::normal) return 1;  // whose bytes are codes; those of others are half a code and an offset
  if (family == Family::uniform) return transposed ? 4 * chunk : 4;
  return transposed ? chunk : 3;
}

// value[b], lane 4q + l = value[l], lane 4q + b
void transpose_quads(__m512 (&value)[kVectors]) {
  const __m512d even[2] = {_mm512_castps_pd(_mm512_unpacklo_ps(value[0], value[1])),
                           _mm512_castps_pd(_mm512_unpacklo_ps(value[2], value[3]))};
  const __m512d odd[2] = {_mm512_castps_pd(_mm512_unpackhi_ps(value[0], value[1])),
                          _mm512_castps_pd(_mm512_unpackhi_ps(value[2], value[3]))};
  value[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(even[0], even[1]));
  value[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(even[0], even[1]));
  value[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(odd[0], odd[1]));
  value[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(odd[0], odd[1]));
}

// From sums of digits, [chunk][block of rows][kVectors][digits][rows][lanes], to Tile::sums, see FixedRow.
void collect_digits(const Tile& t, int chunks, const int32_t* from) {
  const int64_t row = Avx512::lanes, vector = t.block * row, chunk_sums = t.batch * kVectors * row;
  const __m512d radix = _mm512_set1_pd(256);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const __m512d factor = _mm512_set1_pd(2.0 / (1 << byte_shift(t.family, t.transposed, chunk)));
    for (int64_t m = 0; m < t.batch; m += t.block, from += t.parts * kVectors * vector) {
      for (int64_t r = 0; r < t.block; ++r) {
        const __m512d scale = _mm512_set1_pd(t.fixed[m + r].scale);
        const __m512d offset = _mm512_set1_pd(t.fixed[m + r].offset);
        __m512 value[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          __m256 half[2];
          for (int h = 0; h < 2; ++h) {
            __m512d sum = _mm512_setzero_pd();
            for (int digit = t.parts; digit-- > 0;) {
              const int32_t* at = from + (v * t.parts + digit) * vector + r * row + 8 * h;
              sum = _mm512_fmadd_pd(
                  sum, radix, _mm512_cvtepi32_pd(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))));
            }
            half[h] = _mm512_cvtpd_ps(_mm512_mul_pd(scale, _mm512_fmsub_pd(sum, factor, offset)));
          }
          value[v] = _mm512_insertf32x8(_mm512_castps256_ps512(half[0]), half[1], 1);
        }
        if (t.transposed) transpose_quads(value);
        for (int v = 0; v < kVectors; ++v) {
          const int place = v * chunks + chunk;  // the field of byte v
          float* to = t.sums + place / kVectors * chunk_sums + m * kVectors * row +
                      place % kVectors * vector + r * row;
          Avx512::store(to, t.more ? Avx512::add(Avx512::load(to), value[v]) : value[v]);
        }
      }
    }
  }
}

// See MatrixUnit::largest.
uint32_t largest(const float* row, int64_t count) {
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16) {
    const auto some = __mmask16(count - i < 16 ? (1u << (count - i)) - 1 : 0xFFFF);
    const __m512 x = _mm512_maskz_loadu_ps(some, row + i);
    most = _mm512_max_epu32(most, _mm512_castps_si512(_mm512_abs_ps(x)));
  }
  return _mm512_reduce_max_epu32(most);
}

// Where byte i of a step, of eight steps, comes from in 32 elements.
constexpr int element_of(Family family, bool transposed, int step, int i) {
  if (transposed || family == Family::normal) return 4 * step + i;
  return family == Family::uniform ? step / 2 * 8 + 2 * i + step % 2 : 8 * i + step;
}

// See MatrixUnit::pack_digits.
int64_t pack_digits(const float* row, int64_t steps, Family family, bool transposed, int digits, int exponent,
                    uint32_t* to, int64_t rows) {
  alignas(64) int32_t index[2][16];
  alignas(64) uint8_t by_digit[64];
  for (int at = 0; at < 32; ++at) index[at / 16][at % 16] = element_of(family, transposed, at / 4, at % 4);
  for (int at = 0; at < 64; ++at) by_digit[at] = uint8_t(at % 16 * 4 + at / 16);
  const __m512i pick[2] = {_mm512_load_si512(index[0]), _mm512_load_si512(index[1])};
  const __m512i part = _mm512_load_si512(by_digit), balance = _mm512_set1_epi8(-128);
  const __m512i shift = _mm512_setr_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  const __m512 power = _mm512_set1_ps(float(exponent));
  __m512i sums = _mm512_setzero_si512();
  // Four steps, from number `s` on.
  const auto write = [&](__m512i value, int64_t s) NMKERN_FLAT {
    // Balanced digits: those of a number and 128 * (1 + 256 + ...), each less 128.
    value = _mm512_permutexvar_epi8(part, _mm512_xor_si512(_mm512_add_epi32(value, balance), balance));
    uint32_t* at = to + s / kUnitSteps * digits * rows * kUnitSteps + s % kUnitSteps;
    unroll<4>([&](auto digit) NMKERN_FLAT {
      if (digit < digits)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at + digit * rows * kUnitSteps),
                         _mm512_extracti32x4_epi32(value, digit));
    });
  };
  for (int64_t s = 0; s < steps; row += 32) {
    const __m512 a = _mm512_loadu_ps(row), b = _mm512_loadu_ps(row + 16);
    for (int half = 0; half < 2; ++half, s += 4) {
      const __m512 x = _mm512_scalef_ps(_mm512_permutex2var_ps(a, pick[half], b), power);
      const __m512i q = _mm512_cvt_roundps_epi32(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      for (const __m256i eight : {_mm512_castsi512_si256(q), _mm512_extracti64x4_epi64(q, 1)})
        sums = _mm512_add_epi64(sums, _mm512_cvtepi32_epi64(eight));
      if (family == Family::normal) {  // -q for all magnitudes, 2q for those of positive codes
        const auto both = [&](__m512i twice) NMKERN_FLAT {
          return _mm512_mask_add_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), twice), 0xF0F0, twice, twice);
        };
        write(both(_mm512_shuffle_i32x4(q, q, 0x50)), s);
        write(both(_mm512_shuffle_i32x4(q, q, 0xFA)), s += 4);
      } else if (transposed) {
        write(q, s);
      } else if (family == Family::uniform) {
        const __m512i even = _mm512_slli_epi32(_mm512_shuffle_i32x4(q, q, 0xA0), 4);  // of odd steps, too
        write(_mm512_mask_sub_epi32(even, 0xF0F0, q, even), s);
      } else {
        write(_mm512_sllv_epi32(q, shift), s);
      }
    }
  }
  return _mm512_reduce_add_epi64(sums);
}

}  // namespace
}  // namespace nmkern::cpu
