// The cases of the fused FlyNet and their reference: see flynet_device.cpp.
//
// With integers, a power of two of units and powers of two for factors every sum is exact, in whatever order,
// and outputs are compared bit for bit; floats are compared with a bound on what rounding may do.
#pragma once

#include "../../csrc/cuda/flynet.h"
#include "sparse_cases.h"

namespace {

enum class Gains { one, bank, each };

struct FlyCase {
  Family family;
  int64_t inputs, hidden, classes, fan_in, batch;
  Gains gains = Gains::one;
  Dtype dtype = Dtype::float32;
  int64_t encoder_row = 0, encoder_col = 0, more_inputs = 0;  // of the population, beside the view
  int64_t decoder_row = 0, decoder_col = 0;
  bool exact = true;
  bool special = false;  // NaN in one row, of an input that is drawn, and of one that is not
};

int fly_code(const FlyNet& net, int64_t row, int64_t col) {
  row += net.decoder_row, col += net.decoder_col;
  const int columns = columns_per_word(net.family), bits = 32 / columns;
  const uint32_t word =
      philox4x32(uint32_t(col / columns), uint32_t(row / 4), 0, uint32_t(net.family), net.decoder_key)
          .w[row % 4];
  return decode(net.family, word >> (col % columns * bits) & ((1u << bits) - 1));
}

// execute(net) leaves what the call computes in net.logits or net.gain_grad.
template <class Execute>
void check_flynet(const FlyCase& c, std::mt19937_64& random, const Execute& execute) {
  FlyNet net{};
  net.inputs = c.inputs, net.hidden = c.hidden, net.classes = c.classes;
  net.encoder_key = {uint32_t(random()), uint32_t(random())};
  net.decoder_key = {uint32_t(random()), uint32_t(random())};
  net.encoder_row = c.encoder_row, net.encoder_col = c.encoder_col;
  net.population = c.encoder_col + c.inputs + c.more_inputs, net.fan_in = c.fan_in;
  net.encoder_factor = c.exact ? 2.0f : 0.7f;
  net.family = c.family;
  net.decoder_row = c.decoder_row, net.decoder_col = c.decoder_col;
  net.decoder_factor = c.exact ? 0.5f : 0.01f;
  net.batch = c.batch;
  std::normal_distribution<float> normal;
  const auto draw = [&](int64_t most) {
    return c.exact ? float(int64_t(random() % uint64_t(2 * most + 1)) - most) : normal(random);
  };
  Held x(c.batch, c.inputs, c.dtype, 1 + c.batch % 2), logits(c.batch, c.classes, c.dtype);
  for (int64_t m = 0; m < c.batch; ++m)
    for (int64_t k = 0; k < c.inputs; ++k) x.set(m, k, draw(1));

  std::vector<std::vector<int64_t>> drawn(c.hidden);
  std::vector<int> counts(c.inputs);
  for (int64_t u = 0; u < c.hidden; ++u)
    for (uint32_t column : columns_of(net.encoder_key, c.encoder_row + u, net.population, c.fan_in)) {
      const int64_t k = int64_t{column} - c.encoder_col;
      if (k < 0 || k >= c.inputs) continue;
      drawn[u].push_back(k);
      ++counts[k];
    }
  if (c.special) {
    const auto none = std::find(counts.begin(), counts.end(), 0);
    if (none == counts.end()) fail("the case itself draws every input");
    x.set(0, none - counts.begin(), std::numeric_limits<float>::quiet_NaN());
    x.set(1, drawn[0][0], std::numeric_limits<float>::quiet_NaN());
  }

  const int64_t contexts = c.gains == Gains::one ? 1 : c.gains == Gains::bank ? 3 : c.batch;
  Buffer<float> gain(contexts * c.hidden), grad(contexts * c.hidden, std::numeric_limits<float>::quiet_NaN());
  for (float& v : gain) v = draw(1);
  Buffer<int64_t> context(c.batch);
  std::vector<int64_t> row(c.batch);
  for (int64_t m = 0; m < c.batch; ++m) {
    context[m] = int64_t(random() % 5) - 1;  // some out of range: the nearest is read
    row[m] = c.gains == Gains::one ? 0 : c.gains == Gains::each ? m : std::clamp<int64_t>(context[m], 0, 2);
  }
  net.x = x.matrix();
  net.logits = logits.matrix();
  net.context = c.gains == Gains::bank ? context.data() : nullptr;
  net.gain = {gain.data(), contexts};
  execute(net);

  // r, and the same of magnitudes without relu, which error bounds follow.
  const auto hidden = [&](int64_t m, bool magnitudes) {
    std::vector<double> r(c.hidden);
    double sum = 0;
    for (int64_t u = 0; u < c.hidden; ++u) {
      for (int64_t k : drawn[u]) r[u] += magnitudes ? std::abs(x.get(m, k)) : x.get(m, k);
      r[u] *= net.encoder_factor;
      sum += r[u];
    }
    const double mean = sum / double(c.hidden);
    for (double& v : r) v = magnitudes ? v + mean : v - mean < 0 ? 0 : v - mean;
    return r;
  };
  // A value, and the bound of an error in it: that of so many roundings of its magnitude.
  const auto compare = [&](const char* name, int64_t i, int64_t j, float found, double want, double magnitude,
                           Dtype dtype) {
    if (magnitude > 0x1p23 && c.exact) fail("the case itself is not exact");
    const double unit = dtype == Dtype::float32 ? 0 : dtype == Dtype::bfloat16 ? 0x1p-8 : 0x1p-11;
    const bool good =
        c.exact || want != want
            ? same(found, rounded(float(want), dtype))
            : std::abs(found - want) <= 0x1p-24 * double(c.fan_in + 60) * magnitude + unit * std::abs(want);
    if (!good)
      fail("family " + std::to_string(unsigned(c.family)) + " M " + std::to_string(c.batch) + " hidden " +
           std::to_string(c.hidden) + ": " + name + "[" + std::to_string(i) + ", " + std::to_string(j) +
           "] is " + std::to_string(found) + ", expected " + std::to_string(want));
  };
  std::vector<std::vector<double>> all, sizes;
  for (int64_t m = 0; m < c.batch; ++m) all.push_back(hidden(m, false)), sizes.push_back(hidden(m, true));
  for (int64_t m = 0; m < c.batch; ++m)
    for (int64_t cls = 0; cls < c.classes; ++cls) {
      double want = 0, magnitude = 0;
      for (int64_t u = 0; u < c.hidden; ++u) {
        const double weight = fly_code(net, cls, u) * double(gain[row[m] * c.hidden + u]);
        want += weight * all[m][u], magnitude += std::abs(weight) * sizes[m][u];
      }
      compare("logits", m, cls, logits.get(m, cls), want * net.decoder_factor, magnitude * net.decoder_factor,
              c.dtype);
    }

  Held d(c.batch, c.classes, c.dtype);
  for (int64_t m = 0; m < c.batch; ++m)
    for (int64_t cls = 0; cls < c.classes; ++cls) d.set(m, cls, draw(1));
  net.logits = d.matrix();
  net.gain = {};
  net.gain_grad = {grad.data(), contexts};
  execute(net);
  std::vector<double> want(contexts * c.hidden), magnitude(contexts * c.hidden);
  for (int64_t u = 0; u < c.hidden; ++u)
    for (int64_t m = 0; m < c.batch; ++m) {
      double pulled = 0, size = 0;
      for (int64_t cls = 0; cls < c.classes; ++cls) {
        const double term = fly_code(net, cls, u) * double(d.get(m, cls)) * net.decoder_factor;
        pulled += term, size += std::abs(term);
      }
      want[row[m] * c.hidden + u] += all[m][u] * pulled;
      magnitude[row[m] * c.hidden + u] += sizes[m][u] * size;
    }
  for (int64_t t = 0; t < contexts; ++t)
    for (int64_t u = 0; u < c.hidden; ++u) {
      const int64_t at = t * c.hidden + u;
      compare("gain_grad", t, u, grad[at], want[at], magnitude[at], Dtype::float32);
    }
}

// Runs every case, forward and backward. The number of cases.
template <class Execute>
int64_t check_flynet_cases(const Execute& execute) {
  constexpr int64_t kMany = 2240;  // rows, of which blocks take several groups in order
  constexpr Family kUniform = Family::uniform;
  const FlyCase cases[] = {
      {kUniform, 40, 128, 10, 7, 37},
      {Family::rademacher, 33, 128, 3, 3, 16, Gains::bank},
      {Family::normal, 24, 64, 5, 2, 21, Gains::each},
      {kUniform, 40, 1024, 13, 3, 5, Gains::one, Dtype::bfloat16},  // two groups of units, two tiles
      {kUniform, 45, 128, 11, 3, 40, Gains::bank, Dtype::float16, 3, 5, 2, 2, 9},  // views of both matrices
      {Family::rademacher, 20, 64, 4, 20, 17, Gains::bank, Dtype::float32, 0, 0, 0, 3, 31},
      {Family::normal, 20, 32, 1, 9, 1, Gains::one, Dtype::float32, 1, 2, 3, 1, 3},
      {kUniform, 40, 700, 10, 7, 20, Gains::one, Dtype::float32, 0, 0, 0, 1, 5, false},
      {Family::normal, 61, 300, 30, 11, 33, Gains::bank, Dtype::bfloat16, 0, 0, 0, 0, 0, false},
      {kUniform, 6, 1024, 3, 2, kMany, Gains::bank},
      {kUniform, 6, 1024, 3, 2, kMany},
      {kUniform, 6, 64, 3, 2, kMany, Gains::each},
      {kUniform, 300, 16, 10, 3, 9, Gains::each, Dtype::float32, 0, 0, 0, 0, 0, true, true},
  };
  std::mt19937_64 random(1);
  int64_t count = 0;
  for (const FlyCase& c : cases) {
    check_flynet(c, random, execute);
    ++count;
  }
  return count;
}

}  // namespace
