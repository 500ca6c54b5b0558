// What the kernels of one instruction set offer to the launcher: a table of function pointers.
//
// A dense product is cut into tiles. The lanes of a vector are outputs; the reduction runs over
// scalars of x, which are broadcast. Forward, the outputs are rows of the matrix: lane i holds the
// patch (four rows) number i of the tile, and word r of the patch is vector r of the tile. Transposed,
// the outputs are columns: lane i holds word i of the tile, and field f of the word is vector f.
//
//   forward     4 vectors x lanes outputs, reduction step k = column       (natural order)
//   transposed  P vectors x lanes outputs, reduction step k = row          (natural order)
//
// Invariant: which tile an output falls in depends on the matrix only, and a tile is computed by one
// thread in a fixed order, so results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "../stream.h"

#if defined(__SANITIZE_ADDRESS__)  // inlined by force, instrumented code takes the compiler four times as long
#define NMKERN_INLINE inline
#define NMKERN_FLAT
#else
#define NMKERN_INLINE inline __attribute__((always_inline))
#define NMKERN_FLAT __attribute__((always_inline))  // of a lambda: its body stays in the caller's registers
#endif

namespace nmkern::cpu {

constexpr int kVectors = 4;  // vectors of outputs that a micro-kernel holds accumulators for

// Reduction steps that are decoded at a time when there are more rows of x than a micro-kernel takes:
// 128 steps of 4 AVX-512 vectors are 32 KiB, beside which L1 still holds the words and the run of x.
constexpr int tile_steps(bool transposed, bool bf16) { return transposed && bf16 ? 64 : 128; }

// Words of every lane that are at hand at a time.
constexpr int kTileWords = 32;

// A row of x as integers q times a scale:
//   sum_k x[k] * code[n, k] = scale * (2 * sum_k q[k] * field[n, k] - offset), normal: scale * sum_k q[k] * code[n, k]
struct FixedRow {
  double scale, offset;
};

struct Tile {
  Family family;
  Key key;
  bool transposed;
  bool bf16;                // x holds pairs of bfloat16
  uint32_t output_word;     // forward: c1 of lane 0; transposed: c0 of lane 0
  uint32_t reduction_word;  // forward: first c0; transposed: first c1
  int64_t reduction_words;
  int64_t batch;            // rows of x, M
  // Rows of x a micro-kernel takes: all, if they are at most 2 * Kernels::max_block; else tile_block.
  int64_t block;
  // [runs of tile_steps(...) reduction steps][blocks of rows][steps of the run][rows of the block]:
  // float, or a pair of bfloat16; zero where padded. A micro-kernel reads it from front to back.
  const void* x;
  // [chunks of kVectors vectors][blocks of rows][kVectors][rows of the block][lanes], overwritten.
  float* sums;
  void* scratch;  // scratch_bytes, 64-byte aligned
  // Kernels::words_bytes, 64-byte aligned, kept between the calls for neighbouring tiles, and how many of this
  // tile's first words the call before has put there (a MatrixUnit makes its own).
  void* words;
  int64_t ready;
  // For a MatrixUnit alone: parts of an element; whether sums are added to; memory for them of parts * batch
  // rows, needed where they are, where the parts of all rows fit one register, and for digits (int32).
  int parts;
  const FixedRow* fixed;  // [batch], where they are digits
  bool more;
  float* chain;
  // For Kernels::run_fields alone, what the sums of a run of field_run(family) steps start from:
  // [runs][batch], transposed [runs][vectors][batch].
  const float* offsets;
};

// kSparseRows rows of a sparse matrix from first_row on, seen through columns [col_offset, + cols).
struct SparseRows {
  Key key;
  uint32_t first_row, population, fan_in, col_offset, cols;
};

constexpr int kSparseRows = 64;  // rows that are drawn and gathered at a time
constexpr int kBatch = 16;       // rows of the batch that share a drawn column

// Drawn columns are laid out [kSparseRows / lanes][fan_in][lanes], relative to col_offset; one that lies
// outside of the view is `cols`, where x has a zero and y a slot that nobody reads.
struct SparseKernels {
  void (*draw)(const SparseRows& rows, uint32_t* columns);
  // y[kBatch][kSparseRows], `stride` floats from row to row, = factor * the sums, from x[cols + 1][kBatch]
  void (*gather)(const uint32_t* columns, int64_t fan_in, const float* x, float factor, float* y,
                 int64_t stride);
  // sums[kSparseRows] from x[cols + 1]
  void (*gather_one)(const uint32_t* columns, int64_t fan_in, const float* x, float* sums);
  // y[cols + 1][kBatch] += x[rows][kBatch], at most kSparseRows rows
  void (*scatter)(const uint32_t* columns, int64_t fan_in, int64_t rows, const float* x, float* y);
  // Between rows of the batch and lanes: [kBatch][kSparseRows] to [kSparseRows][kBatch], and back.
  void (*to_lanes)(const float* rows, float* lanes);
  void (*from_lanes)(const float* lanes, float* rows);
};

// See flynet_tile.h; hidden and products are [kSparseRows][kBatch], weights [kSparseRows][classes].
struct FlyKernels {
  int classes;  // that `logits` takes at most
  void (*hidden)(const uint32_t* columns, int64_t fan_in, const float* x, const float* mean,
                 float factor, float* hidden);
  void (*readout)(const float* hidden, const float* gain, const float* weights, int64_t units,
                  int64_t classes, float* sums);
  void (*logits)(const uint32_t* columns, int64_t fan_in, const float* x, const float* mean, float factor,
                 const float* gain, const float* weights, int64_t units, int64_t classes, float* sums);
  void (*products)(const uint32_t* columns, int64_t fan_in, const float* x, const float* mean, float factor,
                   const float* d_logits, const float* weights, int64_t classes, bool add, float* products);
};

// Multiplies blocks of up to kUnitRows rows by tiles of weights. A step of the reduction is a pair of bfloat16 or
// four bytes. A row of x is the sum of up to three rows of bfloat16, its parts: 8 bits each, 24 are a float32; or
// of up to four rows of integers, its digits in base 256. Tile::x is then
//   [runs of panel_steps(...) steps][blocks of rows][groups of kUnitSteps steps][parts][rows][steps]
// where every block has Tile::block rows, Tile::batch is a multiple of that, and all steps are of kUnitSteps.
struct MatrixUnit {
  void (*run)(const Tile& tile);
  // row[2 * steps] times `scale` as a row of a block of `rows`: step s is a pair, elements f and f + group of
  // the (2 * group) that begin with s / group * 2 * group, f = s % group. Returns kNonzero if any is not zero
  // and kLarge if any is kTiny or larger, or a NaN: the smallest bfloat16 count as zero in the unit.
  uint8_t (*pack)(const float* row, int64_t steps, int group, int parts, float scale, uint32_t* to,
                  int64_t rows);
  // The largest magnitude of a row, as bits: infinity and NaN are the largest.
  uint32_t (*largest)(const float* row, int64_t count);
  // row[digit_elements * steps] times 2^exponent, rounded to integers, as a row of a block of `rows`; their sum.
  int64_t (*pack_digits)(const float* row, int64_t steps, Family family, bool transposed, int digits, int exponent,
                         uint32_t* to, int64_t rows);
  // row[lane * vectors + v] = factor * sums[v][lane], for a row of a block of sums: vector v is at
  // v / kVectors * chunk_stride + v % kVectors * vector_stride.
  void (*untile)(const float* sums, int64_t chunk_stride, int64_t vector_stride, int64_t vectors,
                 float factor, float* row);
};

constexpr int kUnitRows = 16;   // of x in a tile register
constexpr int kUnitSteps = 16;  // steps in one
// Elements of the reduction in a step of integers: a byte each, or two.
constexpr int digit_elements(Family family) { return family == Family::normal ? 2 : 4; }
// Steps whose weights are made at a time; `elements` of the reduction a step.
constexpr int panel_steps(bool transposed, int elements) {
  return transposed ? kTileWords * kRowsPerPatch / elements : 64;
}
constexpr float kTiny = 0x1p-64f;
constexpr uint8_t kNonzero = 1, kLarge = 2;

struct Kernels {
  const char* name;
  int lanes;
  int max_block;  // rows of x for which a micro-kernel has registers beside four vectors of weights
  int tile_block;  // rows of x that are multiplied by a decoded tile at a time
  int fused_block;  // rows of x up to which no tile is decoded, so that Tile::scratch is not used
  bool bf16;        // has bfloat16 dot products
  int64_t scratch_bytes;
  int64_t words_bytes;
  void (*run)(const Tile& tile);
  // The weights of a forward tile as floats: [reduction_words * P][kVectors][lanes].
  void (*decode)(const Tile& tile, float* weights);
  SparseKernels sparse;
  FlyKernels fly;
  const MatrixUnit* matrix_unit = nullptr;  // for dense products, where there is one
  // As run, for at most 2 * max_block rows of x as by_fields.h packs it; where subnormal numbers cost no time.
  void (*run_fields)(const Tile& tile) = nullptr;
};

// The kernels in use: the best that this build and this CPU have, or those set by name.
const Kernels& kernels();
bool set_kernels(const char* name);  // false where there are none of that name

// One per instruction set; nullptr where the build has none.
const Kernels* amx_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* avx512_kernels();
const Kernels* avx2_subnormal_kernels();
const Kernels* avx2_kernels();
const Kernels* neon_kernels();
const Kernels* portable_kernels();

const MatrixUnit* amx_unit();
bool amx_usable();  // by this CPU, and granted by the operating system

}  // namespace nmkern::cpu
