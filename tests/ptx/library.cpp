// The machine as a library for Python; see emulator.py.
#include <malloc.h>

#include "machine.h"

namespace {

// Blocks allocate megabytes each, which the system would clear page by page, anew each time.
const int kept = mallopt(M_MMAP_THRESHOLD, 1 << 30) + mallopt(M_TRIM_THRESHOLD, 1 << 30);

template <class Act>
int told(char* error, size_t size, const Act& act) try {
  act();
  return 0;
} catch (const std::exception& found) {
  std::strncpy(error, found.what(), size - 1);
  return 1;
}

}  // namespace

extern "C" {

// Of all functions: 0, or 1 and a text.
int ptx_read(const char* text, ptx::Module** module, char* error, size_t size) {
  return told(error, size, [&] { *module = new ptx::Module(text); });
}

void ptx_free(ptx::Module* module) { delete module; }

// Memory is `regions` pairs of an address and bytes.
int ptx_launch(ptx::Module* module, const char* name, const uint32_t* grid, const uint32_t* threads,
               int64_t shared_bytes, const unsigned char* parameters, int64_t bytes, const uint64_t* memory,
               int64_t regions, char* error, size_t size) {
  return told(error, size, [&] {
    ptx::Memory all;
    for (int64_t i = 0; i < regions; ++i)
      all[memory[2 * i]] = std::max(all[memory[2 * i]], memory[2 * i + 1]);
    const ptx::Kernel& kernel = module->kernel(name);
    if (bytes < kernel.parameter_bytes) ptx::fail("too few bytes of parameters");
    ptx::run_grid({kernel,
                   {grid[0], grid[1], grid[2]},
                   {threads[0], threads[1], threads[2]},
                   shared_bytes,
                   {parameters, parameters + bytes},
                   false,
                   &all});
  });
}

}  // extern "C"
