// Dense products for CPUs with AMX, tile registers and products of bfloat16; all else is AVX-512 BF16's.
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "amx_tile.h"

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
  // sum[m][n] += x[m][4k + i] * w[k][4n + i] over i < 4, x signed bytes and w unsigned
  template <int Sum, int X, int W>
  static NMKERN_INLINE void multiply_bytes() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(X), "i"(W));
  }
};

constexpr MatrixUnit kUnit = matrix_unit<Amx>();

}  // namespace

const MatrixUnit* amx_unit() { return &kUnit; }

// By CPUID, since compilers know other names or none; and Linux keeps tile registers from a process until it
// has asked for them.
bool amx_usable() {
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // of EDX: bfloat16, tiles, int8
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kNeeded) == kNeeded &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
}  // namespace nmkern::cpu
#else
#include "kernels.h"
namespace nmkern::cpu {
const MatrixUnit* amx_unit() { return nullptr; }
bool amx_usable() { return false; }
}  // namespace nmkern::cpu
#endif
