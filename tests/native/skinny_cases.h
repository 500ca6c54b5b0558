// The cases of the dense products and their exact reference: see dense_device.cpp.
//
// Inputs are integers, so that every sum is exact, in whatever order. Outputs start as NaN.
#pragma once

#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/dense.h"
#include "buffers.h"

namespace {

using namespace nmkern;
using namespace nmkern::cuda;

int code_at(const Dense& call, int64_t row, int64_t col) {
  row += call.row_offset, col += call.col_offset;
  const int columns = columns_per_word(call.family), bits = 32 / columns;
  const uint32_t word =
      philox4x32(uint32_t(col / columns), uint32_t(row / 4), 0, uint32_t(call.family), call.key).w[row % 4];
  return decode(call.family, word >> (col % columns * bits) & ((1u << bits) - 1));
}

enum class Grad { none, one, each, context };  // rows of gain_grad: one, one for each row, by context

struct Case {
  Family family;
  bool transposed;
  int64_t row_offset, col_offset, inputs, outputs, batch;
  Dtype dtype = Dtype::bfloat16;
  bool modulated = false;  // gains, bias and contexts
  int64_t padding = 0;     // elements between rows of x
  int64_t stride = 1;      // between columns
  Grad grad = Grad::none;
  bool product = true;  // with grad: is y wanted
  int64_t most_scratch = Dense{}.most_scratch;
  int64_t contexts = 3;
  int64_t offset = 0;  // elements between an aligned address and x
};

// The exact product by the definition; every step of it is an integer below 2^24.
template <class Execute>
void check(const Case& c, std::mt19937_64& random, const Execute& execute) {
  Dense call{};
  call.family = c.family;
  call.key = {uint32_t(random()), uint32_t(random())};
  call.transposed = c.transposed;
  call.row_offset = c.row_offset, call.col_offset = c.col_offset;
  call.rows = c.transposed ? c.inputs : c.outputs, call.cols = c.transposed ? c.outputs : c.inputs;
  call.factor = 0.5f;
  call.batch = c.batch;
  call.most_scratch = c.most_scratch;
  const auto integer = [&](int64_t most) {
    return double(int64_t(random() % uint64_t(2 * most + 1)) - most);
  };

  const int64_t row_stride = c.inputs * c.stride + c.padding;
  const int64_t elements = c.batch * row_stride;
  // Elements of float32 that need several parts are few in a row, so that sums stay exact.
  std::vector<double> x(elements);
  const bool wide = c.dtype == Dtype::float32 && !c.modulated;
  for (int64_t m = 0; m < c.batch; ++m)
    for (int64_t k = 0; k < c.inputs; ++k)
      x[m * row_stride + k * c.stride] = !wide                               ? integer(4)
                                         : random() % uint64_t(c.inputs) < 3 ? integer(21000)
                                                                             : 0;
  Buffer<uint32_t> storage(elements + c.offset + 4, 0xFFFFFFFF);  // NaN in every dtype, where x is not
  const auto aligned = (reinterpret_cast<uintptr_t>(storage.data()) + 15) & ~15ul;
  auto* data = reinterpret_cast<void*>(aligned + c.offset * (c.dtype == Dtype::float32 ? 4 : 2));
  call.x = {data, c.dtype, row_stride, c.stride};
  for (int64_t m = 0; m < c.batch; ++m)
    for (int64_t k = 0; k < c.inputs; ++k) {
      const int64_t at = m * row_stride + k * c.stride;
      write({data, c.dtype, 0, 1}, 0, at, float(x[at]));
    }

  const int64_t contexts = c.contexts;
  Buffer<float> in_gain(contexts * c.inputs), out_gain(c.batch * c.outputs), bias(c.outputs);
  Buffer<int64_t> context(c.batch);
  for (float& v : in_gain) v = float(integer(c.grad == Grad::none ? 300 : 3));
  for (float& v : out_gain) v = float(integer(2));
  for (float& v : bias) v = float(integer(100));
  for (int64_t& v : context) v = int64_t(random() % contexts);
  const auto nearest = context;
  for (int64_t& v : context)  // some out of range: the nearest is read
    if (random() % 2) v += v == 0 ? -5 : v == contexts - 1 ? int64_t{1} << 40 : 0;
  // in_gain by context, or a row of out_gain for every row of x
  const bool banks = c.grad == Grad::none ? c.batch % 2 != 0 : c.grad == Grad::context;
  if (c.modulated) {
    call.in_gain = {banks ? in_gain.data() : nullptr, contexts};
    call.context = banks ? context.data() : nullptr;
    call.out_gain = {out_gain.data(), banks ? 1 : c.batch};
    if (c.grad == Grad::none) call.bias = {bias.data(), 1};
  }
  const int64_t grad_rows = c.grad == Grad::one ? 1 : c.grad == Grad::each ? c.batch : contexts;
  Buffer<uint32_t> other(c.batch * c.outputs);  // every second element is not of it, but for float32
  std::vector<double> want_grad(grad_rows * c.outputs), other_value(c.batch * c.outputs);
  Buffer<float> grad(grad_rows * c.outputs,
                     c.grad == Grad::context ? 0 : std::numeric_limits<float>::quiet_NaN());
  if (c.grad != Grad::none) {
    const int64_t other_stride = c.dtype == Dtype::float32 ? 1 : 2;
    call.other = {other.data(), c.dtype, c.outputs * other_stride, other_stride};
    call.gain_grad = {grad.data(), grad_rows};
    if (c.grad == Grad::context) call.context = context.data();
    for (size_t i = 0; i < other.size(); ++i) {
      other_value[i] = integer(2);
      write({other.data(), c.dtype, 0, 1}, 0, int64_t(i) * other_stride, float(other_value[i]));
    }
  }
  Buffer<float> y(c.batch * c.outputs, std::numeric_limits<float>::quiet_NaN());
  if (c.product) call.y = {y.data(), Dtype::float32, c.outputs, 1};
  execute(call);

  std::vector<double> row(c.inputs);
  for (int64_t n = 0; n < c.outputs; ++n) {
    for (int64_t k = 0; k < c.inputs; ++k) row[k] = c.transposed ? code_at(call, k, n) : code_at(call, n, k);
    for (int64_t m = 0; m < c.batch; ++m) {
      double sum = 0;
      for (int64_t k = 0; k < c.inputs; ++k)
        sum += x[m * row_stride + k * c.stride] * row[k] *
               (call.in_gain.data ? in_gain[nearest[m] * c.inputs + k] : 1.0f);
      if (std::abs(sum) > 0x1p24) fail("the case itself is not exact");
      double want = sum * 0.5;
      const int64_t grad_row = c.grad == Grad::one ? 0 : c.grad == Grad::each ? m : nearest[m];
      if (c.grad != Grad::none) want_grad[grad_row * c.outputs + n] += other_value[m * c.outputs + n] * want;
      if (c.modulated) want *= out_gain[banks ? n : m * c.outputs + n];
      if (call.bias.data) want += bias[n];
      if (c.product && y[m * c.outputs + n] != want) {
        char text[256];
        std::snprintf(text, sizeof text,
                      "family %x transposed %d offset %lld %lld K %lld N %lld M %lld dtype %d modulated %d: "
                      "y[%lld, %lld] is %g, expected %g",
                      unsigned(c.family), c.transposed, (long long)c.row_offset, (long long)c.col_offset,
                      (long long)c.inputs, (long long)c.outputs, (long long)c.batch, int(c.dtype),
                      c.modulated, (long long)m, (long long)n, y[m * c.outputs + n], want);
        fail(text);
      }
    }
  }
  for (size_t i = 0; c.grad != Grad::none && i < want_grad.size(); ++i) {
    if (std::abs(want_grad[i]) > 0x1p23) fail("the case itself is not exact");
    if (grad[i] != want_grad[i])
      fail("family " + std::to_string(unsigned(c.family)) + " M " + std::to_string(c.batch) + " grad " +
           std::to_string(int(c.grad)) + ": gain_grad[" + std::to_string(i) + "] is " +
           std::to_string(grad[i]) + ", expected " + std::to_string(want_grad[i]));
  }
}

// One weight, +-1, and float32 that strains its parts: what is not finite, large ones, ever smaller ones. In
// batches of so many rows. First parts are not rounded up: sums of 24 bits cut off a second part that is negative
// then, 2^104 of the largest float32. (GPUs that were measured keep a bit or two more, see tests/ptx/tensor.cpp.)
template <class Execute>
void check_extremes(const Execute& execute, int64_t rows) {
  Buffer<float> x = {std::numeric_limits<float>::infinity(),
                     std::bit_cast<float>(0x7F800001u),
                     0x1.ffep127f,
                     0x1.ffep-100f,
                     0x1p-112f,
                     0x1.234566p-120f,
                     0x1p-126f,
                     0x1.2344p-133f,
                     0x1p-149f};
  Buffer<float> y(x.size(), 0.0f);
  Dense call{};
  call.family = Family::rademacher;
  call.rows = call.cols = 1;
  call.factor = 1;
  for (int64_t first = 0; first < int64_t(x.size()); first += rows) {
    call.batch = std::min(rows, int64_t(x.size()) - first);
    call.x = {x.data() + first, Dtype::float32, 1, 1};
    call.y = {y.data() + first, Dtype::float32, 1, 1};
    execute(call);
  }
  for (size_t m = 0; m < x.size(); ++m) {
    const float want = x[m] * float(code_at(call, 0, 0));
    if (want == want ? y[m] != want : y[m] == y[m])
      fail("a float32 of its own, of " + std::to_string(rows) + " rows: " + std::to_string(m) + " is " +
           std::to_string(y[m]) + ", expected " + std::to_string(want));
  }
}

// x, of numbers that the dtype holds exactly, and in_gain for all of its rows (or none).
struct Inputs {
  Dtype dtype;
  Buffer<float> x, in_gain;
  int64_t most_scratch = Dense{}.most_scratch;
};

// The product value by value, that of its magnitudes, and the largest of the row: compare(y, exact, magnitude,
// largest).
template <class Execute, class Compare>
void check_values(const Execute& execute, Family family, bool transposed, Inputs& given, int64_t outputs,
                  int64_t batch, const Compare& compare) {
  const Buffer<float>& x = given.x;
  Buffer<uint32_t> elements(x.size());
  for (size_t i = 0; i < x.size(); ++i) write({elements.data(), given.dtype, 0, 1}, 0, int64_t(i), x[i]);
  Dense call{};
  call.family = family;
  call.key = {5, 7};
  call.transposed = transposed;
  call.most_scratch = given.most_scratch;
  const int64_t inputs = int64_t(x.size()) / batch;
  call.rows = transposed ? inputs : outputs, call.cols = transposed ? outputs : inputs;
  call.factor = 1;
  call.batch = batch;
  call.most_scratch = 0;  // the reduction is not split
  call.x = {elements.data(), given.dtype, inputs, 1};
  if (given.in_gain.size()) call.in_gain = {given.in_gain.data(), 1};
  Buffer<float> y(batch * outputs, std::numeric_limits<float>::quiet_NaN());
  call.y = {y.data(), Dtype::float32, outputs, 1};
  execute(call);
  std::vector<double> row(inputs);
  for (int64_t n = 0; n < outputs; ++n) {
    for (int64_t k = 0; k < inputs; ++k) row[k] = transposed ? code_at(call, k, n) : code_at(call, n, k);
    for (int64_t m = 0; m < batch; ++m) {
      double exact = 0, magnitude = 0, largest = 0;
      for (int64_t k = 0; k < inputs; ++k) {
        const double gain = given.in_gain.size() ? given.in_gain[k] : 1,
                     product = row[k] * x[m * inputs + k] * gain;
        exact += product, magnitude += std::abs(product);
        largest = std::max(largest, std::abs(x[m * inputs + k] * gain));
      }
      compare(double{y[m * outputs + n]}, exact, magnitude, largest);
    }
  }
}

// float32 of any size in one row. With u = 2^-24, an element's parts are off by at most 2 u of it, or 2^-39
// of the row's largest, whose code may be 1 where the element's is 252; the two parts of a k16 step make as
// many sums, each truncated and so off by 2 u of the magnitude; adding a chain and the factor are 2 u
// more. Subnormal results are off by their last place.
template <class Execute>
void check_ranges(const Execute& execute, Family family, bool transposed, int64_t batch) {
  std::mt19937_64 random(6);
  Inputs given{Dtype::float32, Buffer<float>(batch * 13), {}};
  for (float& v : given.x)
    v = std::ldexp(float(int64_t(random() % 0x1000000) - 0x800000), int(random() % 260) - 23 - 146);
  const int steps = transposed ? 1 : columns_per_word(family) / 4;  // 13 columns are in 4 patches
  const double bound = (4 + 2 * 2 * steps) * 0x1p-24 + 13 * 252 * 0x1p-39;
  check_values(execute, family, transposed, given, 5, batch, [&](double y, double exact, double magnitude, double) {
    if (!(std::abs(y - exact) <= bound * magnitude + 0x1p-149))
      fail("a float32 row of many sizes: " + std::to_string(y) + " for " + std::to_string(exact));
  });
}

// x of any size in a row of a few: integers may be off by 2^-26 of the row's largest, or 2^-18 (bfloat16), which
// the codes multiply; the sum's two roundings, and what check_ranges allows a product of floats, are the rest.
template <class Execute>
void check_few(const Execute& execute, Family family, bool transposed, Dtype dtype, int64_t batch) {
  std::mt19937_64 random(9);
  Inputs given{dtype, Buffer<float>(batch * 13), {}};
  const bool wide = dtype == Dtype::float32;
  for (float& v : given.x) {
    const int size = wide ? int(random() % 260) - 23 - 146 : int(random() % 22) - 14;
    v = std::ldexp(float(int64_t(random() % (wide ? 0x1000000 : 0x200)) - (wide ? 0x800000 : 0x100)), size);
  }
  const int steps = transposed ? 1 : columns_per_word(family) / 4, most = family == Family::uniform ? 15 : 1;
  const double bound = (4 + 2 * 2 * steps) * 0x1p-24, unit = dtype == Dtype::bfloat16 ? 0x1p-18 : 0x1p-26;
  check_values(execute, family, transposed, given, 5, batch,
               [&](double y, double exact, double magnitude, double largest) {
                 const double fixed = 13 * most * unit * largest;
                 if (!(std::abs(y - exact) <= bound * magnitude + fixed + 0x1p-149))
                   fail("few rows of many sizes: " + std::to_string(y) + " for " + std::to_string(exact));
               });
}

// So many equal ones that integers' sums would pass 2^31, were they not finished before. All of it is exact.
template <class Execute>
void check_many_equal(const Execute& execute, Family family) {
  Inputs given{Dtype::float32, Buffer<float>(300000, 1.0f), {}, 0};
  check_values(execute, family, true, given, 8, 1, [&](double y, double exact, double, double) {
    if (y != exact) fail("many ones: " + std::to_string(y) + " for " + std::to_string(exact));
  });
}

// Elements of 16 bits times a gain, of many sizes in one row: such a product is rounded to float32, then to
// 11 bits, which is u = 2^-11 of it; all else as above, in one sum of single parts.
template <class Execute>
void check_gained(const Execute& execute, Family family, bool transposed, Dtype dtype, int64_t batch) {
  std::mt19937_64 random(7);
  Inputs given{dtype, Buffer<float>(batch * 13), Buffer<float>(13)};
  for (float& v : given.x) v = std::ldexp(float(int64_t(random() % 0x200) - 0x100), int(random() % 22) - 14);
  for (float& v : given.in_gain)
    v = std::ldexp(float(int64_t(random() % 0x1000000) - 0x800000), int(random() % 120) - 83);
  const int steps = transposed ? 1 : columns_per_word(family) / 4;
  const double bound = 0x1p-11 + (3 + 2 * steps) * 0x1p-24 + 13 * 252 * 0x1p-39;
  check_values(execute, family, transposed, given, 5, batch, [&](double y, double exact, double magnitude, double) {
    if (!(std::abs(y - exact) <= bound * magnitude))
      fail("a row times its gain: " + std::to_string(y) + " for " + std::to_string(exact));
  });
}

// A call of more elements of x than sums may take scratch for, which is not to be run.
inline Dense large_call(int64_t batch, int64_t inputs, Dtype dtype) {
  Dense call{};
  call.family = Family::uniform;
  call.rows = 512, call.cols = inputs;
  call.batch = batch;
  call.x = {nullptr, dtype, inputs, 1};
  return call;
}

// The house bound of a relative error of 2e-6 at K = 8192 (../formula.py, ../ops/test_modulated_linear.py
// says what it leaves room for), which one chain of truncated sums misses ten times over.
template <class Execute>
void check_accuracy(const Execute& execute, Family family, bool transposed, int64_t batch) {
  std::mt19937 random(8);
  std::normal_distribution<float> normal;
  Inputs given{Dtype::float32, Buffer<float>(batch * 8192), {}};
  for (float& v : given.x) v = normal(random);
  double error = 0, norm = 0;
  check_values(execute, family, transposed, given, 8, batch, [&](double y, double exact, double, double) {
    error += (y - exact) * (y - exact), norm += exact * exact;
  });
  if (!(std::sqrt(error / norm) <= 2e-6))
    fail("a relative error of " + std::to_string(1e6 * std::sqrt(error / norm)) + "e-6");
}

// Runs every case; execute(call) leaves the product in call.y. The number of cases.
template <class Execute>
int64_t check_all(const Execute& execute) {
  check_extremes(execute, 9);
  check_extremes(execute, 1);
  check_extremes(execute, 5);
  int64_t cases = 3;
  for (Family family : {Family::rademacher, Family::uniform, Family::normal})
    for (bool transposed : {false, true}) {
      check_ranges(execute, family, transposed, 20);
      check_accuracy(execute, family, transposed, 3);
      for (Dtype dtype : {Dtype::bfloat16, Dtype::float16})
        check_gained(execute, family, transposed, dtype, 20);
      cases += 4;
    }
  std::mt19937_64 random(1);
  const auto run = [&](const Case& c) {
    check(c, random, execute);
    ++cases;
  };
  for (Family family : {Family::rademacher, Family::uniform}) {
    check_many_equal(execute, family);
    ++cases;
    for (bool transposed : {false, true})
      for (int64_t batch = 1; batch <= 8; ++batch) {
        for (Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16})
          check_few(execute, family, transposed, dtype, batch);
        const Dtype dtype = batch % 3 == 1 ? Dtype::float32 : batch % 3 == 2 ? Dtype::bfloat16 : Dtype::float16;
        // One split, of several stages, and of more than integers' sums have room for.
        Case c{family, transposed, 5, 43, 4200, 20, batch, dtype};
        c.most_scratch = 0;
        run(c);
        c.inputs = 70000, c.outputs = 9;
        if (batch == 2 || batch == 6) run(c);
        run({family, transposed, 0, 0, 128, 600, batch, batch % 2 ? Dtype::bfloat16 : Dtype::float32, true});
        cases += 3;
      }
  }
  constexpr int64_t kFar = (int64_t{1} << 34) - 700;
  for (Family family : {Family::rademacher, Family::uniform, Family::normal})
    for (bool transposed : {false, true}) {
      for (Dtype dtype : {Dtype::bfloat16, Dtype::float16})
        for (int64_t batch : {1, 9, 24, 64}) run({family, transposed, 0, 0, 64, 40, batch, dtype});
      run({family, transposed, 5, 43, 77, 33, 7});             // ragged everywhere
      run({family, transposed, 3, 0, 1, 1, 2});                // one weight
      run({family, transposed, kFar, kFar + 5, 130, 31, 13});  // the stream's far end
      run({family, transposed, 2, 1, 32, 9, 70});              // more rows than a block takes
      run({family, transposed, 0, 0, 1024, 8, 3});             // several splits
      run({family, transposed, 4, 32, 96, 24, 5, Dtype::bfloat16, false, 32});  // aligned, x with padding
      run({family, transposed, 1, 2, 45, 12, 5, Dtype::bfloat16, false, 3, 2});
      run({family, transposed, 1, 2, 45, 12, 5, Dtype::float16, true, 3, 2});
      run({family, transposed, 6, 7, 50, 21, 12, Dtype::float32});
      run({family, transposed, 6, 7, 90, 21, 4, Dtype::float16});
      run({family, transposed, 9, 35, 24, 17, 8, Dtype::bfloat16, true});  // no in_gain: a row for each row
      run({family, transposed, 9, 35, 24, 17, 9, Dtype::bfloat16, true});  // in_gain by context
      run({family, transposed, 9, 35, 24, 17, 35, Dtype::float32, true});
      const auto run_grad = [&](int64_t outputs, int64_t batch, Dtype dtype, bool modulated, Grad grad,
                                bool product) {
        run({family, transposed, 3, 6, 40, outputs, batch, dtype, modulated, 0, 1, grad, product});
      };
      run_grad(33, 5, Dtype::bfloat16, false, Grad::one, true);
      run_grad(70, 21, Dtype::float16, true, Grad::context, true);
      run_grad(31, 64, Dtype::bfloat16, false, Grad::each, false);
      run_grad(9, 17, Dtype::float32, true, Grad::each, true);
      run_grad(1, 1, Dtype::float32, false, Grad::context, false);
    }
  // From the stream's begin on, where x may be read 16 bytes at a time: rows that end or begin within them.
  for (bool transposed : {false, true}) {
    const auto run_aligned = [&](int64_t inputs, Dtype dtype, bool modulated, int64_t padding,
                                 int64_t offset = 0, int64_t stride = 1) {
      Case c{Family::uniform, transposed, 0, 0, inputs, 21, 5, dtype, modulated, padding, stride};
      c.offset = offset;
      run(c);
    };
    for (bool modulated : {false, true}) {
      for (int64_t inputs : {12, 100}) run_aligned(inputs, Dtype::float32, modulated, 4);
      run_aligned(36, Dtype::float32, modulated, 1);
      run_aligned(16, Dtype::float32, modulated, 0, 2);
      run_aligned(16, Dtype::float32, modulated, 0, 0, 2);
      run_aligned(128, Dtype::bfloat16, modulated, 4);
      run_aligned(128, Dtype::float16, modulated, 0, 4);
      run_aligned(128, Dtype::float16, modulated, 0, 1);
      run_aligned(128, Dtype::bfloat16, modulated, 0, 0, 2);
    }
    run({Family::uniform, transposed, 0, 0, 128, 21, 1, Dtype::bfloat16, false, 3});  // whatever its stride
    run_aligned(12, Dtype::bfloat16, true, 4);
    run_aligned(13, Dtype::float32, true, 3);
  }
  return cases;
}

// The same for batches and reductions of several tiles and stages, and for a batch that is taken in parts.
template <class Execute>
int64_t check_large(const Execute& execute) {
  std::mt19937_64 random(4);
  int64_t cases = 0;
  const auto run = [&](const Case& c) {
    check(c, random, execute);
    ++cases;
  };
  for (Family family : {Family::rademacher, Family::uniform, Family::normal})
    for (bool transposed : {false, true}) {
      run({family, transposed, 0, 0, 1280, 260, 130});
      run({family, transposed, 4, 32, 224, 300, 257, Dtype::bfloat16, false, 32});
      run({family, transposed, 7, 61, 333, 515, 65});
      run({family, transposed, 2, 5, 700, 70, 140, Dtype::float32});
      run({family, transposed, 2, 5, 100, 21, 33, Dtype::float16});
      run({family, transposed, 4, 32, 224, 300, 257, Dtype::float16, false, 32});
      run({family, transposed, 0, 0, 160, 64, 65, Dtype::float32, true});  // vectors of x and in_gain
      run({family, transposed, 0, 0, 160, 64, 65, Dtype::float16, true});
      check_accuracy(execute, family, transposed, 65);
      ++cases;
      run({family, transposed, 1, 9, 130, 33, 150, Dtype::bfloat16, true});  // a row of out_gain for each row
      run({family, transposed, 1, 9, 130, 33, 151, Dtype::bfloat16, true});  // in_gain by context
      for (Grad grad : {Grad::one, Grad::each, Grad::context})
        for (int64_t batch : {257, 300})  // three parts
          run({family, transposed, 3, 6, 40, 70, batch, Dtype::bfloat16, batch == 300, 0, 1, grad, true, 1});
      for (Grad grad : {Grad::one, Grad::each, Grad::context})  // two parts of several chunks
        run({family, transposed, 3, 6, 40, 70, 550, Dtype::bfloat16, false, 0, 1, grad, true, 500000});
      for (int64_t contexts : {100, 700})  // one part; more contexts than rows
        run({family, transposed, 3, 6, 40, 9, 300, Dtype::float32, true, 0, 1, Grad::context, true, 1 << 20,
             contexts});
    }
  return cases;
}

}  // namespace
