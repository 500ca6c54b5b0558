// How often the reduction of a dense product is split, so that all of a GPU has work: what takes the fewest
// clocks of an H100, by a model of them.
//
//   clocks(s) = rounds(s) * (step_clocks * steps / s + block_clocks) + s * split_bytes / kBytesPerClock
//
// A round is what all multiprocessors can take at once. Splits fill the last round; each writes sums that
// finish.h reads again.
// Invariant: as in pack_plan.h, it follows from shapes and constants, never from the device: the splits are
// the order of the sums.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../stream.h"

namespace nmkern::cuda {

constexpr int64_t kMultiprocessors = 132;
// Of the cache behind all multiprocessors, 4 TB/s, by assumption.
constexpr int64_t kBytesPerClock = 2300;
constexpr int64_t kMostRounds = 4;  // beyond, the last one weighs little

// Instructions of generating four weights, in a lane: the resource table's, rounded.
constexpr int64_t generating(Family family) {
  return family == Family::rademacher ? 6 : family == Family::uniform ? 9 : 17;
}

// The same as bytes (see fixed.cu).
constexpr int64_t generating_bytes(Family family) { return family == Family::rademacher ? 3 : 5; }

struct Reduction {
  int64_t steps;
  int64_t blocks, round_blocks;  // of one split; that are at work at once
  int64_t step_clocks, block_clocks;
  int64_t split_bytes;               // written and read again
  bool direct;                       // whether one split writes the result, and no sums
  int64_t least_steps, most_splits;  // what is worth a block, and what there is room for
};

inline int64_t splits_of(const Reduction& r) {
  const int64_t most = std::max<int64_t>(1, std::min(r.steps / r.least_steps, r.most_splits));
  int64_t best = 1, least = std::numeric_limits<int64_t>::max();
  for (int64_t rounds = 1; rounds <= kMostRounds; ++rounds) {
    const int64_t s = std::clamp<int64_t>(rounds * r.round_blocks / r.blocks, 1, most);
    const int64_t taken = (r.blocks * s + r.round_blocks - 1) / r.round_blocks;
    const int64_t written = s == 1 && r.direct ? 0 : s * r.split_bytes / kBytesPerClock;
    const int64_t clocks = taken * ((r.steps + s - 1) / s * r.step_clocks + r.block_clocks) + written;
    if (clocks < least) best = s, least = clocks;
  }
  return best;
}

}  // namespace nmkern::cuda
