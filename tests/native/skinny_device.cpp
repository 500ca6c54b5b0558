// Runs the cases of skinny_cases.h on a GPU, twice each: outputs must equal the exact reference, and the
// second call's bits the first one's. Scratch starts as NaN. Prints the number of cases.
#include <cuda_runtime_api.h>

#include "skinny_cases.h"

namespace {

void must(int error) {
  if (error != cudaSuccess) fail(cudaGetErrorString(cudaError_t(error)));
}

void* allocate_managed(size_t bytes) {
  void* at = nullptr;
  must(cudaMallocManaged(&at, bytes));
  return at;
}

void execute(const Skinny& call) {
  const int64_t bytes = skinny_scratch(call);
  const size_t elements = size_t(call.batch * call.outputs());
  const auto* y = static_cast<const float*>(call.y.data);
  void* scratch = nullptr;
  must(cudaMalloc(&scratch, bytes));
  std::vector<float> first;
  for (int turn = 0; turn < 2; ++turn) {
    must(cudaMemset(scratch, 0xFF, bytes));
    must(skinny_product(call, scratch, nullptr));
    must(cudaDeviceSynchronize());
    if (turn == 0) first.assign(y, y + elements);
  }
  if (std::memcmp(first.data(), y, elements * sizeof(float)) != 0) fail("a second call gave other bits");
  must(cudaFree(scratch));
}

}  // namespace

int main() {
  allocate_bytes = allocate_managed;
  free_bytes = [](void* at) { must(cudaFree(at)); };
  std::printf("%lld cases\n", (long long)check_all(execute));
}
