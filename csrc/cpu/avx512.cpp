// Kernels for AVX-512 (F, BW, DQ, VL).
#if defined(__AVX512F__)
#include "avx512.h"

namespace nmkern::cpu {
namespace {
void run(const Tile& t) { run_family<Avx512, FloatCodec<Avx512>::Of>(t); }
constexpr Kernels kKernels = kernels_of<Avx512>("avx512", false, run);
}  // namespace
const Kernels* avx512_kernels() { return &kKernels; }
}  // namespace nmkern::cpu
#else
#include "kernels.h"
namespace nmkern::cpu {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace nmkern::cpu
#endif
