// Hopper's wgmma with A in registers and B in shared memory, as the PTX manual has it.
//
//   wgmma(d, a, b, add):  D[64, n] (+)= A[64, 16] B[16, n], n = 8 * tiles; asynchronous: see wide.cu
//
// B is K-major without swizzle: core matrices of 8 columns x 16 bytes, 128 bytes each; in the reduction's
// direction they lie kLeading bytes apart, along n kStride.
#pragma once

#include "../matrix.h"
#include "threads.cuh"

namespace nmkern::cuda {

constexpr uint32_t kLeading = 128, kStride = 256;

NMKERN_DEVICE uint32_t shared_address(const void* shared) {
  return uint32_t(__cvta_generic_to_shared(shared));
}

// The matrix descriptor of shared memory from `address` on, addresses and distances in units of 16 bytes:
// bits 0-13 and 16-29, and in its upper half bits 32-45. A distance of d bytes is d / 16 more.
NMKERN_DEVICE constexpr uint32_t descriptor_low(uint32_t address) {
  return address >> 4 | kLeading >> 4 << 16;
}
constexpr uint32_t kDescriptorHigh = kStride >> 4;

#define NMKERN_TILE(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define NMKERN_TILES_4(d, i) \
  NMKERN_TILE(d, i), NMKERN_TILE(d, i + 1), NMKERN_TILE(d, i + 2), NMKERN_TILE(d, i + 3)
#define NMKERN_TILES_8(d, i) NMKERN_TILES_4(d, i), NMKERN_TILES_4(d, i + 4)
#define NMKERN_REST(a, b, add) \
  "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(kDescriptorHigh), "r"(int(add))
// Registers are numbered in the order of the operands: d, a, the descriptor's halves, whether to add.
#define NMKERN_WGMMA(n, operand, d, a, low, high, add)                                     \
  "{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.s32 p, " add ", 0;\nmov.b64 b, {" low ", " high \
  "};\n"                                                                                   \
  "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." operand "." operand " {" d "}, {" a     \
  "}, b, p, 1, 1, 0;\n}"
#define NMKERN_WGMMA_32(operand)                                                                      \
  NMKERN_WGMMA("32", operand, "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15", \
               "%16, %17, %18, %19", "%20", "%21", "%22")
#define NMKERN_WGMMA_64(operand)                                                                 \
  NMKERN_WGMMA("64", operand,                                                                    \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31", \
               "%32, %33, %34, %35", "%36", "%37", "%38")
#define NMKERN_WGMMA_128(operand)                                                                 \
  NMKERN_WGMMA("128", operand,                                                                    \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63",  \
               "%64, %65, %66, %67", "%68", "%69", "%70")

// Whether to add to d, or to overwrite it.
template <Dtype kOperand>
NMKERN_DEVICE void wgmma(float (&d)[4][4], const uint32_t (&a)[4], uint32_t b, bool add) {
  if constexpr (kOperand == Dtype::float16)
    asm volatile(NMKERN_WGMMA_32("f16") : NMKERN_TILES_4(d, 0) : NMKERN_REST(a, b, add));
  else
    asm volatile(NMKERN_WGMMA_32("bf16") : NMKERN_TILES_4(d, 0) : NMKERN_REST(a, b, add));
}

template <Dtype kOperand>
NMKERN_DEVICE void wgmma(float (&d)[8][4], const uint32_t (&a)[4], uint32_t b, bool add) {
  if constexpr (kOperand == Dtype::float16)
    asm volatile(NMKERN_WGMMA_64("f16") : NMKERN_TILES_8(d, 0) : NMKERN_REST(a, b, add));
  else
    asm volatile(NMKERN_WGMMA_64("bf16") : NMKERN_TILES_8(d, 0) : NMKERN_REST(a, b, add));
}

template <Dtype kOperand>
NMKERN_DEVICE void wgmma(float (&d)[16][4], const uint32_t (&a)[4], uint32_t b, bool add) {
  if constexpr (kOperand == Dtype::float16)
    asm volatile(NMKERN_WGMMA_128("f16")
                 : NMKERN_TILES_8(d, 0), NMKERN_TILES_8(d, 8)
                 : NMKERN_REST(a, b, add));
  else
    asm volatile(NMKERN_WGMMA_128("bf16")
                 : NMKERN_TILES_8(d, 0), NMKERN_TILES_8(d, 8)
                 : NMKERN_REST(a, b, add));
}

#undef NMKERN_TILE
#undef NMKERN_TILES_4
#undef NMKERN_TILES_8
#undef NMKERN_REST
#undef NMKERN_WGMMA
#undef NMKERN_WGMMA_32
#undef NMKERN_WGMMA_64
#undef NMKERN_WGMMA_128

// Orders the registers that wgmma takes after what wrote them.
NMKERN_DEVICE void begin_group() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
NMKERN_DEVICE void end_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `most` groups are at work.
template <int most>
NMKERN_DEVICE void wait_groups() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(most) : "memory");
}

}  // namespace nmkern::cuda
