// The cases of a product's second stage, on partial sums that are given, and their reference: in the order that
// finish.h and gradient.cu promise, so that floats which no order sums exactly must agree bit for bit. See
// dense_device.cpp.
#pragma once

#include <bit>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/finish.h"
#include "buffers.h"

namespace {

using namespace nmkern;
using namespace nmkern::cuda;

enum class Contexts { none, drawn, same, distinct };

struct FinishCase {
  int64_t batch, outputs, grad_rows;  // 0: no gradient, but a bias
  Contexts contexts = Contexts::none;
  int64_t splits = 1, skip = 0;
  Dtype dtype = Dtype::bfloat16;
  int64_t gain_rows = 0;  // of out_gain
  bool product = true;
  bool add = false;
};

// execute(finish) leaves y and gain_grad in their places.
template <class Execute>
void check_finish(const FinishCase& c, std::mt19937& random, const Execute& execute) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto any = [&] { return float(int64_t(random()) - (int64_t{1} << 31)) * 0x1p-29f; };
  Finish f{};
  f.splits = c.splits, f.skip = c.skip, f.batch = c.batch, f.outputs = c.outputs, f.factor = 0.3f, f.add = c.add;
  f.partial_stride = c.skip + c.outputs + 5;

  Buffer<float> partial(c.splits * c.batch * f.partial_stride, nan);
  for (int64_t row = 0; row < c.splits * c.batch; ++row)
    for (int64_t n = 0; n < c.outputs; ++n) partial[row * f.partial_stride + c.skip + n] = any();
  const std::vector<float> given(partial.begin(), partial.end());
  f.partial = partial.data();

  // Every second column is of the matrix, and the rest is left alone.
  Buffer<float> other(c.batch * c.outputs * 2), y(c.batch * c.outputs * 2, 7.0f);
  f.other = {other.data(), c.dtype, c.outputs * 2, 2};
  for (int64_t m = 0; m < c.batch; ++m)
    for (int64_t n = 0; n < c.outputs; ++n) write(f.other, m, n, any());
  const std::vector<float> before(y.begin(), y.end());
  if (c.product) f.y = {y.data(), c.dtype, c.outputs * 2, 2};

  Buffer<float> gain(c.gain_rows * c.outputs);
  for (float& v : gain) v = any();
  if (c.gain_rows) f.out_gain = {gain.data(), c.gain_rows};

  Buffer<float> bias(c.grad_rows ? 0 : c.gain_rows * c.outputs);
  for (float& v : bias) v = any();
  if (bias.size()) f.bias = {bias.data(), c.gain_rows};

  const int64_t vectors = c.grad_rows ? c.grad_rows : c.gain_rows;
  Buffer<int64_t> context(c.batch);
  std::vector<int64_t> nearest(c.batch);
  for (int64_t m = 0; m < c.batch; ++m) {
    nearest[m] = c.contexts == Contexts::none       ? (vectors == 1 ? 0 : m)
                 : c.contexts == Contexts::distinct ? (m * 7 + 3) % vectors
                 : c.contexts == Contexts::same     ? vectors / 2
                                                    : int64_t(random()) % vectors;
    const bool beyond = random() % 2 != 0;  // out of range: the nearest is meant
    context[m] = !beyond                        ? nearest[m]
                 : nearest[m] == 0               ? -3
                 : nearest[m] == vectors - 1 ? int64_t{1} << 40
                                                 : nearest[m];
  }
  if (c.contexts != Contexts::none) f.context = context.data();

  Buffer<float> grad(c.grad_rows * c.outputs);
  for (float& v : grad) v = c.add || c.contexts != Contexts::none ? any() : nan;
  const std::vector<float> there(grad.begin(), grad.end());
  if (c.grad_rows) f.gain_grad = {grad.data(), c.grad_rows};

  Buffer<unsigned char> index(index_bytes(f) + 8, 0x11);  // what would be a row
  f.index = index.data();
  execute(f);
  for (int i = 0; i < 8; ++i)
    if (index[index_bytes(f) + i] != 0x11) fail("the index is larger than it says");

  const std::string name = "M " + std::to_string(c.batch) + " N " + std::to_string(c.outputs) + " rows " +
                           std::to_string(c.grad_rows) + " contexts " + std::to_string(int(c.contexts)) +
                           " splits " + std::to_string(c.splits) + ": ";
  const auto same = [&](float found, float want, const char* what, int64_t row, int64_t n) {
    if (std::bit_cast<uint32_t>(found) != std::bit_cast<uint32_t>(want))
      fail(name + what + "[" + std::to_string(row) + ", " + std::to_string(n) + "] is " + std::to_string(found) +
           ", expected " + std::to_string(want));
  };
  Buffer<float> expected(y.size());
  std::copy(before.begin(), before.end(), expected.begin());
  const Matrix want_y = {expected.data(), c.dtype, c.outputs * 2, 2};
  for (int64_t n = 0; n < c.outputs; ++n) {
    std::vector<float> product(c.batch);
    for (int64_t m = 0; m < c.batch; ++m) {
      float z = 0;
      for (int64_t s = 0; s < c.splits; ++s) z += given[(s * c.batch + m) * f.partial_stride + c.skip + n];
      z *= f.factor;
      product[m] = read(f.other, m, n) * z;
      if (c.gain_rows) {
        const int64_t last = c.gain_rows - 1, row = f.context ? context[m] : m;
        const int64_t at = (row < 0 ? 0 : row > last ? last : row) * c.outputs + n;
        z *= gain[at];
        if (bias.size()) z += bias[at];
      }
      if (c.product) write(want_y, m, n, z);
    }
    if (c.grad_rows == 0) continue;
    if (c.grad_rows > 1 && !f.context) {
      for (int64_t m = 0; m < c.batch; ++m) same(grad[m * c.outputs + n], product[m], "gain_grad", m, n);
      continue;
    }
    std::vector<float> total(c.grad_rows);
    for (int64_t row = 0; row < c.grad_rows; ++row)
      total[row] = c.grad_rows == 1 && !c.add ? 0 : there[row * c.outputs + n];
    for (int64_t first = 0; first < c.batch; first += kChunkRows) {
      const int64_t end = std::min<int64_t>(first + kChunkRows, c.batch);
      if (c.grad_rows == 1) {
        const int64_t share = (end - first + kGradientWarps - 1) / kGradientWarps;
        float chunk = 0;
        for (int64_t warp = first; warp < end; warp += share) {
          float sum = 0;
          for (int64_t m = warp; m < std::min(warp + share, end); ++m) sum += product[m];
          chunk += sum;
        }
        total[0] += chunk;
        continue;
      }
      std::vector<float> sum(c.grad_rows);
      std::vector<char> seen(c.grad_rows);
      for (int64_t m = first; m < end; ++m) sum[nearest[m]] += product[m], seen[nearest[m]] = 1;
      for (int64_t row = 0; row < c.grad_rows; ++row)
        if (seen[row]) total[row] += sum[row];
    }
    for (int64_t row = 0; row < c.grad_rows; ++row)
      same(grad[row * c.outputs + n], total[row], "gain_grad", row, n);
  }
  if (std::memcmp(y.data(), expected.data(), y.size() * sizeof(float))) fail(name + "another y");
}

// Runs every case; their number.
template <class Execute>
int64_t check_all_finishes(const Execute& execute) {
  std::mt19937 random(5);
  int64_t cases = 0;
  const auto run = [&](const FinishCase& c) {
    check_finish(c, random, execute);
    ++cases;
  };
  constexpr auto kNone = Contexts::none, kDrawn = Contexts::drawn, kSame = Contexts::same,
                 kDistinct = Contexts::distinct;
  constexpr auto kFloat = Dtype::float32, kHalf = Dtype::float16, kBfloat = Dtype::bfloat16;
  // A chunk and less: shares of a warp of one row and more, ragged, in turns of eight and one by one.
  for (int64_t batch : {1, 2, 5, 7, 8, 9, 16, 33, 63, 64, 127, 128})
    for (int64_t splits : {1, 2, 3, 7, 17, 33}) {
      const Dtype dtype = batch % 2 ? kFloat : splits % 2 ? kHalf : kBfloat;
      run({batch, 33, 1, kNone, splits, splits % 4, dtype, splits % 2 * batch, batch != 8, splits == 3});
      if (batch > 1) run({batch, 7, batch, kNone, splits, 3, dtype, splits % 2, splits != 7});
      run({batch, 40, 5, kDrawn, splits, 1, dtype, splits % 2 * 5, splits != 2});
    }
  // Chunks: whole, ragged, of one row; more of them than gather has loads in flight.
  for (int64_t batch : {129, 256, 300, 1153, 1300})
    for (bool add : {false, true}) run({batch, 35, 1, kNone, 1 + add * 2, 2, kBfloat, add ? 1 : batch, true, add});
  run({300, 35, 300, kNone, 1, 0, kFloat, 300});
  run({130, 300, 1, kNone});
  for (int64_t batch : {64, 128, 129, 257, 1153}) {
    const int64_t less = batch - 1, most = 2 * batch;
    for (Contexts contexts : {kDrawn, kSame, kDistinct}) {
      run({batch, 33, 3, contexts, 1, 0, kBfloat, 3});
      run({batch, 9, batch, contexts, 2, 1, kFloat, batch, false});
      run({batch, 9, less, contexts, 1, 0, kHalf, 1});
      run({batch, 33, most, contexts, 1, 0, kFloat});
    }
  }
  // Without a gradient: one row a thread, and eight.
  for (int64_t splits : {1, 2, 3, 8, 9, 16, 17, 40}) run({9, 70, 0, kDrawn, splits, 1, kHalf, splits});
  run({1030, 1030, 0, kDrawn, 1, 1, kBfloat, 5});
  run({15, 70001, 0, kNone, 2, 0, kFloat, 15});
  run({257, 290, 2, kDrawn});
  run({257, 290, 600, kDrawn});
  return cases;
}

}  // namespace
