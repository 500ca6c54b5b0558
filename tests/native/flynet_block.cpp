// Runs the fused FlyNet's own CUDA code on a host and holds it to the definition. Prints the number of cases.
#include "flynet_cases.h"
#include "flynet_simulated.h"

namespace {

constexpr int64_t kAim = 4;  // blocks of a launch, so that few rows make blocks take groups in order

void execute(const FlyNet& net) {
  const int64_t bytes = scratch_of(net, 99 << 10, kAim);
  if (bytes < 0) fail("there is no room");
  Buffer<uint32_t> scratch(bytes / 4 + 4, 0xFFFFFFFFu);
  run_flynet(net,
             reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch.data()) + 15) & ~uintptr_t{15}),
             kAim);
}

// Of many units or rows a block takes several groups in order.
void check_plans() {
  FlyNet net{};
  net.inputs = 784, net.hidden = 7840, net.classes = 10, net.fan_in = 7, net.batch = 128;
  if (scratch_of(net, 99 << 10) < 0) fail("there is no room for the paper's network");
  if (plan_of(net).splits != 16) fail("the paper's network is not split in 16");
  net.batch = 4096;
  if (plan_of(net).splits != 1 || plan_of(net).block_groups != 16) fail("many rows do not fill the device");
  net.gain_grad.rows = 1;
  if (plan_of(net).splits != 8) fail("rows are not split in 8");
  net.inputs = 5000;
  if (scratch_of(net, 227 << 10) != -1) fail("there is room for everything");
}

}  // namespace

int main() {
  check_plans();
  std::printf("%lld cases\n", (long long)check_flynet_cases(execute, 90));
}
