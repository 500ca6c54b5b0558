// The kernels of csrc/cpu without PyTorch and Python, for CPUs that have to be emulated: every instruction
// set of this build and this CPU against the scalar code of csrc/stream.h. Prints the names of those held.
//
// Inputs have few bits and factors are one, so that every sum is exact in float32 in whatever order.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <set>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../../csrc/cpu/dense.h"
#include "../../csrc/cpu/flynet.h"
#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cpu/launch.h"
#include "../../csrc/cpu/sparse.h"

namespace {

using namespace nmkern;
using namespace nmkern::cpu;

constexpr Key kKey{0x89ABCDEF, 0x01234567};

// Two threads, one after the other; blocks live until the call ends.
struct Host {
  std::vector<std::unique_ptr<void, decltype(&std::free)>> blocks;

  Runtime runtime() {
    return {2,
            [](void* self, int64_t bytes) {
              void* block = std::aligned_alloc(64, size_t(bytes + 63) / 64 * 64);
              static_cast<Host*>(self)->blocks.emplace_back(block, std::free);
              return block;
            },
            [](int64_t size, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
              body(0, size / 2, context);
              body(size / 2, size, context);
            },
            this};
  }
};

// 0, unit or -unit in a dtype, and the same as floats.
struct Input {
  std::vector<float> value;
  std::vector<uint16_t> narrow;
  Dtype dtype;
  int64_t cols;

  Input(int64_t rows, int64_t columns, Dtype type, float unit = 1)
      : value(rows * columns), dtype(type), cols(columns) {
    for (size_t i = 0; i < value.size(); ++i) {
      value[i] = unit * float(int(philox4x32(uint32_t(i), 0, 0, 0, kKey).w[0] % 3) - 1);
      narrow.push_back(dtype == Dtype::bfloat16 ? to_bfloat16(value[i]) : to_float16(value[i]));
    }
  }
  Matrix matrix() {
    void* data = dtype == Dtype::float32 ? static_cast<void*>(value.data()) : narrow.data();
    return {data, dtype, cols, 1};
  }
};

int code(Family family, int64_t row, int64_t col) {
  const int columns = columns_per_word(family), bits = 32 / columns;
  const uint32_t word = philox4x32(uint32_t(col / columns), uint32_t(row / 4), 0, uint32_t(family), kKey).w[row % 4];
  return decode(family, word >> (col % columns * bits) & ((1u << bits) - 1));
}

std::set<int64_t> ones(int64_t row, int64_t population, int64_t fan_in) {
  std::set<int64_t> chosen;
  for (uint32_t s = 0; s < fan_in; ++s) {
    const uint32_t word = philox4x32(s / 4, uint32_t(row), 0, kSparseTag, kKey).w[s % 4];
    const uint32_t j = uint32_t(population - fan_in + s);
    if (!chosen.insert(sparse_draw(word, j)).second) chosen.insert(j);
  }
  return chosen;
}

void check(bool same, const char* what, int64_t batch) {
  if (same) return;
  std::printf("%s: %s differs at a batch of %d\n", kernels().name, what, int(batch));
  std::exit(1);
}

// As torch.set_flush_denormal; by kernels that multiply subnormal numbers it is not heard.
void flush_subnormal(bool on) {
#if defined(__x86_64__)
  _mm_setcsr((_mm_getcsr() & ~0x8040u) | (on ? 0x8040 : 0));
#elif defined(__aarch64__)
  uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  asm volatile("msr fpcr, %0" ::"r"((mode & ~uint64_t{1 << 24}) | uint64_t{on} << 24));
#else
  (void)on;
#endif
}

void check_dense(Family family, bool transposed, int64_t batch, Dtype dtype, int64_t rows = 71,
                 int64_t cols = 150) {
  Dense d{};
  d.family = family;
  d.key = kKey;
  d.row_offset = 4 * batch + 1;
  d.col_offset = 3 * batch;
  d.rows = rows;
  d.cols = cols;
  d.transposed = transposed;
  d.factor = 1;
  d.batch = batch;
  Input x(batch, d.inputs(), dtype,
          dtype == Dtype::bfloat16 ? 1 : 1 + 0x1p-9f);  // 9 bits: two parts in bfloat16
  d.x = x.matrix();
  std::vector<float> y(batch * d.outputs()), want(y.size());
  d.y = {y.data(), Dtype::float32, d.outputs(), 1};
  for (int64_t r = 0; r < d.rows; ++r) {
    for (int64_t c = 0; c < d.cols; ++c) {
      const float weight = float(code(family, d.row_offset + r, d.col_offset + c));
      const int64_t in = transposed ? r : c, out = transposed ? c : r;
      for (int64_t m = 0; m < batch; ++m)
        want[m * d.outputs() + out] += weight * x.value[m * d.inputs() + in];
    }
  }
  Host host;
  dense_product(d, host.runtime());
  check(y == want, transposed ? "transposed" : "forward", batch);
}

void check_sparse(bool transposed, int64_t batch) {
  Sparse s{};
  s.key = kKey;
  s.row_offset = 3;
  s.col_offset = 5;
  s.rows = 130;
  s.cols = 80;
  s.population = 99;
  s.fan_in = 9;
  s.transposed = transposed;
  s.factor = 1;
  s.batch = batch;
  Input x(batch, s.inputs(), Dtype::float32);
  s.x = x.matrix();
  std::vector<float> y(batch * s.outputs()), want(y.size());
  s.y = {y.data(), Dtype::float32, s.outputs(), 1};
  for (int64_t r = 0; r < s.rows; ++r) {
    for (int64_t drawn : ones(s.row_offset + r, s.population, s.fan_in)) {
      const int64_t c = drawn - s.col_offset;
      if (c < 0 || c >= s.cols) continue;
      const int64_t in = transposed ? r : c, out = transposed ? c : r;
      for (int64_t m = 0; m < batch; ++m) want[m * s.outputs() + out] += x.value[m * s.inputs() + in];
    }
  }
  Host host;
  sparse_product(s, host.runtime());
  check(y == want, transposed ? "sparse transposed" : "sparse forward", batch);
}

// 128 hidden units: their mean is exact.
void check_flynet(int64_t batch) {
  FlyNet net{};
  net.inputs = net.population = 40;
  net.hidden = 128;
  net.classes = 13;
  net.encoder_key = net.decoder_key = kKey;
  net.fan_in = 4;
  net.encoder_factor = net.decoder_factor = 1;
  net.family = Family::uniform;
  net.batch = batch;
  Input x(batch, net.inputs, Dtype::float32), gain(1, net.hidden, Dtype::float32);
  Input d_logits(batch, net.classes, Dtype::float32);
  std::vector<float> logits(batch * net.classes), want(logits.size());
  std::vector<float> gain_grad(net.hidden), want_grad(net.hidden);
  for (int64_t m = 0; m < batch; ++m) {
    std::vector<float> r(net.hidden);
    float mean = 0;
    for (int64_t h = 0; h < net.hidden; ++h) {
      for (int64_t k : ones(h, net.population, net.fan_in)) r[h] += x.value[m * net.inputs + k];
      mean += r[h] / float(net.hidden);
    }
    for (int64_t h = 0; h < net.hidden; ++h) {
      const float hidden = std::max(0.0f, r[h] - mean);
      for (int64_t c = 0; c < net.classes; ++c) {
        const float weight = float(code(net.family, c, h));
        want[m * net.classes + c] += weight * gain.value[h] * hidden;
        want_grad[h] += weight * hidden * d_logits.value[m * net.classes + c];
      }
    }
  }
  Host host;
  net.x = x.matrix();
  net.gain = {gain.value.data(), 1};
  net.logits = {logits.data(), Dtype::float32, net.classes, 1};
  flynet_logits(net, host.runtime());
  check(logits == want, "logits", batch);
  net.logits = d_logits.matrix();
  net.gain_grad = {gain_grad.data(), 1};
  flynet_gain_grad(net, host.runtime());
  check(gain_grad == want_grad, "gain_grad", batch);
}

}  // namespace

int main() {
  for (const Kernels* k :
       {amx_kernels(), avx512_bf16_kernels(), avx512_kernels(), avx2_subnormal_kernels(), avx2_kernels(),
        neon_kernels(), portable_kernels()}) {
    if (!k || !set_kernels(k->name)) continue;
    for (int64_t batch : {1, 2, 3, 5, 13, 40}) {
      for (Family family : {Family::rademacher, Family::uniform, Family::normal})
        for (bool transposed : {false, true})
          for (Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16})
            check_dense(family, transposed, batch, dtype);
      for (bool transposed : {false, true}) check_sparse(transposed, batch);
      check_flynet(batch);
    }
    // More than one part of the rows, and for a matrix unit blocks of the reduction and groups of tiles.
    check_dense(Family::uniform, false, 130, Dtype::float32, 600, 1500);
    check_dense(Family::uniform, true, 130, Dtype::float32, 1500, 1200);
    // Few rows of a matrix so large that x is prepared for it.
    for (Family family : {Family::rademacher, Family::uniform, Family::normal})
      for (bool transposed : {false, true}) check_dense(family, transposed, 3, Dtype::float32, 600, 523);
    flush_subnormal(true);
    for (Family family : {Family::rademacher, Family::uniform}) check_dense(family, false, 3, Dtype::float32, 600, 523);
    flush_subnormal(false);
    // Rows of so many columns that not all are packed at a time.
    check_dense(Family::uniform, false, 9, Dtype::bfloat16, 3, 1 << 20);
    std::puts(k->name);
  }
}
