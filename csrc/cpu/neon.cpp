// Kernels for 64-bit ARM, whose every CPU has NEON: 4 lanes, 6 rows of x a block.
//
// Few rows of large matrices are multiplied by fields as subnormal numbers (fields.h), which ARM's CPUs multiply in
// hardware like others. This has been run in an emulator and not been timed. What llvm-mca 22 expects of the loops of
// GCC 12, in clocks for 4 words of 4 lanes at M = 1, forward, hash and multiply, and of the portable kernels:
//
//                            Neoverse N1              Neoverse V2
//   uniform, 128 weights     37 + 35, was 47 + 114    17 + 17, was 24 + 57
//   normal, 64 weights       39 + 63, was 59 + 104    17 + 33, was 25 + 66
#if defined(__aarch64__)
#include <arm_neon.h>

#include "codec.h"
#include "fields.h"
#include "hash.h"
#include "flynet_tile.h"
#include "tile.h"

namespace nmkern::cpu {
namespace {

struct Neon {
  using U = uint32x4_t;
  struct V {
    U low, high;  // words of the products of all lanes; of what is no product, low alone counts
  };
  static NMKERN_INLINE V of_words(U v) { return {v, v}; }
  using F = float32x4_t;
  using RowHasher = cpu::RowHasher<Neon>;
  using ColumnHasher = cpu::ColumnHasher<Neon>;
  // The codes of the normal family in 16 bits: in the lower halves of lanes fields 0 and 1, in the upper 2 and 3.
  struct Pairs {
    int32x4_t even, odd;
  };
  template <Family Fam>
  using Prepared = std::conditional_t<Fam == Family::normal, Pairs, U>;
  static constexpr int lanes = 4;
  static constexpr int hash_vectors = 1;
  static constexpr int max_block = 4;
  static constexpr int tile_block = 6;
  static constexpr int fused_block = 4;  // 16 sums, 4 weights, 1 x, 6 masks
  static constexpr bool interleaved = false;
  static constexpr int unrolled_chunks = 2;

  static NMKERN_INLINE V set1(uint32_t v) { return of_words(vdupq_n_u32(v)); }
  static NMKERN_INLINE V xor2(V a, V b) { return of_words(a.low ^ b.low); }
  static NMKERN_INLINE V xor3(V a, V b, V c) { return of_words(a.low ^ b.low ^ c.low); }
  static NMKERN_INLINE V high(V p) { return of_words(p.high); }
  static NMKERN_INLINE V multiply(V a, uint32_t b) {
    const U factor = vdupq_n_u32(b);
    const U first = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(a.low), vget_low_u32(factor)));
    const U second = vreinterpretq_u32_u64(vmull_high_u32(a.low, factor));
    return {vuzp1q_u32(first, second), vuzp2q_u32(first, second)};
  }
  static NMKERN_INLINE V lanes_from(uint32_t first, int) { return of_words(vdupq_n_u32(first) + U{0, 1, 2, 3}); }
  static NMKERN_INLINE U merge(const V (&p)[1]) { return p[0].low; }
  static NMKERN_INLINE U merge_high(const V (&p)[1]) { return p[0].high; }
  static NMKERN_INLINE U xor_words(U a, U b, U c) { return a ^ b ^ c; }

  static NMKERN_INLINE U set_words(uint32_t v) { return vdupq_n_u32(v); }
  static NMKERN_INLINE U load_words(const uint32_t* p) { return vld1q_u32(p); }
  static NMKERN_INLINE void store_words(uint32_t* p, U v) { vst1q_u32(p, v); }
  static NMKERN_INLINE U subtract(U a, U b) { return vsubq_u32(a, b); }
  static NMKERN_INLINE U min_words(U a, U b) { return vminq_u32(a, b); }
  static NMKERN_INLINE U or_equal(U mask, U a, U b) { return vorrq_u32(mask, vceqq_u32(a, b)); }
  static NMKERN_INLINE U choose(U mask, U yes, U no) { return vbslq_u32(mask, yes, no); }
  static NMKERN_INLINE U multiply_high(U a, uint32_t b) { return multiply(of_words(a), b).high; }
  static NMKERN_INLINE F add(F a, F b) { return vaddq_f32(a, b); }
  static NMKERN_INLINE F subtract(F a, F b) { return vsubq_f32(a, b); }
  static NMKERN_INLINE F multiply(F a, F b) { return vmulq_f32(a, b); }
  static NMKERN_INLINE F relu(F v) { return vmaxq_f32(v, zero()); }  // a NaN stays one
  static NMKERN_INLINE F gather(const float* x, U i) { return F{x[i[0]], x[i[1]], x[i[2]], x[i[3]]}; }

  // to[j * stride + i] = from[i * From + j] for lanes x kBatch, 4 x 4 at a time
  template <int From>
  static NMKERN_INLINE void transpose(const float* from, float* to, int64_t stride) {
    for (int j = 0; j < kBatch; j += 4, from += 4, to += 4 * stride) {
      F row[4];
      unroll<4>([&](auto i) NMKERN_FLAT { row[i] = load(from + i * From); });
      // Columns 0 and 2, then 1 and 3: of rows 0 and 1, of rows 2 and 3.
      const float32x4x2_t above = vtrnq_f32(row[0], row[1]), below = vtrnq_f32(row[2], row[3]);
      unroll<2>([&](auto c) NMKERN_FLAT {
        const auto a = vreinterpretq_f64_f32(above.val[c]), b = vreinterpretq_f64_f32(below.val[c]);
        store(to + c * stride, vreinterpretq_f32_f64(vtrn1q_f64(a, b)));
        store(to + (c + 2) * stride, vreinterpretq_f32_f64(vtrn2q_f64(a, b)));
      });
    }
  }

  static NMKERN_INLINE U shift_right(U v, int bits) { return vshlq_u32(v, vdupq_n_s32(-bits)); }
  static NMKERN_INLINE F zero() { return vdupq_n_f32(0); }
  static NMKERN_INLINE F load(const float* p) { return vld1q_f32(p); }
  static NMKERN_INLINE void store(float* p, F v) { vst1q_f32(p, v); }
  static NMKERN_INLINE F broadcast(const float* p) { return vdupq_n_f32(*p); }
  static NMKERN_INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }

  // |code| by two lookups in 64 bytes each, and its negative where the field is below the middle.
  static NMKERN_INLINE Pairs normal_codes(U word) {
    // The distance from the middle is u - 128 above it and 127 - u, so ~u - 128, below.
    const uint8x16_t fields = vreinterpretq_u8_u32(word);
    const uint8x16_t below = vcgezq_s8(vreinterpretq_s8_u8(fields));
    const uint8x16_t index = vsubq_u8(veorq_u8(fields, below), vdupq_n_u8(128));
    const uint8x16_t near = vqtbl4q_u8(vld1q_u8_x4(kNormal), index);  // 0 beyond the table
    const uint8x16_t code = vqtbx4q_u8(near, vld1q_u8_x4(kNormal + 64), vsubq_u8(index, vdupq_n_u8(64)));
    // Bytes of 16-bit numbers; a code of 0 has no negative.
    const uint8x16_t low = vsubq_u8(veorq_u8(code, below), below), high = vtstq_u8(code, below);
    return {vreinterpretq_s32_u8(vtrn1q_u8(low, high)), vreinterpretq_s32_u8(vtrn2q_u8(low, high))};
  }

  template <Family Fam>
  static NMKERN_INLINE Prepared<Fam> prepare(U word) {
    if constexpr (Fam == Family::normal) return normal_codes(word);
    else return word;
  }

  template <Family Fam, int Field>
  static NMKERN_INLINE F decode(const Prepared<Fam>& word) {
    if constexpr (Fam == Family::uniform) {
      // The field where it stands, u * 16^Field, becomes 2 u while it is converted.
      const U field = vandq_u32(word, vdupq_n_u32(15u << 4 * Field));
      if constexpr (Field == 0) return vcvtq_f32_s32(vreinterpretq_s32_u32(field + field - 15));
      else return vsubq_f32(vcvtq_n_f32_u32(field, 4 * Field - 1), vdupq_n_f32(15));
    } else if constexpr (Fam == Family::rademacher) {
      const U sign = vshlq_n_u32(vmvnq_u32(word), 31 - Field);
      return vbslq_f32(vdupq_n_u32(0x80000000), vreinterpretq_f32_u32(sign), vdupq_n_f32(1));
    } else {
      const int32x4_t pair = Field % 2 ? word.odd : word.even;
      if constexpr (Field < 2) return vcvtq_n_f32_s32(vshlq_n_s32(pair, 16), 16);
      else return vcvtq_f32_s32(vshrq_n_s32(pair, 16));
    }
  }
};

// In float32; a value of x is an operand of the multiply as it is loaded.
template <class Codec>
struct ByElement : Codec {
  static constexpr int sums_at_once = 5;  // of M = 1, or two units would wait for four multiplies of 4 clocks each

  static NMKERN_INLINE float broadcast(const float* x) { return *x; }
  static NMKERN_INLINE float32x4_t fma(float32x4_t w, float x, float32x4_t sum) { return vfmaq_n_f32(sum, w, x); }
};

template <Family F>
using NeonCodec = ByElement<FloatCodec<Neon>::Of<F>>;

// Weights that nothing decodes, see fields.h.
template <Family F>
struct FieldCodec : NeonCodec<F> {
  static constexpr int run_steps = field_run(F);

  template <int Field>
  static NMKERN_INLINE float32x4_t decode(uint32x4_t word) {
    if constexpr (field_bit(F, Field) >= kFieldBits) word = vshrq_n_u32(word, kFieldShift);
    return vreinterpretq_f32_u32(vandq_u32(word, vdupq_n_u32(field_mask(F) << field_place(F, Field))));
  }
};

void run(const Tile& t) { run_family<Neon, NeonCodec>(t); }

// With subnormal numbers as they are, whatever torch.set_flush_denormal has said.
void run_fields(const Tile& t) {
  constexpr uint64_t kFlush = 1 << 24 | 1;  // FZ: all, FIZ: inputs
  uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode)::"memory");
  if (mode & kFlush) asm volatile("msr fpcr, %0" ::"r"(mode & ~kFlush) : "memory");
  run_fields_family<Neon, FieldCodec>(t);
  if (mode & kFlush) asm volatile("msr fpcr, %0" ::"r"(mode) : "memory");
}

constexpr Kernels kKernels = [] {
  Kernels k = kernels_of<Neon>("neon", false, run);
  k.run_fields = run_fields;
  return k;
}();
}  // namespace
const Kernels* neon_kernels() { return &kKernels; }
}  // namespace nmkern::cpu
#else
#include "kernels.h"
namespace nmkern::cpu {
const Kernels* neon_kernels() { return nullptr; }
}  // namespace nmkern::cpu
#endif
