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

// The kernels for a GPU: batches of up to small_rows are skinny_product's (0: the build has no code for it),
// larger ones wide_product's where there is wgmma, else none of this library's.
struct Kernels {
  int64_t small_rows;
  bool wide;
};

constexpr Kernels kernels_for(std::string_view archs, int major, int minor) {
  const bool wgmma = major == 9 && minor == 0 && archs.find("90a") != archs.npos;
  return serves(archs, major, minor) ? Kernels{rows_of(major), wgmma} : Kernels{0, false};
}

// What this build was compiled for.
const char* built_archs();

// The kernels for a device; a cudaError_t.
int kernels_of(int device, Kernels* kernels);

// The multiprocessors of the current device; a cudaError_t.
int multiprocessors(int64_t* count);

// Whether kernels may begin on the current device while the one before them ends: on Hopper (GPUs after it
// can too, and have not been looked at); a cudaError_t.
int overlaps(bool* overlap);

// Whether they do so where they may. For tests and timings.
void set_overlap(bool allowed);

// Whether few rows are multiplied as integers (see fixed.cu). For tests and timings.
void set_fixed_point(bool allowed);
bool fixed_point_allowed();

// Lets the small-batch kernel serve `rows`, 0 included, on every device that has code; -1: its own choice
// again. For tests and timings.
void set_small_rows(int64_t rows);

// Shared memory that a block may ask for on a device, 0 where this build has no code for it; a cudaError_t.
int shared_bytes(int device, int64_t* bytes);

const char* error_text(int error);

}  // namespace nmkern::cuda
