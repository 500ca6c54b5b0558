// Kernels for CPUs with a matrix unit (AMX tiles of bfloat16); all else is AVX-512 BF16's.
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#include "amx_tile.h"
#include "avx512_bf16.h"

namespace nmkern::cpu {
namespace {

// The tile registers. Compilers do not know them: nothing else in this library uses them.
struct Amx {
  // `rows` rows of x in each; registers 0 to 3 are sums, 4 to 6 parts of x, 7 weights.
  static void configure(int rows) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = uint8_t(i == 7 ? kUnitSteps : rows);
    }
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  static void release() { asm volatile("tilerelease"); }

  template <int To>
  static NMKERN_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(To));
  }
  template <int To>
  static NMKERN_INLINE void load(const void* from, int64_t row_bytes) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(To), "r"(from), "r"(row_bytes) : "memory");
  }
  template <int From>
  static NMKERN_INLINE void store(void* to, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(From), "r"(to), "r"(row_bytes) : "memory");
  }
  // sum[m][n] += x[m][2k] * w[k][2n] + x[m][2k + 1] * w[k][2n + 1]
  template <int Sum, int X, int W>
  static NMKERN_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(X), "i"(W));
  }
};

// See MatrixUnit::pack.
bool pack(const float* row, int64_t steps, int group, int parts, float scale, uint32_t* to, int64_t rows) {
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
  __mmask16 large = 0;
  for (int64_t s = 0; s < steps; s += 16, row += 32) {
    const __m512 a = _mm512_loadu_ps(row), b = _mm512_loadu_ps(row + 16);
    __m512 even = _mm512_mul_ps(factor, _mm512_permutex2var_ps(a, pick_low, b));
    __m512 odd = _mm512_mul_ps(factor, _mm512_permutex2var_ps(a, pick_high, b));
    const __m512 bound = _mm512_set1_ps(kTiny);
    large |= _mm512_cmp_ps_mask(_mm512_abs_ps(even), bound, _CMP_NLT_UQ) |
             _mm512_cmp_ps_mask(_mm512_abs_ps(odd), bound, _CMP_NLT_UQ);
    for (int p = 0; p < parts; ++p) {
      const __m512i one = p == 0 ? take_first(even) : take(even), other = p == 0 ? take_first(odd) : take(odd);
      const __m512i pair = _mm512_or_si512(_mm512_srli_epi32(one, 16), other);
      _mm512_storeu_si512(to + (s * parts + 16 * p) * rows, pair);
    }
  }
  return large != 0;
}

// See MatrixUnit::untile.
void untile(const float* sums, int64_t chunk_stride, int64_t vector_stride, int64_t vectors, float factor, float* row) {
  const __m512 scale = _mm512_set1_ps(factor);
  for (int64_t first = 0; first < vectors; first += kVectors, sums += chunk_stride, row += kVectors) {
    __m512 v[kVectors], pair[4];
    for (int i = 0; i < kVectors; ++i) v[i] = _mm512_mul_ps(scale, _mm512_loadu_ps(sums + i * vector_stride));
    pair[0] = _mm512_unpacklo_ps(v[0], v[1]);
    pair[1] = _mm512_unpacklo_ps(v[2], v[3]);
    pair[2] = _mm512_unpackhi_ps(v[0], v[1]);
    pair[3] = _mm512_unpackhi_ps(v[2], v[3]);
    const auto four = [&](__m512 a, __m512 b, int imm) {
      return _mm512_castpd_ps(imm ? _mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))
                                  : _mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    // Lanes i, i + 4, i + 8 and i + 12, all four vectors of each.
    unroll<4>([&](auto i) {
      const __m512 lanes = four(pair[i / 2 * 2], pair[i / 2 * 2 + 1], i % 2);
      unroll<4>([&](auto j) {
        _mm_storeu_ps(row + (i + 4 * j) * vectors, _mm512_extractf32x4_ps(lanes, j));
      });
    });
  }
}

void run(const Tile& t) { run_on_unit<Amx, Avx512, Bf16Codec>(t); }

constexpr MatrixUnit kUnit{run, pack, untile};

}  // namespace

const Kernels* amx_kernels() {
  static const Kernels kernels = [] {
    Kernels k = *avx512_bf16_kernels();
    k.name = "amx";
    k.unit = &kUnit;
    return k;
  }();
  return &kernels;
}

// Linux keeps tile registers from a process until it has asked for them (XTILEDATA, component 18).
bool amx_granted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of <asm/prctl.h>
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
}  // namespace nmkern::cpu
#else
#include "kernels.h"
namespace nmkern::cpu {
const Kernels* amx_kernels() { return nullptr; }
bool amx_granted() { return false; }
}  // namespace nmkern::cpu
#endif
