// Kernels for any CPU: GCC and Clang vector extensions of 16 bytes, which become SSE2 or scalars.
#include <cstring>

#include "codec.h"
#include "hash.h"
#include "tables.h"
#include "flynet_tile.h"
#include "tile.h"

namespace nmkern::cpu {
namespace {

struct Portable {
  typedef uint32_t U __attribute__((vector_size(16)));
  typedef uint64_t V __attribute__((vector_size(16)));
  typedef float F __attribute__((vector_size(16)));
  using RowHasher = cpu::RowHasher<Portable>;
  using ColumnHasher = cpu::ColumnHasher<Portable>;
  template <Family>
  using Prepared = U;
  static constexpr int lanes = 4;
  static constexpr int hash_vectors = 2;
  static constexpr int max_block = 2;
  static constexpr int tile_block = 2;
  static constexpr int fused_block = 2;
  static constexpr bool interleaved = false;
  static constexpr int unrolled_chunks = 2;

  static NMKERN_INLINE V set1(uint32_t v) { return V{v, v}; }
  static NMKERN_INLINE V xor2(V a, V b) { return a ^ b; }
  static NMKERN_INLINE V xor3(V a, V b, V c) { return a ^ b ^ c; }
  static NMKERN_INLINE V high(V p) { return p >> 32; }
  static NMKERN_INLINE U xor_words(U a, U b, U c) { return a ^ b ^ c; }
  static NMKERN_INLINE V lanes_from(uint32_t first, int odd) {
    return V{uint32_t(first + odd), uint32_t(first + 2 + odd)};
  }

  static NMKERN_INLINE U set_words(uint32_t v) { return U{v, v, v, v}; }
  static NMKERN_INLINE U load_words(const uint32_t* p) {
    U v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static NMKERN_INLINE void store_words(uint32_t* p, U v) { std::memcpy(p, &v, sizeof v); }
  static NMKERN_INLINE U subtract(U a, U b) { return a - b; }
  static NMKERN_INLINE U min_words(U a, U b) { return a < b ? a : b; }
  static NMKERN_INLINE U or_equal(U mask, U a, U b) { return mask | (U)(a == b); }
  static NMKERN_INLINE U choose(U mask, U yes, U no) { return (yes & mask) | (no & ~mask); }
  static NMKERN_INLINE U multiply_high(U a, uint32_t b) {
    U v;
    for (int i = 0; i < lanes; ++i) v[i] = uint32_t((uint64_t{a[i]} * b) >> 32);
    return v;
  }
  static NMKERN_INLINE F add(F a, F b) { return a + b; }
  static NMKERN_INLINE F subtract(F a, F b) { return a - b; }
  static NMKERN_INLINE F multiply(F a, F b) { return a * b; }
  static NMKERN_INLINE F relu(F v) { return v < 0 ? F{} : v; }  // a NaN stays one
  static NMKERN_INLINE F gather(const float* x, U i) { return F{x[i[0]], x[i[1]], x[i[2]], x[i[3]]}; }

  // to[j * stride + i] = from[i * From + j] for lanes x kBatch
  template <int From>
  static NMKERN_INLINE void transpose(const float* from, float* to, int64_t stride) {
    for (int j = 0; j < kBatch; ++j)
      for (int i = 0; i < lanes; ++i) to[j * stride + i] = from[i * From + j];
  }

  static NMKERN_INLINE U shift_right(U v, int bits) { return v >> uint32_t(bits); }
  static NMKERN_INLINE F zero() { return F{}; }
  static NMKERN_INLINE F load(const float* p) {
    F v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static NMKERN_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
  static NMKERN_INLINE F broadcast(const float* p) { return F{*p, *p, *p, *p}; }

  static NMKERN_INLINE V multiply(V a, uint32_t b) { return (a & 0xFFFFFFFFu) * uint64_t{b}; }
  static NMKERN_INLINE U merge(const V (&p)[2]) {
    return U{uint32_t(p[0][0]), uint32_t(p[1][0]), uint32_t(p[0][1]), uint32_t(p[1][1])};
  }
  static NMKERN_INLINE U merge_high(const V (&p)[2]) {
    const V both[2] = {high(p[0]), high(p[1])};
    return merge(both);
  }
  static NMKERN_INLINE F fma(F a, F b, F c) { return a * b + c; }

  template <Family>
  static NMKERN_INLINE U prepare(U word) {
    return word;
  }

  template <Family Fam, int Field>
  static NMKERN_INLINE F decode(U word) {
    const U field = (word >> (32 / columns_per_word(Fam) * Field)) &
                    ((1u << (32 / columns_per_word(Fam))) - 1);
    if constexpr (Fam == Family::normal) {
      const float* code = kNormalFloats.code;
      return F{code[field[0]], code[field[1]], code[field[2]], code[field[3]]};
    } else {
      typedef int32_t I __attribute__((vector_size(16)));
      const I code = 2 * (I)field - (Fam == Family::uniform ? 15 : 1);
      return __builtin_convertvector(code, F);
    }
  }
};

void run(const Tile& t) { run_family<Portable, FloatCodec<Portable>::Of>(t); }
constexpr Kernels kKernels = kernels_of<Portable>("portable", false, run);
}  // namespace
const Kernels* portable_kernels() { return &kKernels; }
}  // namespace nmkern::cpu
