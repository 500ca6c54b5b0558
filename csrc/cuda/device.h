// Which GPUs the kernels of this build run on, and what errors of CUDA's runtime say.
#pragma once

#include <cstdint>
#include <string_view>

namespace nmkern::cuda {

// Whether machine code for any of `archs` ("80,89,90a": nvcc's names) runs on a GPU of this compute
// capability: it does from its own minor version upwards within the major one, with an a only on its own.
constexpr bool serves(std::string_view archs, int major, int minor) {
  while (!archs.empty()) {
    int number = 0;
    size_t at = 0;
    for (; at < archs.size() && archs[at] >= '0' && archs[at] <= '9'; ++at)
      number = 10 * number + (archs[at] - '0');
    const bool exact = at < archs.size() && archs[at] == 'a';
    if (number / 10 == major && (exact ? number % 10 == minor : number % 10 <= minor)) return true;
    const size_t comma = archs.find(',');
    archs = comma == archs.npos ? std::string_view{} : archs.substr(comma + 1);
  }
  return false;
}

// Rows of a batch up to which the small-batch kernel is the right one: mma.sync, which it uses, reaches all
// of the tensor cores' rate before Hopper, and perhaps 60 to 75 % there.
constexpr int64_t rows_of(int major) { return major == 9 ? 16 : 64; }

// What this build was compiled for.
const char* built_archs();

// Rows that the small-batch kernel serves on a device, 0 where this build has no code for it; a cudaError_t.
int most_rows(int device, int64_t* rows);

// Makes most_rows answer `rows` for every device that has code; 0: its own answer again. For tests and timings.
void set_most_rows(int64_t rows);

// Shared memory that a block may ask for on a device, 0 where this build has no code for it; a cudaError_t.
int shared_bytes(int device, int64_t* bytes);

const char* error_text(int error);

}  // namespace nmkern::cuda
