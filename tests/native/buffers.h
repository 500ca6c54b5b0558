// What the cases of all CUDA kernels share: how a case fails, and memory that whoever runs it can read.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

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

}  // namespace
