// The instruction set that the kernels use: the best that this build and this CPU have, or a forced one.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace nmkern::cpu {
namespace {

bool cpu_has(const Kernels& kernels) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
  if (!std::strcmp(kernels.name, "amx")) return bf16 && amx_usable();
  if (!std::strcmp(kernels.name, "avx512_bf16")) return bf16;
  if (!std::strcmp(kernels.name, "avx512")) return avx512;
  if (!std::strcmp(kernels.name, "avx2") || !std::strcmp(kernels.name, "avx2_subnormal"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  if (!std::strcmp(kernels.name, "neon")) return true;  // where it is built, all CPUs have it
  return !std::strcmp(kernels.name, "portable");
}

// On Intel 32 products of bfloat16 take 2 clocks and 32 of float32 one. 8192 x 8192 in bfloat16 on 2 threads
// (Emerald Rapids), by these kernels and by AVX-512's in float32: uniform, M = 1 2.2 and 1.9 ms, M = 8 8.0
// and 5.1, M = 64 60 and 30; normal, which VBMI helps to decode, 5.2 and 6.5, 10.3 and 10.0, 55 and 35.
// Zen and Zen 3 multiply and add subnormal numbers as fast as others (Zen 2, of Zen's family, has not been measured).
// Intel does it by microcode, at about a hundredth of that. 8192 x 8192 on 2 threads of Zen, without and with, ms:
// uniform, M = 1 10.3 and 6.7, M = 4 15.7 and 12.4, M = 6 20.5 and 17.0; rademacher 5.4 and 4.2, 12.6 and 10.1, 17.2
// and 14.6.
bool slow(const Kernels& kernels) {
#if defined(__x86_64__)
  if (!std::strcmp(kernels.name, "avx2_subnormal"))
    return !__builtin_cpu_is("amdfam17h") && !__builtin_cpu_is("amdfam19h");
  return !std::strcmp(kernels.name, "avx512_bf16") && __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// By name, or the best for nullptr.
const Kernels* find(const char* name) {
  for (const Kernels* k :
       {amx_kernels(), avx512_bf16_kernels(), avx512_kernels(), avx2_subnormal_kernels(), avx2_kernels(),
        neon_kernels(), portable_kernels()})
    if (k && cpu_has(*k) && (name ? !std::strcmp(name, k->name) : !slow(*k))) return k;
  return nullptr;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

// AVX-512 BF16's, and a unit for dense products. Here, and not where that is compiled, since CPUs without
// AVX-512 come by.
const Kernels* amx_kernels() {
  if (!avx512_bf16_kernels() || !amx_unit()) return nullptr;
  static const Kernels kernels = [] {
    Kernels k = *avx512_bf16_kernels();
    k.name = "amx";
    k.matrix_unit = amx_unit();
    return k;
  }();
  return &kernels;
}

const Kernels& kernels() {
  const Kernels* now = chosen.load(std::memory_order_relaxed);
  if (!now) chosen.store(now = find(nullptr), std::memory_order_relaxed);
  return *now;
}

bool set_kernels(const char* name) {
  const Kernels* found = find(name);
  if (found) chosen.store(found, std::memory_order_relaxed);
  return found != nullptr;
}

}  // namespace nmkern::cpu
