// Kernels for AVX-512 with VBMI (byte lookups) and BF16 (dot products of bfloat16 pairs).
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#include "avx512_bf16.h"

namespace nmkern::cpu {
namespace {

void run(const Tile& t) {
  if (t.bf16) run_family<Avx512, Bf16Codec>(t);
  else run_family<Avx512, FloatCodec<Avx512>::Of>(t);
}
constexpr Kernels kKernels = kernels_of<Avx512>("avx512_bf16", true, run);
}  // namespace
const Kernels* avx512_bf16_kernels() { return &kKernels; }
}  // namespace nmkern::cpu
#else
#include "kernels.h"
namespace nmkern::cpu {
const Kernels* avx512_bf16_kernels() { return nullptr; }
}  // namespace nmkern::cpu
#endif
