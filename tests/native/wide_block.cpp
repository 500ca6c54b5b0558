// Runs the large-batch kernel's own code on a host and holds it to the stream. Prints the number of cases and
// of kernels.
#include <set>

#include "skinny_cases.h"
#include "wide_simulated.h"

namespace {

struct Simulate {
  const Dense& call;
  std::set<std::string>& kernels;
  int64_t& most_splits;
  int64_t& direct;   // cases whose sums become y at once
  int64_t& indexed;  // parts of several chunks, with a gradient by context

  template <class C>
  void operator()() const {
    using Patch = typename C::Patch;
    char name[64];
    std::snprintf(name, sizeof name, "%x %d %d %d %d", unsigned(Patch::kFamily), Patch::kTransposed,
                  C::kBatchTiles, int(C::kOperand), C::kParts);
    kernels.insert(name);
    if (C::kParts != (call.x.dtype == Dtype::float32 ? 2 : 1)) fail("tensor cores work more than they must");
    direct += wide_plan_of<C>(call).partial_bytes == 0;
    most_splits = std::max(most_splits, wide_plan_of<C>(call).splits);
    AlignedScratch scratch(wide_scratch_of<C>(call));
    Dense least = part_of(call, 0, std::min(call.batch, kBatchRows));
    least.most_scratch = 0;
    const int64_t x_bytes = wide_plan_of<C>(part_of(call, 0, wide_rows<C>(call))).packing.bytes();
    if (scratch.bytes > std::max({call.most_scratch, x_bytes + call.most_scratch / 2,
                                  wide_plan_of<C>(least).scratch_bytes()}))
      fail("scratch is more than its limit");
    for_each_part<C>(call, scratch.data, [&](const WidePlan& plan) {
      indexed += index_bytes(plan.product.finish) > 0 && wide_rows<C>(call) < call.batch;
      return 0;
    });
    run_wide<C>(call, scratch.data);
  }
};

}  // namespace

int main() {
  const Dense large = large_call(128, int64_t{1} << 18, Dtype::float32);  // of 128 MiB in float16
  const int64_t blocks =
      with_wide_config(large, [&]<class C>() { return wide_plan_of<C>(large).product.tiles; });
  if (blocks < 66) fail("a large x leaves " + std::to_string(blocks) + " blocks");
  std::set<std::string> kernels;
  int64_t most_splits = 0, direct = 0, indexed = 0;
  const auto execute = [&](const Dense& call) {
    with_wide_config(call, Simulate{call, kernels, most_splits, direct, indexed});
  };
  const int64_t cases = check_all(execute) + check_large(execute);
  if (most_splits < 2) fail("no case splits the reduction");
  if (direct == 0 || direct == cases) fail("all cases end alike");
  if (indexed < 2) fail("no part has several chunks and contexts");
  if (kernels.size() != 48) fail("not every kernel ran: " + std::to_string(kernels.size()));
  std::printf("%lld cases, %zu kernels\n", (long long)cases, kernels.size());
}
