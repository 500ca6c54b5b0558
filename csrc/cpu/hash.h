// Philox4x32-7 over vector lanes, for counters of which one word runs over lanes and one over a loop.
//
//   RowHasher(key, tag, c1)     lanes hold c1, c1 + 1, ...   call(c0): word r of every lane's patch
//   ColumnHasher(key, tag, c0)  lanes hold c0, c0 + 1, ...   call(c1)
//
// On x86 even and odd lanes are hashed apart as 64-bit products, whose halves need no shuffle: 4 multiplies,
// 4 shifts and 4 three-way xors a round; S::hash_vectors is 2. Where it is 1, a V holds all lanes. In rounds
// 1 to 3 half of the state depends on the lane alone or on the loop alone; that half is computed once per tile
// or as scalars, which leaves 18 of the 28 vector multiplies.
#pragma once

#include "unroll.h"

namespace nmkern::cpu {
namespace {

struct Product {
  uint32_t high, low;
  Product(uint32_t a, uint32_t b)
      : high(uint32_t((uint64_t{a} * b) >> 32)), low(uint32_t(uint64_t{a} * b)) {}
};

// The key of a round, computed where it is used (two adds beside vector work), or from memory, whence vector
// instructions broadcast it themselves. On Intel computed words go to vectors through the port of the
// shuffles: uniform, forward, 60 clocks a word of 16 vectors of weights and from memory 55; on Zen 4 memory
// loses 5 %.
struct ComputedKeys {
  const Key key;
  uint32_t k0(int round) const { return key.k0 + uint32_t(round) * kWeyl0; }
  uint32_t k1(int round) const { return key.k1 + uint32_t(round) * kWeyl1; }
};
class StoredKeys {
  uint32_t k0_[kRounds], k1_[kRounds];

 public:
  explicit StoredKeys(Key key) {
    for (int round = 0; round < kRounds; ++round) {
      k0_[round] = ComputedKeys{key}.k0(round);
      k1_[round] = ComputedKeys{key}.k1(round);
    }
  }
  uint32_t k0(int round) const { return k0_[round]; }
  uint32_t k1(int round) const { return k1_[round]; }
};

// A call in kStages pieces of much the same work, so that a loop can put its own work between them.
constexpr int kStages = 5;

template <class S>
struct Rounds {
  using V = typename S::V;  // products, of which the low words count: 64-bit lanes whose high halves are noise
  static constexpr int kHalves = S::hash_vectors;

  V c0[kHalves], c1[kHalves], c2[kHalves], c3[kHalves];

  // Stage 0 is the hasher's `begin`, rounds 1 to 3; stages 1 to 3 are a round each.
  template <class Keys>
  NMKERN_INLINE void round(const Keys& keys, int stage) {
    const V k0 = S::set1(keys.k0(stage + 2)), k1 = S::set1(keys.k1(stage + 2));
    for (int h = 0; h < kHalves; ++h) {
      const V p0 = S::multiply(c0[h], kMultiplier0);
      const V p1 = S::multiply(c2[h], kMultiplier1);
      c0[h] = S::xor3(S::high(p1), c1[h], k0);
      c1[h] = p1;
      c2[h] = S::xor3(S::high(p0), c3[h], k1);
      c3[h] = p0;
    }
  }
  // The last stage: even and odd lanes are merged as halves of products, which takes 6 shuffles and 2 xors
  // where merging the words of a whole round takes 8 and 4.
  template <class Keys>
  NMKERN_INLINE void finish(const Keys& keys, typename S::U (&word)[4]) const {
    V p0[kHalves], p1[kHalves];
    for (int h = 0; h < kHalves; ++h) {
      p0[h] = S::multiply(c0[h], kMultiplier0);
      p1[h] = S::multiply(c2[h], kMultiplier1);
    }
    word[0] = S::xor_words(S::merge_high(p1), S::merge(c1), S::set_words(keys.k0(kRounds - 1)));
    word[1] = S::merge(p1);
    word[2] = S::xor_words(S::merge_high(p0), S::merge(c3), S::set_words(keys.k1(kRounds - 1)));
    word[3] = S::merge(p0);
  }
};
static_assert(kRounds == 7);

// Stages [From, To) of the call at `counter`; the last one writes its words.
template <int From, int To, class Hasher, class S>
NMKERN_INLINE void hash_stages(const Hasher& hash, uint32_t counter, Rounds<S>& state,
                               typename S::U (&word)[4]) {
  unroll<To - From>([&](auto i) NMKERN_FLAT {
    constexpr int kStage = From + i;
    if constexpr (kStage == 0) hash.begin(counter, state);
    else if constexpr (kStage == kStages - 1)
      state.finish(hash.keys, word);
    else
      state.round(hash.keys, kStage);
  });
}

template <class S, class Keys = ComputedKeys>
class RowHasher {
  using V = typename S::V;
  uint32_t tag_;
  V high_[S::hash_vectors], low_[S::hash_vectors];  // of round 2's first product, which depends on c1 alone

 public:
  const Keys keys;

  RowHasher(Key k, uint32_t tag, uint32_t c1) : tag_(tag), keys{k} {
    for (int h = 0; h < S::hash_vectors; ++h) {
      const V p = S::multiply(S::xor2(S::lanes_from(c1, h), S::set1(keys.k0(0))), kMultiplier0);
      high_[h] = S::high(p);
      low_[h] = p;
    }
  }

  NMKERN_INLINE void begin(uint32_t c0, Rounds<S>& state) const {
    const Product r1(kMultiplier0, c0);
    const Product r2(kMultiplier1, r1.high ^ tag_ ^ keys.k1(0));
    const Product r3(kMultiplier0, r2.high ^ keys.k0(1));
    const V mix = S::set1(r1.low ^ keys.k1(1));
    const V k0 = S::set1(r2.low ^ keys.k0(2));
    const V k1 = S::set1(r3.high ^ keys.k1(2));
    for (int h = 0; h < S::hash_vectors; ++h) {
      const V p = S::multiply(S::xor2(high_[h], mix), kMultiplier1);
      state.c0[h] = S::xor2(S::high(p), k0);
      state.c1[h] = p;
      state.c2[h] = S::xor2(low_[h], k1);
      state.c3[h] = S::set1(r3.low);
    }
  }
  NMKERN_INLINE void operator()(uint32_t counter, typename S::U (&word)[4]) const {
    Rounds<S> state;
    hash_stages<0, kStages>(*this, counter, state, word);
  }
};

template <class S, class Keys = ComputedKeys>
class ColumnHasher {
  using V = typename S::V;
  using Vs = V[S::hash_vectors];
  Vs low1_;          // of round 1's first product
  Vs low2_;          // of round 2's second product
  Vs high3_, low3_;  // of round 3's first product; all depend on c0 alone

 public:
  const Keys keys;

  ColumnHasher(Key k, uint32_t tag, uint32_t c0) : keys{k} {
    for (int h = 0; h < S::hash_vectors; ++h) {
      const V p = S::multiply(S::lanes_from(c0, h), kMultiplier0);
      const V q = S::multiply(S::xor2(S::high(p), S::set1(tag ^ keys.k1(0))), kMultiplier1);
      const V r = S::multiply(S::xor2(S::high(q), S::set1(keys.k0(1))), kMultiplier0);
      low1_[h] = p;
      low2_[h] = q;
      high3_[h] = S::high(r);
      low3_[h] = r;
    }
  }

  NMKERN_INLINE void begin(uint32_t c1, Rounds<S>& state) const {
    const Product r2(kMultiplier0, c1 ^ keys.k0(0));
    const V mix = S::set1(r2.high ^ keys.k1(1));
    const V k0 = S::set1(keys.k0(2));
    const V k1 = S::set1(r2.low ^ keys.k1(2));
    for (int h = 0; h < S::hash_vectors; ++h) {
      const V p = S::multiply(S::xor2(low1_[h], mix), kMultiplier1);
      state.c0[h] = S::xor3(S::high(p), low2_[h], k0);
      state.c1[h] = p;
      state.c2[h] = S::xor2(high3_[h], k1);
      state.c3[h] = low3_[h];
    }
  }
  NMKERN_INLINE void operator()(uint32_t counter, typename S::U (&word)[4]) const {
    Rounds<S> state;
    hash_stages<0, kStages>(*this, counter, state, word);
  }
};

}  // namespace
}  // namespace nmkern::cpu
