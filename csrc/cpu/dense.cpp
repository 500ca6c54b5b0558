// The launcher of the dense products: cuts a call into tiles, packs x, runs the tile kernels, finishes.
//
// x is packed once per chunk of rows: converted, multiplied by in_gain, zero-padded to whole words, and
// laid out in the order in which the kernels read it (Tile::x). Sums live in a few hundred bytes a row and
// thread; scale, gains and bias are applied as they are written out.
// Invariant: an output, or a gain's gradient, is summed by one task in an order that the shape fixes.
#include "dense.h"

#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "launch.h"

namespace nmkern::cpu {
namespace {

constexpr int64_t kPackedBytes = 16 << 20;  // bounds the packed x, and so the scratch, of any call
constexpr int64_t kFewTiles = 8;
// Rows of x that a tile is generated for: their share of a run of x (128 KiB) and their sums (32 to 64) stay
// in L2 while the tile sweeps over the runs. All 1024 rows at once: 0 to 2 % slower in float32 on Zen 3; on
// Zen 5 bfloat16 lost a fifth of its speed from M = 256 to 1024. So on Zen 4 M = 256, 512 and 1024 take 78, 159
// and 320 to 339 ms (8192 x 8192). 128 rows generate more: 5 % slower.
constexpr int64_t kPartRows = 256;

struct Launch {
  const Dense& call;
  const Runtime& runtime;
  const Kernels& k;
  bool bf16;
  int64_t unit;             // reduction elements of a word (forward: columns, transposed: rows)
  int64_t reduction_first;  // first word of the reduction
  int64_t reduction_words;
  int64_t padding;  // elements of the first word that lie before the matrix
  int64_t vectors;  // vectors of outputs a tile has, which is also the outputs of a lane
  int64_t output_first;
  int64_t head;  // outputs of the first tile that lie before the matrix
  int64_t tiles;
  int64_t block;  // rows of x a micro-kernel takes

  Launch(const Dense& c, const Runtime& r)
      : call(c),
        runtime(r),
        k(kernels()),
        // x * in_gain is no bfloat16: rounding it to one would be a rounding that the exact result does
        // not make, so gains on the input take the float32 kernels (up to twice the time at large M).
        bf16(k.bf16 && c.x.dtype == Dtype::bfloat16 && !c.in_gain.data) {
    const int64_t columns = columns_per_word(c.family);
    unit = c.transposed ? kRowsPerPatch : columns;
    vectors = c.transposed ? columns : kRowsPerPatch;
    const int64_t in = c.transposed ? c.row_offset : c.col_offset;
    const int64_t out = c.transposed ? c.col_offset : c.row_offset;
    reduction_first = in / unit;
    padding = in % unit;
    reduction_words = (in + c.inputs() - 1) / unit - reduction_first + 1;
    output_first = out / vectors;
    head = out % vectors;
    tiles = (head + c.outputs() + tile_outputs() - 1) / tile_outputs();
    block = c.batch <= 2 * k.max_block ? c.batch : k.tile_block;
  }

  int64_t tile_outputs() const { return vectors * k.lanes; }
  int64_t elements() const { return reduction_words * unit; }  // of a packed row
  int64_t steps() const { return elements() / (bf16 ? 2 : 1); }
  int64_t packed_row_bytes() const { return steps() * 4; }
  int64_t part_rows() const { return std::max<int64_t>(1, kPartRows / block) * block; }
  int64_t tile_bytes() const { return call.batch <= k.fused_block ? 0 : k.scratch_bytes; }
  int64_t sums_floats(int64_t rows) const { return rows * vectors * k.lanes; }

  const float* bank(const Bank& bank, int64_t m, int64_t features) const {
    return bank.data + bank_row(bank, m) * features;
  }
  int64_t bank_row(const Bank& bank, int64_t m) const {
    return bank.rows == 1 ? 0 : call.context ? call.context[m] : m;
  }

  // Elements [first, first + count) of the packed row m, in the dtype of x or in float32 with in_gain; zero
  // outside of x.
  template <class Element>
  void pack_elements(int64_t m, int64_t first, int64_t count, Element* to) const {
    const int64_t begin = std::clamp<int64_t>(padding - first, 0, count);
    const int64_t end = std::clamp<int64_t>(padding + call.inputs() - first, begin, count);
    const int64_t i = first + begin - padding;
    std::fill(to, to + begin, Element{});
    std::fill(to + end, to + count, Element{});
    if constexpr (std::is_same_v<Element, uint16_t>) {
      const int64_t at = m * call.x.row_stride + i * call.x.col_stride;
      read(static_cast<const uint16_t*>(call.x.data) + at, call.x.col_stride, end - begin, to + begin,
           [](uint16_t v) { return v; });
    } else {
      read_row(call.x, m, i, end - begin, to + begin);
      if (!call.in_gain.data) return;
      const float* gain = bank(call.in_gain, m, call.inputs()) + i;
      for (int64_t e = begin; e < end; ++e) to[e] *= gain[e - begin];
    }
  }

  int64_t runs() const { return (steps() + run_steps() - 1) / run_steps(); }
  int64_t run_steps() const { return tile_steps(call.transposed, bf16); }

  // Run number `run` of rows [first, first + rows) of the `all` that are packed together from m0 on.
  void pack_run(int64_t run, int64_t m0, int64_t first, int64_t rows, int64_t all, char* packed) const {
    const int64_t step = run * run_steps(), count = std::min(run_steps(), steps() - step);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t m = m0 + first + r, at = step * all + first * count + r;
      if (!bf16) {
        float row[tile_steps(false, false)];
        pack_elements(m, step, count, row);
        float* to = reinterpret_cast<float*>(packed) + at;
        for (int64_t s = 0; s < count; ++s) to[s * rows] = row[s];
        continue;
      }
      // A pair: transposed, neighbouring rows; forward, the fields f and f + P / 2 of a word.
      uint16_t row[2 * tile_steps(false, true)];
      pack_elements(m, 2 * step, 2 * count, row);
      uint32_t* to = reinterpret_cast<uint32_t*>(packed) + at;
      const int64_t group = call.transposed ? 1 : unit / 2;
      for (int64_t g = 0; g < count; g += group) {
        const uint16_t* low = row + 2 * g;
        for (int64_t f = 0; f < group; ++f)
          to[(g + f) * rows] = uint32_t{low[f]} | uint32_t{low[group + f]} << 16;
      }
    }
  }

  bool packed_as_is() const {
    return call.batch == 1 && call.x.dtype == Dtype::float32 && call.x.col_stride == 1 &&
           !call.in_gain.data && padding == 0 && elements() == call.inputs();
  }

  // One row of a tile, outputs [n, n + count): factor, gains and bias, or the gradient of a gain.
  // `spare` has room for another row.
  void finish(int64_t m, int64_t n, int64_t count, float* sum, float* spare) const {
    const int64_t n_all = call.outputs();
    for (int64_t i = 0; i < count; ++i) sum[i] *= call.factor;
    if (call.gain_grad.data) {
      float* grad = call.gain_grad.data + bank_row(call.gain_grad, m) * n_all + n;
      read_row(call.other, m, n, count, spare);
      for (int64_t i = 0; i < count; ++i) grad[i] += spare[i] * sum[i];
    }
    if (!call.y.data) return;
    if (call.out_gain.data) {
      const float* gain = bank(call.out_gain, m, n_all) + n;
      for (int64_t i = 0; i < count; ++i) sum[i] *= gain[i];
    }
    if (call.bias.data) {
      const float* bias = bank(call.bias, m, n_all) + n;
      for (int64_t i = 0; i < count; ++i) sum[i] += bias[i];
    }
    write_row(call.y, m, n, count, sum);
  }

  // A tile but for its rows and place, in scratch of scratch_bytes(rows).
  Tile tile_in(char* scratch) const {
    return {.family = call.family,
            .key = call.key,
            .transposed = call.transposed,
            .bf16 = bf16,
            .reduction_word = uint32_t(reduction_first),
            .reduction_words = reduction_words,
            .block = block,
            .sums = reinterpret_cast<float*>(scratch + k.words_bytes + tile_bytes()),
            .scratch = scratch + k.words_bytes,
            .words = scratch};
  }
  int64_t scratch_bytes(int64_t rows) const {
    const int64_t floats = sums_floats(rows) + 2 * tile_outputs();
    return (k.words_bytes + tile_bytes() + 4 * floats + 63) / 64 * 64;
  }

  // Rows [m0, m0 + rows) of tile number `tile`; x is packed from m0 on.
  void run_tile(Tile& t, int64_t tile, int64_t m0, int64_t rows, const void* x) const {
    const auto word = uint32_t(output_first + tile * k.lanes);
    const bool neighbour = t.x == x && word == t.output_word + uint32_t(k.lanes);
    t.ready = neighbour ? std::min<int64_t>(kTileWords, reduction_words) : 0;
    t.output_word = word;
    t.batch = rows;
    t.x = x;
    float* sums = t.sums;
    float* row = sums + sums_floats(rows);
    k.run(t);
    const int64_t first = tile * tile_outputs() - head;  // output of lane 0, vector 0
    const int64_t begin = std::max<int64_t>(0, -first);
    const int64_t end = std::min(tile_outputs(), call.outputs() - first);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t first_row = m / block * block;
      const int64_t block_rows = std::min(block, rows - first_row);
      for (int64_t v = 0; v < vectors; ++v) {
        const float* from = sums + (v / kVectors) * rows * kVectors * k.lanes +
                            first_row * kVectors * k.lanes +
                            ((v % kVectors) * block_rows + m - first_row) * k.lanes;
        for (int64_t lane = 0; lane < k.lanes; ++lane) row[lane * vectors + v] = from[lane];
      }
      finish(m0 + m, first + begin, end - begin, row + begin, row + tile_outputs());
    }
  }
};

}  // namespace

void dense_product(const Dense& call, const Runtime& runtime) {
  if (call.batch == 0) return;
  const Launch launch(call, runtime);
  // Rows of x that are packed at a time: all, or as many whole blocks as the budget takes.
  const int64_t fit = std::max<int64_t>(1, kPackedBytes / launch.packed_row_bytes() / launch.block);
  const int64_t chunk = std::min(call.batch, fit * launch.block);
  // A task is a part of those rows times a tile, and smaller where tiles are too few to
  // keep threads busy; gains' gradients are summed over rows in order, so there it always is.
  int64_t part = call.gain_grad.data ? chunk : std::min(chunk, launch.part_rows());
  if (launch.tiles < kFewTiles && !call.gain_grad.data) {
    const int64_t blocks = (chunk + launch.block - 1) / launch.block;
    part = std::max<int64_t>(4, (blocks * launch.tiles + kFewTiles - 1) / kFewTiles) * launch.block;
    part = std::min({part, chunk, launch.part_rows()});
  }

  char* packed = static_cast<char*>(
      launch.packed_as_is() ? call.x.data
                            : runtime.allocate(runtime.self, launch.packed_row_bytes() * chunk));
  const int64_t scratch_bytes = launch.scratch_bytes(part);
  const int64_t tasks = launch.tiles * ((chunk + part - 1) / part);
  const int64_t tile_grain =
      grain(launch.elements() * launch.vectors * (6 + std::min(part, chunk)));
  char* scratch = static_cast<char*>(
      runtime.allocate(runtime.self, scratch_bytes * workers(runtime, tasks, tile_grain)));

  for (int64_t m0 = 0; m0 < call.batch; m0 += chunk) {
    const int64_t rows = std::min(chunk, call.batch - m0);
    const int64_t parts = (rows + part - 1) / part;
    const int64_t part_blocks = (part + launch.block - 1) / launch.block;
    if (!launch.packed_as_is()) {
      const int64_t runs = launch.runs(), cost = launch.run_steps() * launch.block;
      parallel_for(runtime, parts * part_blocks * runs, grain(cost), [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t p = task / runs / part_blocks * part;
          const int64_t all = std::min(part, rows - p);
          const int64_t first = task / runs % part_blocks * launch.block;
          if (first >= all) continue;
          launch.pack_run(task % runs, m0 + p, first, std::min(launch.block, all - first), all,
                          packed + p * launch.packed_row_bytes());
        }
      });
    }
    parallel_for(runtime, launch.tiles * parts, tile_grain,
                 [&](int64_t begin, int64_t end, int64_t worker) {
                   Tile tile = launch.tile_in(scratch + scratch_bytes * worker);
                   for (int64_t task = begin; task < end; ++task) {
                     const int64_t p = task % parts * part;
                     launch.run_tile(tile, task / parts, m0 + p, std::min(part, rows - p),
                                     packed + p * launch.packed_row_bytes());
                   }
                 });
  }
}

}  // namespace nmkern::cpu
