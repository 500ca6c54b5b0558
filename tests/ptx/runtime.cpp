// The CUDA runtime that a program is linked with in place of NVIDIA's: its kernels, which nvcc left as PTX,
// are executed by machine.h on the host.
//
//   NMKERN_PTX   the folder of the .ptx files; NMKERN_PTX_ARCH, 90, 89 or 80: which GPU this claims to be
//
// Kernels may touch what was allocated here and nothing else; where there is emulated_before_launch, memory
// is others', and may be any.
#include <cuda_runtime_api.h>
#include <malloc.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "machine.h"

namespace {

using namespace ptx;

Memory& allocations() {
  static Memory all;
  return all;
}

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> all;
  return all;
}

std::vector<std::unique_ptr<Module>>& modules() {
  static std::vector<std::unique_ptr<Module>> all;
  if (all.empty())
    for (const auto& file : std::filesystem::directory_iterator(std::getenv("NMKERN_PTX")))
      if (file.path().extension() == ".ptx") {
        std::stringstream text;
        text << std::ifstream(file.path()).rdbuf();
        all.push_back(std::make_unique<Module>(text.str()));
      }
  return all;
}

const Kernel& kernel_of(const void* function) {
  const std::string& name = names().at(function);
  for (const auto& one : modules())
    if (one->has(name)) return one->kernel(name);
  fail("no PTX of " + name);
}

// Blocks allocate megabytes each, which the system would clear page by page, anew each time.
const int kept = mallopt(M_MMAP_THRESHOLD, 1 << 30) + mallopt(M_TRIM_THRESHOLD, 1 << 30);

int& architecture() {
  static int named = std::atoi(std::getenv("NMKERN_PTX_ARCH"));
  return named;
}

std::map<std::string, int64_t>& launches() {
  static std::map<std::string, int64_t> all;
  return all;
}

cudaError_t allocate(void** at, size_t bytes) {
  if (posix_memalign(at, 256, bytes + !bytes)) return cudaErrorMemoryAllocation;
  allocations()[reinterpret_cast<uint64_t>(*at)] = bytes;
  return cudaSuccess;
}

cudaError_t release(void* at) {
  allocations().erase(reinterpret_cast<uint64_t>(at));
  std::free(at);
  return cudaSuccess;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Is asked before a launch, and returns a cudaError_t for it to end with.
__attribute__((weak)) int emulated_before_launch(void* stream);
void emulated_architecture(int named) { architecture() = named; }
// Of kernels whose name has a part.
int64_t emulated_launches(const char* part) {
  int64_t count = 0;
  for (const auto& [name, times] : launches()) count += name.find(part) != name.npos ? times : 0;
  return count;
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {
  names()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { std::abort(); }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { std::abort(); }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { std::abort(); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { std::abort(); }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaSuccess; }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** arguments) try {
  if (emulated_before_launch)
    if (const int error = emulated_before_launch(config->stream)) return cudaError_t(error);
  const Kernel& kernel = kernel_of(function);
  ++launches()[names().at(function)];
  const dim3 &grid = config->gridDim, &threads = config->blockDim;
  Launch launch{kernel,
                {grid.x, grid.y, grid.z},
                {threads.x, threads.y, threads.z},
                int64_t(config->dynamicSmemBytes),
                std::vector<unsigned char>(kernel.parameter_bytes),
                config->numAttrs > 0,
                emulated_before_launch ? nullptr : &allocations()};
  for (size_t i = 0; i < kernel.parameters.size(); ++i)
    std::memcpy(&launch.parameters[kernel.parameters[i].offset], arguments[i], kernel.parameters[i].bytes);
  run_grid(launch);
  return cudaSuccess;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s: %s\n", names()[function].c_str(), error.what());
  std::exit(1);
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = architecture() / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = architecture() % 10;
      break;
    // Few, so that blocks of a persistent grid take several tiles.
    case cudaDevAttrMultiProcessorCount:
      *value = 2;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = (architecture() == 90 ? 227 : architecture() == 80 ? 163 : 99) << 10;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t error) { return error == 7 ? "error 7" : "another error"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaMalloc(void** at, size_t bytes) { return allocate(at, bytes); }
cudaError_t cudaFree(void* at) { return release(at); }
cudaError_t cudaMallocHost(void** at, size_t bytes) { return allocate(at, bytes); }
cudaError_t cudaFreeHost(void* at) { return release(at); }
cudaError_t cudaMemset(void* at, int value, size_t bytes) {
  return std::memset(at, value, bytes), cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  return std::memset(at, value, bytes), cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

}  // extern "C"
