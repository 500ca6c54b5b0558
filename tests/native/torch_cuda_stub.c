// Stands for PyTorch's library for CUDA, under its name: all that csrc/cuda/bindings.cpp asks of it.
#include <stdint.h>

int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  (void)device;
  *stream = (void*)0x5170;
  return 0;
}
