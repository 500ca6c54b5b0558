// What the cases of all CUDA kernels share: how a case fails, and memory that whoever runs it can read.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "../../csrc/matrix.h"

[[noreturn]] void fail(const std::string& what) {
  std::printf("%s\n", what.c_str());
  std::exit(1);
}

namespace {

// Memory that whoever runs the product can read.
void* (*allocate_bytes)(size_t) = std::malloc;
void (*free_bytes)(void*) = std::free;

template <class T>
struct Allocator {
  using value_type = T;
  Allocator() = default;
  template <class U>
  Allocator(const Allocator<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(allocate_bytes(count * sizeof(T))); }
  void deallocate(T* at, size_t) { free_bytes(at); }
  bool operator==(const Allocator&) const { return true; }
};
template <class T>
using Buffer = std::vector<T, Allocator<T>>;

inline float read(const nmkern::Matrix& a, int64_t row, int64_t col) {
  const int64_t at = row * a.row_stride + col * a.col_stride;
  if (a.dtype == nmkern::Dtype::float32) return static_cast<const float*>(a.data)[at];
  const uint16_t bits = static_cast<const uint16_t*>(a.data)[at];
  return a.dtype == nmkern::Dtype::bfloat16 ? nmkern::from_bfloat16(bits) : nmkern::from_float16(bits);
}

inline void write(const nmkern::Matrix& a, int64_t row, int64_t col, float value) {
  const int64_t at = row * a.row_stride + col * a.col_stride;
  if (a.dtype == nmkern::Dtype::float32)
    static_cast<float*>(a.data)[at] = value;
  else
    static_cast<uint16_t*>(a.data)[at] =
        a.dtype == nmkern::Dtype::bfloat16 ? nmkern::to_bfloat16(value) : nmkern::to_float16(value);
}

}  // namespace
