// The large-batch kernels on the device, and their launcher; wide_kernel.h has what they compute, wide_plan.h
// which of them serves a call. They exist for sm_90a alone.
#include "dense.h"
#include "enqueue.h"
#include "machine.h"
#include "wgmma.h"
#include "wide_plan.h"

namespace nmkern::cuda {
namespace {

// Registers of a thread at the start, which is what ptxas gives 384 threads, and in each role. More than a
// block starts with there never are: a warpgroup would wait for them for ever.
constexpr int kStartRegisters = 65536 / kWideThreads / 8 * 8;
constexpr int kProducerRegisters = 120, kConsumerRegisters = 192;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (kConsumers + 1) * kStartRegisters);

// Hopper's machine. Barriers lie at the start of shared memory: filled and free of each stage.
struct Hopper : Warp {
  uint32_t barriers;

  static NMKERN_DEVICE uint32_t address_of(const void* shared) {
    return uint32_t(__cvta_generic_to_shared(shared));
  }

  NMKERN_DEVICE uint32_t blocks() const { return gridDim.x; }

  NMKERN_DEVICE void start(unsigned char* shared, int stages) {
    barriers = address_of(shared);
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < stages; ++stage) {
        initialize(filled(stage), kLanes);
        initialize(free(stage), kConsumers * 4);
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
  }

  NMKERN_DEVICE uint32_t filled(int stage) const { return barriers + 8 * stage; }
  NMKERN_DEVICE uint32_t free(int stage) const { return barriers + 8 * (kMostStages + stage); }

  static NMKERN_DEVICE void initialize(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
  }
  static NMKERN_DEVICE void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
  }
  // Until the phase of this parity is over.
  static NMKERN_DEVICE void wait_phase(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
  }

  NMKERN_DEVICE void wait_filled(int stage, uint32_t parity) const { wait_phase(filled(stage), parity); }
  NMKERN_DEVICE void wait_free(int stage, uint32_t parity) const { wait_phase(free(stage), parity); }
  // wgmma reads shared memory through another proxy than the stores went.
  NMKERN_DEVICE void publish(int stage) const {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    arrive(filled(stage));
  }
  NMKERN_DEVICE void release(int stage) const {
    if (lane() == 0) arrive(free(stage));
  }

  NMKERN_DEVICE void produces() const {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
  }
  NMKERN_DEVICE void consumes() const {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
  }

  NMKERN_DEVICE void begin_group() const { cuda::begin_group(); }
  NMKERN_DEVICE void end_group() const { cuda::end_group(); }
  template <int most>
  NMKERN_DEVICE void wait_groups() const {
    cuda::wait_groups<most>();
  }
  // What wgmma has summed: no use of it may be moved before the wait, of which the compiler knows nothing.
  template <int tiles>
  NMKERN_DEVICE void hold(float (&d)[2][tiles][4]) const {
#pragma unroll
    for (int i = 0; i < 8 * tiles; ++i)
      asm volatile("" : "+f"(d[i / 4 / tiles][i / 4 % tiles][i % 4])::"memory");
  }

  NMKERN_DEVICE uint32_t operand(const unsigned char* shared) const {
    return descriptor_low(address_of(shared));
  }
  template <Dtype kOperand, int tiles>
  NMKERN_DEVICE void multiply(float (&d)[tiles][4], const uint32_t (&a)[4], uint32_t b, bool add) const {
    cuda::multiply<kOperand>(d, a, b, add);
  }

  NMKERN_DEVICE void load_four(const float* from, float (&value)[4]) const {
    const float4 v = *reinterpret_cast<const float4*>(from);
    value[0] = v.x, value[1] = v.y, value[2] = v.z, value[3] = v.w;
  }
  NMKERN_DEVICE void store_outputs(const Matrix& y, int64_t m, int64_t n, const float (&v)[4]) const {
    const int64_t at = m * y.row_stride + n;
    if (y.dtype == Dtype::float32) {
      store(static_cast<float*>(y.data) + at, v[0], v[1], v[2], v[3]);
    } else {
      const uint2 bits = make_uint2(halves_of(v[0], v[1], y.dtype), halves_of(v[2], v[3], y.dtype));
      __stcg(reinterpret_cast<uint2*>(static_cast<uint16_t*>(y.data) + at), bits);
    }
  }
};

template <Family family, bool transposed, int batch_tiles, Dtype operand, int parts>
__global__ void __launch_bounds__(kWideThreads, 1) wide_kernel(const __grid_constant__ WideProduct p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(128) unsigned char shared[];
  Hopper hopper;
  wide_block<WideConfig<family, transposed, batch_tiles, operand, parts>>(p, hopper, shared);
#endif
}

struct Launch {
  const Dense& call;
  void* scratch;
  cudaStream_t stream;

  template <class C>
  int operator()() const {
    using Patch = typename C::Patch;
    const auto kernel =
        wide_kernel<Patch::kFamily, Patch::kTransposed, C::kBatchTiles, C::kOperand, C::kParts>;
    int64_t blocks = 0;
    if (const int error = multiprocessors(&blocks)) return error;
    return for_each_part<C>(call, scratch, [&](const WidePlan& plan) -> int {
      if (plan.packing.packed)
        if (const int error = launch_pack(plan.packing.pack, stream)) return error;
      const uint32_t grid = uint32_t(std::min(plan.product.tiles, blocks));
      if (const int error = enqueue(kernel, grid, kWideThreads, C::kSharedBytes, stream, plan.product))
        return error;
      return plan.partial_bytes ? launch_finish(plan.product.finish, stream) : cudaSuccess;
    });
  }
};

}  // namespace

int64_t wide_scratch(const Dense& call) {
  if (call.batch == 0 || call.outputs() == 0) return 0;
  return with_wide_config(call, [&]<class C>() { return wide_scratch_of<C>(call); });
}

int wide_product(const Dense& call, void* scratch, void* stream) {
  if (call.batch == 0 || call.outputs() == 0) return cudaSuccess;
  return with_wide_config(call, Launch{call, scratch, static_cast<cudaStream_t>(stream)});
}

}  // namespace nmkern::cuda
