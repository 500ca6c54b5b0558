// Runs the second stage's own code on a host, with a gradient, and holds it to the order of its sums. Prints the
// number of cases.
#include "finish_cases.h"
#include "skinny_simulated.h"

int main() {
  const int64_t cases = check_all_finishes([](const Finish& f) { run_finish(f); });
  std::printf("%lld cases\n", (long long)cases);
}
