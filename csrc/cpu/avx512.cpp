// Kernels for AVX-512 (F, BW, DQ, VL).
#if defined(__AVX512F__)
#include "avx512.h"

namespace nmkern::cpu {
namespace {
void run(const Tile& t) { run_family<Avx512, FloatCodec<Avx512>::Of>(t); }
constexpr Kernels kKernels{"avx512", Avx512::lanes, Avx512::max_block, Avx512::fused_block, false, tile_bytes<Avx512>(), run, decode_family<Avx512, FloatCodec<Avx512>::Of>, sparse_kernels<Avx512>(), fly_kernels<Avx512>()};
}  // namespace
const Kernels* avx512_kernels() { return &kKernels; }
}  // namespace nmkern::cpu
#else
#include "kernels.h"
namespace nmkern::cpu {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace nmkern::cpu
#endif
