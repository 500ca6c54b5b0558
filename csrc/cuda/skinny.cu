// The small-batch kernels on the device, and their launcher; skinny_kernel.h has what they compute,
// skinny_plan.h which of them serves a call.
#include "skinny.h"

#include <cuda_runtime_api.h>

#include "skinny_kernel.h"
#include "skinny_plan.h"

namespace nmkern::cuda {
namespace {

__device__ constexpr NormalTable kNormalTable = normal_table();
constexpr int kFinishThreads = 256;

struct Warp {
  NMKERN_DEVICE int thread() const { return int(threadIdx.x); }
  NMKERN_DEVICE int lane() const { return int(threadIdx.x) % kLanes; }
  NMKERN_DEVICE uint32_t block_x() const { return blockIdx.x; }
  NMKERN_DEVICE uint32_t block_y() const { return blockIdx.y; }
  NMKERN_DEVICE uint32_t block_z() const { return blockIdx.z; }
  NMKERN_DEVICE const NormalTable& table() const { return kNormalTable; }
  NMKERN_DEVICE void wait() const { __syncthreads(); }

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

  // 4 * pieces consecutive elements of x.
  template <int pieces>
  NMKERN_DEVICE void load_elements(const uint16_t* x, uint32_t (&element)[pieces][2]) const {
    if constexpr (pieces % 2 == 0) {
#pragma unroll
      for (int i = 0; i < pieces; i += 2) {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(x) + i / 2);
        element[i][0] = v.x, element[i][1] = v.y, element[i + 1][0] = v.z, element[i + 1][1] = v.w;
      }
    } else {
      static_assert(pieces == 1);
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(x));
      element[0][0] = v.x, element[0][1] = v.y;
    }
  }

  NMKERN_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) const {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }

  NMKERN_DEVICE void store(float* to, float a, float b, float c, float d) const {
    *reinterpret_cast<float4*>(to) = make_float4(a, b, c, d);
  }

  // Never contracted into one multiply-add.
  static NMKERN_DEVICE float rounded_sum(float a, float b) { return __fadd_rn(a, b); }
  static NMKERN_DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }
};

// Two blocks a multiprocessor at least: left to choose, ptxas aimed at more of them and spilled.
template <Family family, bool transposed, int batch_tiles, int parts>
__global__ void __launch_bounds__(kThreads, 2) skinny_kernel(const Product p) {
  extern __shared__ __align__(128) unsigned char shared[];
  Warp warp;
  skinny_block<Config<family, transposed, batch_tiles, parts>>(p, warp, shared);
}

__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const Finish f) {
  const int64_t i = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  if (i >= f.batch * f.outputs) return;
  const int64_t m = i / f.outputs, n = i % f.outputs;
  finish_one<Warp>(f, m, n, unmodulated<Warp>(f, m, n));
}

__global__ void __launch_bounds__(kThreads) finish_gradient_kernel(const Finish f) {
  __shared__ float shared[kFinishRows * kLanes];
  Warp warp;
  finish_with_gradient(f, warp, shared);
}

struct Launch {
  const Skinny& call;
  float* partial;
  cudaStream_t stream;

  template <class C>
  cudaError_t operator()() const {
    using Patch = typename C::Patch;
    Plan plan = plan_of<C>(call);
    plan.product.partial = partial;
    plan.finish.partial = partial;
    const auto kernel = skinny_kernel<Patch::kFamily, Patch::kTransposed, C::kBatchTiles, C::kParts>;
    if constexpr (C::kSharedBytes > 48 << 10) {  // more than a kernel gets unasked
      const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
      if (error != cudaSuccess) return error;
    }
    const dim3 grid(uint32_t(plan.blocks_x), uint32_t(plan.splits), uint32_t(plan.blocks_z));
    kernel<<<grid, kThreads, C::kSharedBytes, stream>>>(plan.product);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
    if (call.gain_grad.data) {
      const int64_t blocks = ceil_div(call.outputs(), kLanes);
      finish_gradient_kernel<<<uint32_t(blocks), kThreads, 0, stream>>>(plan.finish);
    } else {
      const int64_t blocks = ceil_div(call.batch * call.outputs(), kFinishThreads);
      finish_kernel<<<uint32_t(blocks), kFinishThreads, 0, stream>>>(plan.finish);
    }
    return cudaGetLastError();
  }
};

struct Scratch {
  const Skinny& call;
  template <class C>
  int64_t operator()() const {
    return plan_of<C>(call).scratch_bytes();
  }
};

}  // namespace

int64_t skinny_scratch(const Skinny& call) {
  return call.batch == 0 || call.outputs() == 0 ? 0 : with_config(call, Scratch{call});
}

int skinny_product(const Skinny& call, void* scratch, void* stream) {
  if (call.batch == 0 || call.outputs() == 0) return cudaSuccess;
  return with_config(call, Launch{call, static_cast<float*>(scratch), static_cast<cudaStream_t>(stream)});
}

}  // namespace nmkern::cuda
