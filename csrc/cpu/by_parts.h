// x as one, two or three bfloat16 an element, its parts, that sum to it exactly.
//
// Rows that are tiny throughout would lose their last parts, as the unit counts subnormal bfloat16 as zero:
// they are packed larger, by a power of two, and their sums made smaller again.
#pragma once

#include "by_unit.h"

namespace nmkern::cpu {

struct ByParts : ByUnit<ByParts> {
  static constexpr bool kIntegers = false;

  // What MatrixUnit::pack says of the packed rows, of which the first is packed_from.
  uint8_t* sizes = nullptr;
  int64_t packed_from = 0;

  // How many parts an element takes; 0 where vectors are faster, or there is no unit.
  static int parts_of(const Dense& c) {
    if (!kernels().matrix_unit) return 0;
    // One row of float32, uniform, 8192 x 8192 on 2 threads, on the unit and fused: 2.4 and 1.9 ms (transposed
    // 2.3 and 1.9). Two rows: 2.0 and 2.4.
    const bool floats = c.x.dtype == Dtype::float32 || c.in_gain.data;
    if (floats && c.batch == 1) return 0;
    if (floats) return 3;
    return c.x.dtype == Dtype::float16 ? 2 : 1;
  }

  ByParts(const Dense& c, const Runtime& r, int parts) : ByUnit(c, r, parts, 2, kUnitRows) {}

  bool keeps_words() const { return true; }
  // Whether the parts of all rows are rows of one tile register.
  bool stacked() const { return call.batch == block && parts > 1 && parts * block <= kUnitRows; }

  void start_packing(int64_t m0, int64_t rows) {
    if (!sizes)
      sizes = static_cast<uint8_t*>(runtime.allocate(runtime.self, rows));  // no later chunk is larger
    std::fill_n(sizes, rows, 0);
    packed_from = m0;
  }
  void pack_run(int64_t run, int64_t m, uint32_t* to) const {  // other threads pack other runs of the row
    __atomic_fetch_or(&sizes[m - packed_from], pack_scaled(run, m, 1, to), __ATOMIC_RELAXED);
  }
  // The `rows` that are packed together from m0 on: the tiny ones again, larger.
  void end_packing(int64_t m0, int64_t rows, char* packed) const {
    for (int64_t r = 0; r < rows; ++r) {
      if (!tiny(m0 + r)) continue;
      for (int64_t run = 0; run < blocks_of(steps(), run_steps()); ++run)
        pack_scaled(run, m0 + r, 1 / kTiny, place(run, r, padded(rows), packed));
    }
  }
  bool tiny(int64_t m) const { return sizes[m - packed_from] == kNonzero; }
  uint8_t pack_scaled(int64_t run, int64_t m, float scale, uint32_t* to) const {
    float row[2 * panel_steps(false, 2)];
    pack_elements(m, 2 * run * run_steps(), 2 * count(run), row);
    return k.matrix_unit->pack(row, count(run), call.transposed ? 1 : int(unit / 2), parts, scale, to, block);
  }

  void rescale(int64_t m, float* outputs) const {
    if (!tiny(m)) return;
    for (int64_t i = 0; i < tile_outputs(); ++i) outputs[i] *= kTiny;
  }
};

}  // namespace nmkern::cpu
