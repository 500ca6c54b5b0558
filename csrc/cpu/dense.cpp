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
// On a matrix unit a row costs a sixteenth of that, and x comes from L2 or nothing keeps up: so many rows and
// so much of the reduction at a time that x takes 1 MiB, for as many tiles as half of that holds the sums of.
constexpr int64_t kUnitPartRows = 128;
constexpr int64_t kUnitBlockBytes = 1 << 20, kUnitSumsBytes = 1 << 19;
constexpr int64_t kUnitChain = 8192;  // elements that are summed in one chain, see add_sums in tile.h

struct Launch {
  const Dense& call;
  const Runtime& runtime;
  const Kernels& k;
  int parts;  // of an element of x where a matrix unit multiplies; 0 elsewhere
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
  // What MatrixUnit::pack says of the packed rows, of which the first is packed_from.
  uint8_t* sizes = nullptr;
  int64_t packed_from = 0;

  Launch(const Dense& c, const Runtime& r)
      : call(c),
        runtime(r),
        k(kernels()),
        parts(k.matrix_unit ? parts_of(c) : 0),
        // x * in_gain is no bfloat16: rounding it to one would be a rounding that the exact result does
        // not make, so gains on the input take the float32 kernels (up to twice the time at large M).
        bf16(!parts && k.bf16 && c.x.dtype == Dtype::bfloat16 && !c.in_gain.data) {
    const int64_t columns = columns_per_word(c.family);
    unit = c.transposed ? kRowsPerPatch : columns;
    vectors = c.transposed ? columns : kRowsPerPatch;
    const int64_t in = c.transposed ? c.row_offset : c.col_offset;
    const int64_t out = c.transposed ? c.col_offset : c.row_offset;
    reduction_first = in / unit;
    padding = in % unit;
    reduction_words = (in + c.inputs() - 1) / unit - reduction_first + 1;
    if (parts) reduction_words = round_up(reduction_words, std::max<int64_t>(1, 2 * kUnitSteps / unit));
    output_first = out / vectors;
    head = out % vectors;
    tiles = (head + c.outputs() + tile_outputs() - 1) / tile_outputs();
    if (parts)
      block = blocks_of(c.batch, blocks_of(c.batch, kUnitRows));  // all much the same, none empty
    else
      block = c.batch <= 2 * k.max_block ? c.batch : k.tile_block;
  }

  static int parts_of(const Dense& c) {
    // One row of float32, 8192 x 8192 on 2 threads, on the unit and fused: uniform 2.4 and 1.9 ms
    // (transposed 2.3 and 1.9), rademacher 1.1 and 1.7 (1.8 and 1.8). Two rows of uniform: 2.0 and 2.4.
    const bool floats = c.x.dtype == Dtype::float32 || c.in_gain.data;
    if (floats && c.batch == 1 && !(c.family == Family::rademacher && !c.transposed)) return 0;
    if (floats) return 3;
    return c.x.dtype == Dtype::float16 ? 2 : 1;
  }
  static int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }
  static int64_t round_up(int64_t n, int64_t multiple) { return blocks_of(n, multiple) * multiple; }

  int64_t tile_outputs() const { return vectors * k.lanes; }
  int64_t elements() const { return reduction_words * unit; }  // of a packed row
  int64_t steps() const { return elements() / (bf16 || parts ? 2 : 1); }
  int64_t packed_row_bytes() const { return steps() * 4 * std::max(parts, 1); }
  // A matrix unit takes whole blocks of rows.
  int64_t padded(int64_t rows) const { return parts ? round_up(rows, block) : rows; }
  int64_t part_rows() const {
    return std::max<int64_t>(1, (parts ? kUnitPartRows : kPartRows) / block) * block;
  }
  // Words of the reduction that are gone through with one tile after the other.
  int64_t block_words(int64_t rows) const {
    if (!parts) return reduction_words;
    const int64_t fit = kUnitBlockBytes / (padded(rows) * parts * unit * 2);
    return std::max<int64_t>(1, std::min(fit, kUnitChain / unit) / kTileWords) * kTileWords;
  }
  bool stacked() const { return call.batch == block && parts > 1 && parts * block <= kUnitRows; }
  bool chained(int64_t rows) const { return block_words(rows) < reduction_words || stacked(); }
  // Tiles that share a block of the reduction while it is in L2.
  int64_t group_tiles(int64_t rows) const {
    if (block_words(rows) >= reduction_words) return 1;
    const int64_t shares = (call.batch + rows - 1) / rows;
    const int64_t fit = kUnitSumsBytes / 4 / sums_floats(padded(rows));
    return std::clamp<int64_t>(tiles * shares / (4 * runtime.threads), 1, std::max<int64_t>(1, fit));
  }
  int64_t tile_bytes() const { return !parts && call.batch <= k.fused_block ? 0 : k.scratch_bytes; }
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
  int64_t run_steps() const { return parts ? kPanelSteps : tile_steps(call.transposed, bf16); }

  // Run number `run` of row m in parts, times `scale`, to a place in a block.
  uint8_t pack_parts(int64_t run, int64_t m, float scale, uint32_t* to) const {
    const int64_t step = run * run_steps(), count = std::min(run_steps(), steps() - step);
    float row[2 * kPanelSteps];
    pack_elements(m, 2 * step, 2 * count, row);
    return k.matrix_unit->pack(row, count, call.transposed ? 1 : int(unit / 2), parts, scale, to, block);
  }
  uint32_t* parts_at(int64_t run, int64_t row, int64_t all, char* packed) const {
    const int64_t step = run * run_steps(), count = std::min(run_steps(), steps() - step);
    const int64_t first = row / block * block;
    return reinterpret_cast<uint32_t*>(packed) + (step * all + first * count) * parts +
           (row - first) * kUnitSteps;
  }
  void pack_block(int64_t run, int64_t m0, int64_t first, int64_t rows, int64_t all, char* packed) const {
    const int64_t count = std::min(run_steps(), steps() - run * run_steps());
    for (int64_t r = 0; r < block; ++r) {
      const int64_t m = m0 + first + r;
      uint32_t* to = parts_at(run, first + r, all, packed);
      if (r >= rows) {
        for (int64_t i = 0; i < count / kUnitSteps * parts; ++i)
          std::fill_n(to + i * block * kUnitSteps, kUnitSteps, 0);
      } else {  // other threads pack other runs of the row
        __atomic_fetch_or(&sizes[m - packed_from], pack_parts(run, m, 1, to), __ATOMIC_RELAXED);
      }
    }
  }
  bool tiny(int64_t m) const { return parts && sizes[m - packed_from] == kNonzero; }
  // Rows that are tiny throughout lose their last parts: again, larger.
  void pack_tiny(int64_t m0, int64_t rows, int64_t all, char* packed) const {
    for (int64_t r = 0; r < rows; ++r) {
      if (!tiny(m0 + r)) continue;
      for (int64_t run = 0; run < runs(); ++run)
        pack_parts(run, m0 + r, 1 / kTiny, parts_at(run, r, all, packed));
    }
  }

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
    return !parts && call.batch == 1 && call.x.dtype == Dtype::float32 && call.x.col_stride == 1 &&
           !call.in_gain.data && padding == 0 && elements() == call.inputs();
  }

  // As MatrixUnit::untile.
  void untile(const float* sums, int64_t chunk_stride, int64_t vector_stride, float* row) const {
    for (int64_t v = 0; v < vectors; ++v) {
      const float* from = sums + v / kVectors * chunk_stride + v % kVectors * vector_stride;
      for (int64_t lane = 0; lane < k.lanes; ++lane) row[lane * vectors + v] = from[lane];
    }
    for (int64_t i = 0; i < tile_outputs(); ++i) row[i] *= call.factor;
  }

  // One row of a tile, outputs [n, n + count), times the factor: gains and bias, or the gradient of a gain.
  // `spare` has room for another row.
  void finish(int64_t m, int64_t n, int64_t count, float* sum, float* spare) const {
    const int64_t n_all = call.outputs();
    if (tiny(m)) {
      for (int64_t i = 0; i < count; ++i) sum[i] *= kTiny;
    }
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
            .words = scratch,
            .parts = parts};
  }
  int64_t scratch_bytes(int64_t rows) const {
    const int64_t all = padded(rows), chain = chained(rows) ? (stacked() ? parts : 1) * sums_floats(all) : 0;
    const int64_t floats = group_tiles(rows) * sums_floats(all) + 2 * tile_outputs() + chain;
    return (k.words_bytes + tile_bytes() + 4 * floats + 63) / 64 * 64;
  }

  // Rows [m0, m0 + rows) of tiles [first, first + count); x is packed from m0 on.
  void run_tiles(Tile& t, int64_t first, int64_t count, int64_t m0, int64_t rows, int64_t part,
                 const char* x) const {
    const int64_t words = block_words(part), all = padded(rows), tile_sums = sums_floats(all);
    float* sums = t.sums;
    float* row = sums + group_tiles(part) * sums_floats(padded(part));
    t.batch = all;
    if (chained(part)) t.chain = row + 2 * tile_outputs();
    for (int64_t begin = 0; begin < reduction_words; begin += words) {
      t.reduction_word = uint32_t(reduction_first + begin);
      t.reduction_words = std::min(words, reduction_words - begin);
      t.more = begin > 0;
      for (int64_t tile = 0; tile < count; ++tile) {
        const auto word = uint32_t(output_first + (first + tile) * k.lanes);
        const bool neighbour = t.x == x && word == t.output_word + uint32_t(k.lanes);
        t.ready = neighbour ? std::min<int64_t>(kTileWords, reduction_words) : 0;
        t.output_word = word;
        t.x = x;
        t.sums = sums + tile * tile_sums;
        if (parts)
          k.matrix_unit->run(t);
        else
          k.run(t);
      }
      x += words * unit * 2 * parts * all;
    }
    t.sums = sums;
    for (int64_t tile = 0; tile < count; ++tile)
      write_tile(first + tile, m0, rows, sums + tile * tile_sums, row);
  }

  // `row` has room for two rows of a tile.
  void write_tile(int64_t tile, int64_t m0, int64_t rows, const float* sums, float* row) const {
    const int64_t first = tile * tile_outputs() - head;  // output of lane 0, vector 0
    const int64_t begin = std::max<int64_t>(0, -first);
    const int64_t end = std::min(tile_outputs(), call.outputs() - first), all = padded(rows);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t first_row = m / block * block;
      const int64_t block_rows = std::min(block, all - first_row);
      const float* from = sums + (first_row * kVectors + m - first_row) * k.lanes;
      const int64_t chunk_stride = all * kVectors * k.lanes, vector_stride = block_rows * k.lanes;
      if (parts)
        k.matrix_unit->untile(from, chunk_stride, vector_stride, vectors, call.factor, row);
      else
        untile(from, chunk_stride, vector_stride, row);
      finish(m0 + m, first + begin, end - begin, row + begin, row + tile_outputs());
    }
  }
};

}  // namespace

void dense_product(const Dense& call, const Runtime& runtime) {
  if (call.batch == 0) return;
  Launch launch(call, runtime);
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
      launch.packed_as_is()
          ? call.x.data
          : runtime.allocate(runtime.self, launch.packed_row_bytes() * launch.padded(chunk)));
  const int64_t scratch_bytes = launch.scratch_bytes(part);
  const int64_t group = launch.group_tiles(part), groups = (launch.tiles + group - 1) / group;
  const int64_t tasks = groups * ((chunk + part - 1) / part);
  const int64_t tile_grain = grain(group * launch.elements() * launch.vectors * (6 + std::min(part, chunk)));
  char* scratch = static_cast<char*>(
      runtime.allocate(runtime.self, scratch_bytes * workers(runtime, tasks, tile_grain)));

  if (launch.parts) launch.sizes = static_cast<uint8_t*>(runtime.allocate(runtime.self, chunk));

  for (int64_t m0 = 0; m0 < call.batch; m0 += chunk) {
    const int64_t rows = std::min(chunk, call.batch - m0);
    launch.packed_from = m0;
    if (launch.parts) std::fill_n(launch.sizes, rows, 0);
    const int64_t shares = (rows + part - 1) / part;  // of the rows
    const int64_t part_blocks = (part + launch.block - 1) / launch.block;
    if (!launch.packed_as_is()) {
      const int64_t runs = launch.runs(), cost = launch.run_steps() * launch.block;
      parallel_for(runtime, shares * part_blocks * runs, grain(cost),
                   [&](int64_t begin, int64_t end, int64_t) {
                     for (int64_t task = begin; task < end; ++task) {
                       const int64_t p = task / runs / part_blocks * part;
                       const int64_t all = std::min(part, rows - p);
                       const int64_t first = task / runs % part_blocks * launch.block;
                       if (first >= all) continue;
                       const int64_t block_rows = std::min(launch.block, all - first);
                       char* to = packed + p * launch.packed_row_bytes();
                       if (launch.parts)
                         launch.pack_block(task % runs, m0 + p, first, block_rows, launch.padded(all), to);
                       else
                         launch.pack_run(task % runs, m0 + p, first, block_rows, all, to);
                     }
                   });
    }
    if (launch.parts) {
      for (int64_t p = 0; p < rows; p += part) {
        const int64_t all = std::min(part, rows - p);
        launch.pack_tiny(m0 + p, all, launch.padded(all), packed + p * launch.packed_row_bytes());
      }
    }
    parallel_for(runtime, groups * shares, tile_grain, [&](int64_t begin, int64_t end, int64_t worker) {
      Tile tile = launch.tile_in(scratch + scratch_bytes * worker);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t p = task % shares * part, first = task / shares * group;
        launch.run_tiles(tile, first, std::min(group, launch.tiles - first), m0 + p, std::min(part, rows - p),
                         part, packed + p * launch.packed_row_bytes());
      }
    });
  }
}

}  // namespace nmkern::cpu
