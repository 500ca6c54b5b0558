// Runs the cases of skinny_cases.h on a GPU, by each of its kernels, twice each (see kTurns): outputs must equal the exact
// reference, and the second call's bits the first one's. Scratch starts as NaN. Then those of finish_cases.h,
// which promise an order. Prints the number of cases.
#include "device_runs.h"
#include "finish_cases.h"
#include "skinny_cases.h"

namespace {

struct Kernel {
  int64_t (*scratch)(const Dense&);
  int (*product)(const Dense&, void*, void*);
};

void execute(const Kernel& kernel, const Dense& call) {
  const int64_t bytes = kernel.scratch(call) + 16;  // some calls need none, and no memory is no pointer
  struct {
    float* data;
    size_t count;
  } results[] = {{static_cast<float*>(call.y.data), size_t(call.batch * call.outputs())},
                 {call.gain_grad.data, size_t(call.gain_grad.rows * call.outputs())}};
  void* scratch = nullptr;
  must(cudaMalloc(&scratch, bytes));
  std::vector<float> first[2];
  for (int turn = 0; turn < kTurns; ++turn) {
    must(cudaMemset(scratch, 0xFF, bytes));
    if (call.gain_grad.data && call.context)  // is added to
      std::fill_n(results[1].data, results[1].count, 0.0f);
    must(kernel.product(call, scratch, nullptr));
    must(cudaDeviceSynchronize());
    for (int i = 0; i < 2; ++i) {
      const auto& [data, count] = results[i];
      if (!data) continue;
      if (turn == 0) first[i].assign(data, data + count);
      if (std::memcmp(first[i].data(), data, count * sizeof(float)) != 0)
        fail("a second call gave other bits");
    }
  }
  must(cudaFree(scratch));
}

}  // namespace

int main() {
  use_pinned_memory();
  int64_t cases = 0;
  for (const Kernel& kernel : {
           Kernel{skinny_scratch, skinny_product},
#if defined(NMKERN_WIDE)
           Kernel{wide_scratch, wide_product},
#endif
       }) {
    const auto run = [&](const Dense& call) { execute(kernel, call); };
    cases += check_all(run) + check_large(run);
  }
  cases += check_all_finishes([](const Finish& f) {
    must(launch_finish(f, nullptr));
    must(cudaDeviceSynchronize());
  });
  std::printf("%lld cases\n", (long long)cases);
}
