// Runs the large-batch kernel's own code on a host and holds it to the stream. Prints the number of cases and of
// kernels.
#include <set>

#include "skinny_cases.h"
#include "wide_simulated.h"

namespace {

struct Simulate {
  const Dense& call;
  std::set<std::string>& kernels;
  int64_t& most_splits;
  int64_t& direct;  // cases whose sums become y at once

  template <class C>
  void operator()() const {
    using Patch = typename C::Patch;
    char name[64];
    std::snprintf(name, sizeof name, "%x %d %d %d", unsigned(Patch::kFamily), Patch::kTransposed,
                  C::kBatchTiles, C::kParts);
    kernels.insert(name);
    direct += wide_plan_of<C>(call).partial_bytes == 0;
    most_splits = std::max(most_splits, wide_plan_of<C>(call).splits);
    run_wide<C>(call, AlignedScratch(wide_scratch_of<C>(call)).data);
  }
};

}  // namespace

int main() {
  std::set<std::string> kernels;
  int64_t most_splits = 0, direct = 0;
  const auto execute = [&](const Dense& call) { with_wide_config(call, Simulate{call, kernels, most_splits, direct}); };
  const int64_t cases = check_all(execute) + check_large(execute);
  if (most_splits < 2) fail("no case splits the reduction");
  if (direct == 0 || direct == cases) fail("all cases end alike");
  if (kernels.size() != 36) fail("not every kernel ran: " + std::to_string(kernels.size()));
  std::printf("%lld cases, %zu kernels\n", (long long)cases, kernels.size());
}
