// From a call of the fused FlyNet to its launches and their scratch, and whether there is room for it.
//
// Invariant: it follows from shapes and constants, never from the device, so that every GPU takes the same
// sums in the same order.
#pragma once

#include "flynet.h"
#include "sparse_plan.h"

namespace nmkern::cuda {

using FlyTile = Tile<16>;

constexpr int kTilePatches = 3;  // of 4 classes
constexpr int kTileClasses = kTilePatches * kRowsPerPatch;
constexpr int kFlyRows = FlyTile::kRows, kFlyUnits = FlyTile::kUnits;
static_assert(kFlyUnits == kTileThreads && kFlyRows == kTileWarps, "a thread owns a unit, a warp a row");
constexpr int kPatchSums = kRowsPerPatch * kFlyRows;  // of a warp
constexpr int kFlyParts = kTileThreads / FlyTile::kChunks;
constexpr int kPartPitch = kFlyParts + 2;  // floats: chunks are 8 banks apart
constexpr int kProductPitch = kFlyUnits + 4;

struct Network {
  TileSource source;
  uint32_t fan_in;
  const uint32_t* columns;  // [fan_in][columns_stride], FlyTile offsets
  int64_t columns_stride;
  const uint32_t* counts;  // [inputs]
  float encoder_factor;
  int64_t hidden;

  Family family;
  Key key;               // of the decoder
  uint32_t class_patch;  // the patch of the first class, and how many of its rows lie before the class
  int32_t class_skip;
  int64_t patches, classes;
  int64_t decoder_col;
  float decoder_factor;
  const int64_t* context;
};

// Shared memory behind the tile; reused areas say for what.
struct FlyShared {
  alignas(16) float codes[kTileClasses][kFlyUnits];
  union {
    float parts[kFlyRows][kPartPitch];                             // of the means
    alignas(16) float sums[kTilePatches][kTileWarps][kPatchSums];  // of the logits
  };
  alignas(16) float d[kTileClasses][kFlyRows];  // gradients of the logits
  float mean[kFlyRows];
  int64_t row[kFlyRows];  // of the bank, -1 beyond the batch
  float counts[1];        // [inputs]: it is the last
};

// The tile is where products go too, once it has been read.
NMKERN_HD constexpr int64_t fly_tile_bytes(int64_t inputs) {
  const int64_t products = int64_t{kFlyRows} * kProductPitch * 4, tile = FlyTile::bytes(inputs);
  return whole(tile > products ? tile : products, 16);
}
NMKERN_HD constexpr int64_t fly_shared_bytes(int64_t inputs) {
  return fly_tile_bytes(inputs) + int64_t{sizeof(FlyShared)} + inputs * 4;
}

struct Logits {
  Network net;
  Bank gain;
  int64_t groups, block_groups;  // of kFlyUnits units: all, and those that a block (a split) takes in order
  float* partial;                // [splits][M][patches * 4]
};

struct FinishLogits {
  const float* partial;
  int64_t splits, stride, skip, batch, classes;
  float factor;
  Matrix y;
};

struct GainGrad {
  Network net;
  Matrix d_logits;
  int64_t row_groups, split_groups;  // of kFlyRows rows: all, and those that a block takes in order
  bool each;                         // a row of the result for every row of the batch
  int64_t rows;                      // of the result
  float* result;  // [splits][rows][hidden]; with several rows and not `each`, zeros that are added to
};

struct FinishGainGrad {
  const float* partial;
  int64_t splits, values;  // values: of the result
  float* gain_grad;
};

struct FlyPlan {
  Drawing drawing;
  Network network;
  int64_t row_groups, unit_groups;
  int64_t shared_bytes;
  int64_t splits;        // forward of the units, backward of the rows
  int64_t block_groups;  // of units (forward) or rows (backward), that a block takes
  bool each;
  int64_t columns_bytes, counts_bytes, partial_bytes;
  int64_t scratch_bytes() const { return columns_bytes + counts_bytes + partial_bytes; }

  // Places of the parts of the scratch, each 16-byte aligned; the partial sums'.
  float* place(void* scratch) {
    auto* at = static_cast<unsigned char*>(scratch);
    drawing.columns = reinterpret_cast<uint32_t*>(at);
    drawing.counts = reinterpret_cast<uint32_t*>(at + columns_bytes);
    network.columns = drawing.columns;
    network.counts = drawing.counts;
    return reinterpret_cast<float*>(at + columns_bytes + counts_bytes);
  }
  int64_t draw_blocks() const { return (drawing.stride + kDrawThreads - 1) / kDrawThreads; }
};

inline bool is_backward(const FlyNet& net) { return net.gain_grad.rows > 0; }

// `aim`: blocks of a launch that the splits aim at; tests take fewer.
inline FlyPlan plan_of(const FlyNet& net, int64_t aim = kSparseBlocks) {
  const auto blocks = [](int64_t count, int64_t unit) { return (count + unit - 1) / unit; };
  FlyPlan plan{};
  plan.row_groups = blocks(net.batch, kFlyRows);
  plan.unit_groups = blocks(net.hidden, kFlyUnits);
  plan.shared_bytes = fly_shared_bytes(net.inputs);

  Drawing& d = plan.drawing;
  d.draws = {net.encoder_key,      uint32_t(net.encoder_row), uint32_t(net.population),
             uint32_t(net.fan_in), uint32_t(net.encoder_col), uint32_t(net.inputs)};
  d.rows = net.hidden;
  d.stride = plan.unit_groups * kFlyUnits;
  plan.columns_bytes = net.fan_in * d.stride * 4;
  plan.counts_bytes = whole(net.inputs * 4, 16);

  Network& n = plan.network;
  n.source = {net.x, takes_four(net.x), net.batch, net.inputs};
  n.fan_in = uint32_t(net.fan_in);
  n.columns_stride = d.stride;
  n.encoder_factor = net.encoder_factor;
  n.hidden = net.hidden;
  n.family = net.family;
  n.key = net.decoder_key;
  n.class_patch = uint32_t(net.decoder_row / kRowsPerPatch);
  n.class_skip = int32_t(net.decoder_row % kRowsPerPatch);
  n.patches = blocks(n.class_skip + net.classes, kRowsPerPatch);
  n.classes = net.classes;
  n.decoder_col = net.decoder_col;
  n.decoder_factor = net.decoder_factor;
  n.context = net.context;

  // As many splits as make a block for each multiprocessor and have room.
  const bool backward = is_backward(net);
  plan.each = backward && net.gain_grad.rows > 1 && !net.context;
  const int64_t all = backward ? plan.row_groups : plan.unit_groups;
  const int64_t others = std::max<int64_t>(1, backward ? plan.unit_groups : plan.row_groups);
  const int64_t split_bytes =
      (backward ? net.gain_grad.rows * net.hidden : net.batch * n.patches * kRowsPerPatch) * 4;
  const int64_t left = kSparseScratch - plan.columns_bytes - plan.counts_bytes;
  const int64_t wanted = std::max<int64_t>(
      1, std::min({all, aim / others, plan.each ? all : left / std::max<int64_t>(1, split_bytes)}));
  plan.block_groups = std::max<int64_t>(1, blocks(all, wanted));
  plan.splits = blocks(all, plan.block_groups);
  // One split needs no partial sums backward, where nothing is left to do with them.
  plan.partial_bytes = plan.each || (backward && plan.splits == 1) ? 0 : plan.splits * split_bytes;
  return plan;
}

inline Logits logits_of(const FlyNet& net, const FlyPlan& plan, float* partial) {
  return {plan.network, net.gain, plan.unit_groups, plan.block_groups, partial};
}

inline FinishLogits finish_of(const FlyNet& net, const Logits& logits, int64_t splits) {
  const Network& n = logits.net;
  return {logits.partial, splits,      n.patches * kRowsPerPatch, n.class_skip,
          net.batch,      net.classes, n.decoder_factor,          net.logits};
}

inline GainGrad gain_grad_of(const FlyNet& net, const FlyPlan& plan, float* partial) {
  return {plan.network,
          net.logits,
          plan.row_groups,
          plan.block_groups,
          plan.each,
          net.gain_grad.rows,
          plan.partial_bytes ? partial : net.gain_grad.data};
}

// flynet_scratch of flynet.h.
inline int64_t scratch_of(const FlyNet& net, int64_t shared_bytes, int64_t aim = kSparseBlocks) {
  // Before a product of sizes passes 2^63.
  if (std::max({net.fan_in, net.hidden, net.inputs}) > kSparseScratch) return -1;
  const FlyPlan plan = plan_of(net, aim);
  return plan.shared_bytes <= shared_bytes && plan.scratch_bytes() <= kSparseScratch ? plan.scratch_bytes()
                                                                                     : -1;
}

}  // namespace nmkern::cuda
