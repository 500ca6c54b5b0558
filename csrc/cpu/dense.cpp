// The launcher of the dense products: cuts a call into tiles, packs x, runs the tile kernels, finishes.
//
// x is packed once per chunk of rows: converted, multiplied by in_gain, zero-padded to whole words, and
// laid out in the order in which the kernels read it (Tile::x). Sums live in a few hundred bytes a row and
// thread (up to 10 KiB as digits, of at most 128 rows); scale, gains and bias are applied as they are written out.
// Invariant: an output, or a gain's gradient, is summed by one task in an order that the shape fixes.
#include "dense.h"

#include "by_digits.h"
#include "by_fields.h"
#include "by_parts.h"
#include "by_vectors.h"

namespace nmkern::cpu {
namespace {

constexpr int64_t kPackedBytes = 16 << 20;  // bounds the packed x, and so the scratch, of any call
constexpr int64_t kFewTiles = 8;

// Rows of x that are packed at a time: all, or as many whole blocks as the budget takes.
template <class Way>
int64_t chunk_rows(const Way& way) {
  const int64_t fit = std::max<int64_t>(1, kPackedBytes / way.packed_row_bytes() / way.block);
  return std::min(way.call.batch, fit * way.block);
}

// Rows of a task, which is that part of a chunk times a tile: smaller where tiles are too few to keep threads
// busy. Gains' gradients are summed over rows in order, so there it always is all of them.
template <class Way>
int64_t part_rows(const Way& way, int64_t chunk) {
  if (way.call.gain_grad.data) return chunk;
  const int64_t most = std::min(chunk, way.part_rows());
  if (way.tiles >= kFewTiles) return most;
  const int64_t blocks = blocks_of(blocks_of(chunk, way.block) * way.tiles, kFewTiles);
  return std::min(std::max<int64_t>(4, blocks) * way.block, most);
}

// Rows [m0, m0 + rows), in parts, to `packed`.
template <class Way>
void pack_chunk(Way& way, int64_t m0, int64_t rows, int64_t part, char* packed) {
  way.start_packing(m0, rows);
  const int64_t runs = blocks_of(way.steps(), way.run_steps());
  const int64_t part_blocks = blocks_of(part, way.block), tasks = blocks_of(rows, part) * part_blocks * runs;
  const auto part_at = [&](int64_t p) { return packed + p * way.packed_row_bytes(); };
  parallel_for(way.runtime, tasks, grain(way.run_steps() * way.block),
               [&](int64_t begin, int64_t end, int64_t) {
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t p = task / runs / part_blocks * part, all = std::min(part, rows - p);
                   const int64_t first = task / runs % part_blocks * way.block;
                   if (first >= all) continue;
                   way.pack(task % runs, m0 + p, first, std::min(way.block, all - first), all, part_at(p));
                 }
               });
  for (int64_t p = 0; p < rows; p += part) way.end_packing(m0 + p, std::min(part, rows - p), part_at(p));
}

template <class Way>
void multiply(Way way) {
  const Dense& call = way.call;
  const Runtime& runtime = way.runtime;
  const int64_t chunk = chunk_rows(way), part = part_rows(way, chunk);
  const bool as_is = way.packed_as_is();
  char* packed = static_cast<char*>(
      as_is ? call.x.data : runtime.allocate(runtime.self, way.packed_row_bytes() * way.padded(chunk)));
  const int64_t group = way.group_tiles(part), groups = blocks_of(way.tiles, group);
  const int64_t cost = grain(group * way.elements() * way.vectors * (6 + std::min(part, chunk)));
  const int64_t scratch_bytes = way.scratch_bytes(part);
  const int64_t threads = workers(runtime, groups * blocks_of(chunk, part), cost);
  char* scratch = static_cast<char*>(runtime.allocate(runtime.self, scratch_bytes * threads));

  for (int64_t m0 = 0; m0 < call.batch; m0 += chunk) {
    const int64_t rows = std::min(chunk, call.batch - m0), shares = blocks_of(rows, part);
    if (!as_is) pack_chunk(way, m0, rows, part, packed);
    parallel_for(runtime, groups * shares, cost, [&](int64_t begin, int64_t end, int64_t worker) {
      Tile tile = way.tile_in(scratch + scratch_bytes * worker);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t p = task % shares * part, first = task / shares * group;
        way.run_tiles(tile, first, std::min(group, way.tiles - first), m0 + p, std::min(part, rows - p), part,
                      packed + p * way.packed_row_bytes());
      }
    });
  }
}

}  // namespace

void dense_product(const Dense& call, const Runtime& runtime) {
  if (call.batch == 0) return;
  const bool* finite = nullptr;
  if (const int digits = ByDigits::digits_of(call)) {
    const ByDigits way(call, runtime, digits);
    multiply(way);
    finite = way.finite;
    if (!finite) return;
  } else if (ByFields::serves(call)) {
    const ByFields way(call, runtime);
    multiply(way);
    finite = way.finite;
    if (!finite) return;
  }
  const auto multiply_others = [&](auto way) {
    way.finite = finite;
    way.finishes_finite = false;
    multiply(way);
  };
  if (const int parts = ByParts::parts_of(call))
    multiply_others(ByParts(call, runtime, parts));
  else
    multiply_others(ByVectors(call, runtime));
}

}  // namespace nmkern::cpu
