// A dense product of few rows by vectors of weights that nothing decodes (fields.h): Kernels::run_fields.
//
// x is packed in float32 times a power of two, of its row and field, so that the largest of a row is just below 2^127
// and products are of normal size. A row with a NaN or an infinity is not finished here.
#pragma once

#include <cmath>

#include "by_vectors.h"
#include "fields.h"

namespace nmkern::cpu {

struct ByFields : ByVectors {
  static constexpr int kTop = 127;

  const int* size;  // [batch]

  static bool serves(const Dense& c) {
    const Kernels& k = kernels();
    return k.run_fields && has_fields(c.family) && c.batch <= 2 * k.max_block &&
           c.inputs() >= kFewWeights / c.outputs();
  }
  ByFields(const Dense& c, const Runtime& r) : ByVectors(c, r), size(sizes(largest)) {}

  int64_t offsets_of_run() const { return call.transposed ? vectors : 1; }
  int64_t packed_row_bytes() const { return 4 * (steps() + blocks_of(steps(), run()) * offsets_of_run()); }
  bool packed_as_is() const { return false; }

  // As ByVectors::pack, and behind all steps the offsets of their runs.
  void pack(int64_t part, int64_t m0, int64_t first, int64_t rows, int64_t all, char* packed) const {
    const int64_t step = part * run_steps(), count = std::min(run_steps(), steps() - step);
    float* to = reinterpret_cast<float*>(packed) + step * all;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t m = m0 + first + r;
      float row[tile_steps(false, false)];
      pack_elements(m, step, count, row);
      float* offset = reinterpret_cast<float*>(packed) + steps() * all + step / run() * offsets_of_run() * rows + r;
      double scale[kFieldShift];
      for (int f = 0; f < kFieldShift; ++f)
        scale[f] = std::ldexp(1.0, kTop - size[m] - (call.transposed ? 0 : field_place(call.family, f)));
      for (int64_t s = 0; s < count; ++s) to[s * rows + r] = float(row[s] * scale[s % unit % kFieldShift]);
      for (int64_t s = 0; s < count; s += run()) {
        double sum = 0;
        for (int64_t i = s; i < std::min(s + run(), count); ++i) sum += row[i];
        sum = std::ldexp(-field_center(call.family) * sum, kTop + kSubnormalUnit - size[m]);
        for (int64_t v = 0; v < offsets_of_run(); ++v, offset += rows) *offset = float(sum * (1 << place(v)));
      }
    }
  }

  void run_tiles(Tile& t, int64_t first, int64_t count, int64_t m0, int64_t rows, int64_t part, const char* x) const {
    t.offsets = reinterpret_cast<const float*>(x) + steps() * rows;
    ByVectors::run_tiles(t, first, count, m0, rows, part, x, k.run_fields, [&](int64_t m, int64_t v) {
      return std::ldexp(2 * double(call.factor), size[m] - kTop - kSubnormalUnit - place(v));
    });
  }

 private:
  int64_t run() const { return field_run(call.family); }
  // Sums of vector v are larger by that power of two.
  int place(int64_t v) const { return call.transposed ? field_place(call.family, int(v)) : 0; }

  static uint32_t largest(const float* row, int64_t count) {
    int32_t most = 0;
    for (int64_t i = 0; i < count; ++i) most = std::max(most, std::bit_cast<int32_t>(row[i]) & 0x7FFFFFFF);
    return uint32_t(most);
  }
};

}  // namespace nmkern::cpu
