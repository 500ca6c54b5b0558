// The small-batch kernels on the device, and their launcher; skinny_kernel.h has what they compute,
// skinny_plan.h which of them serves a call.
#include "dense.h"
#include "enqueue.h"
#include "machine.h"
#include "skinny_kernel.h"
#include "skinny_plan.h"

namespace nmkern::cuda {
namespace {

struct SmallWarp : Warp {
  // Pairs from `first` on, of the step that x points to: 16 bytes at once where two of a load's belong here.
  template <class C, int count>
  NMKERN_DEVICE void load(const unsigned char* x, int first, uint32_t (&b)[count][2]) const {
    if constexpr (C::kVector == 2 && count % 2 == 0) {
#pragma unroll
      for (int i = 0; i < count; i += 2) {
        const uint4 v = *reinterpret_cast<const uint4*>(x + C::x_offset(0, first + i));
        b[i][0] = v.x, b[i][1] = v.y, b[i + 1][0] = v.z, b[i + 1][1] = v.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const uint2 v = *reinterpret_cast<const uint2*>(x + C::x_offset(0, first + i));
        b[i][0] = v.x, b[i][1] = v.y;
      }
    }
  }

  // Left alone, nvcc computes them in the loop again: 2.09 instructions a weight for 1.98 (uniform, 8 rows).
  NMKERN_DEVICE void keep(RowPart& part) const { asm volatile("" : "+r"(part.p2.high), "+r"(part.p2.low)); }
  NMKERN_DEVICE void keep(ColumnPart& part) const {
    asm volatile("" : "+r"(part.low1), "+r"(part.low2), "+r"(part.p3.high), "+r"(part.p3.low));
  }

#define NMKERN_MMA(operand)                                             \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." operand "." operand      \
      ".f32 "                                                           \
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

  template <Dtype kOperand>
  NMKERN_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) const {
    if constexpr (kOperand == Dtype::float16)
      NMKERN_MMA("f16");
    else
      NMKERN_MMA("bf16");
  }

#undef NMKERN_MMA
};

// Eight warps a multiprocessor at least: left to choose, ptxas aimed at more of them and spilled.
template <class C>
__global__ void __launch_bounds__(C::kThreads, 8 / C::kWarps) skinny_kernel(const Product p) {
  extern __shared__ __align__(128) unsigned char shared[];
  SmallWarp warp;
  skinny_block<C>(p, warp, shared);
}

struct Launch {
  const Dense& call;
  void* scratch;
  cudaStream_t stream;

  template <class C>
  int operator()() const {
    Plan plan = plan_of<C>(call);
    place(plan, call, scratch);
    if (plan.packing.packed)
      if (const int error = launch_pack(plan.packing.pack, stream)) return error;
    const dim3 grid(uint32_t(plan.blocks_x), uint32_t(plan.splits), uint32_t(plan.blocks_z));
    if (const int error = enqueue(skinny_kernel<C>, grid, C::kThreads, C::kSharedBytes, stream, plan.product))
      return error;
    return launch_finish(plan.finish, stream);
  }
};

struct Scratch {
  const Dense& call;
  template <class C>
  int64_t operator()() const {
    return plan_of<C>(call).scratch_bytes();
  }
};

}  // namespace

int64_t skinny_scratch(const Dense& call) {
  return call.batch == 0 || call.outputs() == 0 ? 0 : with_config(call, Scratch{call});
}

int skinny_product(const Dense& call, void* scratch, void* stream) {
  if (call.batch == 0 || call.outputs() == 0) return cudaSuccess;
  return with_config(call, Launch{call, scratch, static_cast<cudaStream_t>(stream)});
}

}  // namespace nmkern::cuda
