// x as integers, and those as digits of eight bits: weights take little decoding then (bytes.h).
//
//   x[m, k] * in_gain[c, k] = 2^-exponent[m] * q[m, k], rounded; the largest of a row has `bits` bits
//   sum_k x[m, k] * code[n, k] = 2^-exponent[m] * (2 * sum_k q[m, k] * field[n, k] - offset * sum_k q[m, k])
//
// For normal, q * code is summed. A row with a NaN or an infinity is not finished here, and other rows are as if it
// were not there. Nothing but q is rounded: by at most 2^-26 of the row's largest for uniform (three
// digits: 2^-18), 2^-27 for rademacher (2^-19), transposed 2^-30 for both (2^-22), and 2^-29 for normal (2^-21).
// Sums of integers are exact, of kUnitChain elements at most, and are added up in float32.
//
// 8192 x 8192 on an Emerald Rapids, time as bfloat16 parts over time as digits: uniform, bfloat16 1.5 at 1 and 4 rows
// and 1.2 at 8; float32 1.5 to 2.1 from 4 rows on, at any batch; normal 1.3 up to 4 rows.
#pragma once

#include "by_unit.h"

namespace nmkern::cpu {

struct ByDigits : ByUnit<ByDigits> {
  static constexpr bool kIntegers = true;

  int* exponent;                // [batch]
  int64_t* run_sums = nullptr;  // [runs][rows that are packed together]: sums of q
  int64_t packed_rows = 0, packed_from = 0;

  // How many digits an element takes; 0 where there is no unit, or parts are faster. Results of bfloat16 cannot tell
  // three from four, but up to four rows four take no longer. Where an element has fewer parts than digits, or a
  // weight two bytes, parts win with rows, and the sooner the less their weights take to decode; one row of float32
  // need not be packed for vectors (256 x 256: 7.9 us, here 9.9); and gains' gradients hold the sums of all rows.
  static int digits_of(const Dense& c) {
    if (!kernels().matrix_unit || (c.gain_grad.data && c.batch > kUnitPartRows)) return 0;
    const bool narrow = c.x.dtype == Dtype::bfloat16 && !c.gain_grad.data;
    const int digits = narrow && c.batch > kUnitRows / 4 ? 3 : 4;
    const bool floats = c.x.dtype == Dtype::float32 || c.in_gain.data;
    if (floats && c.batch == 1 && c.inputs() < kFewWeights / c.outputs()) return 0;
    if (floats && c.family != Family::normal) return digits;
    const bool soon = c.family == Family::normal || (c.family == Family::rademacher && !c.transposed);
    return blocks_of(c.batch, kUnitRows / digits) <= (soon ? 1 : 2) ? digits : 0;
  }

  ByDigits(const Dense& c, const Runtime& r, int digits)
      : ByUnit(c, r, digits, digit_elements(c.family), kUnitRows / digits) {
    exponent = sizes(k.matrix_unit->largest);
    for (int64_t m = 0; m < c.batch; ++m) exponent[m] = bits() - exponent[m];
  }
  // Digits have room for one bit less than their last carries, and for a byte's factors of x.
  int bits() const {
    if (call.family == Family::normal) return 8 * parts - 3;
    if (call.transposed) return 8 * parts - 2;
    return 8 * parts - (call.family == Family::uniform ? 6 : 5);
  }

  bool keeps_words() const { return call.transposed && call.family == Family::rademacher; }
  bool stacked() const { return true; }

  void start_packing(int64_t m0, int64_t rows) {
    if (!run_sums) {  // no later chunk is larger
      const int64_t runs = blocks_of(steps(), run_steps());
      run_sums = static_cast<int64_t*>(runtime.allocate(runtime.self, runs * rows * 8));
      packed_rows = rows;
    }
    packed_from = m0;
  }
  void end_packing(int64_t, int64_t, char*) const {}
  void pack_run(int64_t run, int64_t m, uint32_t* to) const {
    float row[4 * panel_steps(false, 4)];
    pack_elements(m, step_elements * run * run_steps(), step_elements * count(run), row);
    run_sums[run * packed_rows + m - packed_from] = k.matrix_unit->pack_digits(
        row, count(run), call.family, call.transposed, parts, exponent[m], to, block);
  }

  // Rows [m0, m0 + rows) and those that pad them, for `words` words from number `word` of the reduction on.
  const FixedRow* fixed_rows(int64_t m0, int64_t rows, int64_t word, int64_t words, FixedRow* to) const {
    const int64_t run_words = run_steps() * step_elements / unit;
    const int64_t offset = call.family == Family::normal ? 0 : -decode(call.family, 0);
    std::fill_n(to, padded(rows), FixedRow{});
    for (int64_t r = 0; r < rows; ++r) {
      int64_t sum = 0;
      for (int64_t run = word / run_words; run < blocks_of(word + words, run_words); ++run)
        sum += run_sums[run * packed_rows + m0 + r - packed_from];
      to[r] = {std::ldexp(1.0, -exponent[m0 + r]), double(offset * sum)};
    }
    return to;
  }
  void rescale(int64_t, float*) const {}
};

}  // namespace nmkern::cpu
