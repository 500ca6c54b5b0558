// Runs the cases of skinny_cases.h on a GPU, by each of its kernels, twice each (see kTurns): outputs must equal
// the exact reference, and the second call's bits the first one's. Scratch starts as NaN. Then those of
// finish_cases.h, which promise an order. Prints the number of cases.
#include <set>

#include "../../csrc/cuda/fixed_plan.h"
#include "../../csrc/cuda/wide_plan.h"
#include "device_runs.h"
#include "finish_cases.h"
#include "skinny_cases.h"

namespace {

// What cases there were, by what the host planned for them.
struct Seen {
  std::set<std::string> kernels;
  int64_t most_splits = 0;
  int64_t direct = 0;   // cases whose sums become y at once
  int64_t indexed = 0;  // parts of several chunks, with a gradient by context

  template <class C>
  void add_fixed(int64_t splits) {
    using Patch = typename C::Patch;
    char name[64];
    std::snprintf(name, sizeof name, "fixed %x %d %d", unsigned(Patch::kFamily), Patch::kTransposed, C::kTiles);
    kernels.insert(name);
    most_splits = std::max(most_splits, splits);
  }

  template <class C>
  void add(const Dense& call, int64_t splits) {
    using Patch = typename C::Patch;
    char name[64];
    std::snprintf(name, sizeof name, "%x %d %d %d %d", unsigned(Patch::kFamily), Patch::kTransposed,
                  C::kBatchTiles, int(C::kOperand), C::kParts);
    kernels.insert(name);
    most_splits = std::max(most_splits, splits);
    if (C::kParts != (call.x.dtype == Dtype::float32 ? 2 : 1)) fail("tensor cores work more than they must");
  }
};

void see_skinny(const Dense& call, Seen& seen) {
  if (is_fixed(call))
    with_fixed_config(call, [&]<class C>() { seen.add_fixed<C>(fixed_plan_of<C>(call).splits); });
  else
    with_config(call, [&]<class C>() { seen.add<C>(call, plan_of<C>(call).splits); });
}

void see_wide(const Dense& call, Seen& seen) {
  with_wide_config(call, [&]<class C>() {
    const WidePlan whole = wide_plan_of<C>(call);
    seen.add<C>(call, whole.splits);
    seen.direct += whole.partial_bytes == 0;
    Dense least = part_of(call, 0, std::min(call.batch, kBatchRows));
    least.most_scratch = 0;
    const WidePlan part = wide_plan_of<C>(part_of(call, 0, wide_rows<C>(call)));
    if (wide_scratch(call) > std::max({call.most_scratch, part.packing.bytes() + call.most_scratch / 2,
                                       wide_plan_of<C>(least).scratch_bytes()}))
      fail("scratch is more than its limit");
    for_each_part<C>(call, nullptr, [&](const WidePlan& plan) {
      seen.indexed += index_bytes(plan.product.finish) > 0 && wide_rows<C>(call) < call.batch;
      return 0;
    });
  });
}

struct Kernel {
  int64_t (*scratch)(const Dense&);
  int (*product)(const Dense&, void*, void*);
  void (*see)(const Dense&, Seen&);
  size_t kernels;  // that there are
  int64_t splits;  // that some case has at least
};

void execute(const Kernel& kernel, const Dense& call) {
  const int64_t bytes = std::max<int64_t>(kernel.scratch(call), 1);  // no memory is no pointer
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
           Kernel{skinny_scratch, skinny_product, see_skinny, 70, 3},
#if defined(NMKERN_WIDE)
           Kernel{wide_scratch, wide_product, see_wide, 48, 2},
#endif
       }) {
    Seen seen;
    const auto run = [&](const Dense& call) {
      kernel.see(call, seen);
      execute(kernel, call);
    };
    const int64_t more = check_all(run) + check_large(run);
    if (seen.kernels.size() != kernel.kernels) fail("kernels: " + std::to_string(seen.kernels.size()));
    if (seen.most_splits < kernel.splits) fail("splits: " + std::to_string(seen.most_splits));
    if (kernel.see == see_wide && (seen.direct == 0 || seen.direct == more)) fail("all cases end alike");
    if (kernel.see == see_wide && seen.indexed < 2) fail("no part has several chunks and contexts");
    cases += more;
  }
  cases += check_all_finishes([](const Finish& f) {
    must(launch_finish(f, nullptr));
    must(cudaDeviceSynchronize());
  });
  std::printf("%lld cases\n", (long long)cases);
}
