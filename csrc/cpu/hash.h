// Philox4x32-7 over vector lanes, for counters of which one word runs over lanes and one over a loop.
//
//   RowHasher(key, tag, c1)     lanes hold c1, c1 + 1, ...   call(c0): word r of every lane's patch
//   ColumnHasher(key, tag, c0)  lanes hold c0, c0 + 1, ...   call(c1)
//
// Even and odd lanes are hashed apart as 64-bit products, whose halves need no shuffle: 4 multiplies,
// 4 shifts and 4 three-way xors a round. In rounds 1 to 3 half of the state depends on the lane alone
// or on the loop alone; that half is computed once per tile or as scalars, which leaves 18 of the 28
// vector multiplies.
#pragma once

#include "kernels.h"

namespace nmkern::cpu {
namespace {

struct Product {
  uint32_t high, low;
  Product(uint32_t a, uint32_t b)
      : high(uint32_t((uint64_t{a} * b) >> 32)), low(uint32_t(uint64_t{a} * b)) {}
};

template <class S>
struct Rounds {
  using V = typename S::V;  // 32-bit words in the low halves of 64-bit lanes; high halves are noise

  V c0[2], c1[2], c2[2], c3[2];

  // Rounds 4 to 7, then even and odd lanes are merged.
  NMKERN_INLINE void finish(Key key, typename S::U (&word)[4]) {
    for (int round = 3; round < kRounds; ++round) {
      const V k0 = S::set1(key.k0 + uint32_t(round) * kWeyl0);
      const V k1 = S::set1(key.k1 + uint32_t(round) * kWeyl1);
      for (int h = 0; h < 2; ++h) {
        const V p0 = S::multiply(c0[h], kMultiplier0);
        const V p1 = S::multiply(c2[h], kMultiplier1);
        c0[h] = S::xor3(S::high(p1), c1[h], k0);
        c1[h] = p1;
        c2[h] = S::xor3(S::high(p0), c3[h], k1);
        c3[h] = p0;
      }
    }
    word[0] = S::merge(c0[0], c0[1]);
    word[1] = S::merge(c1[0], c1[1]);
    word[2] = S::merge(c2[0], c2[1]);
    word[3] = S::merge(c3[0], c3[1]);
  }
};

template <class S>
class RowHasher {
  using V = typename S::V;
  Key key_;
  uint32_t tag_;
  V high_[2], low_[2];  // of round 2's first product, which depends on c1 alone

 public:
  RowHasher(Key key, uint32_t tag, uint32_t c1) : key_(key), tag_(tag) {
    for (int h = 0; h < 2; ++h) {
      const V p = S::multiply(S::xor2(S::lanes_from(c1, h), S::set1(key.k0)), kMultiplier0);
      high_[h] = S::high(p);
      low_[h] = p;
    }
  }

  NMKERN_INLINE void operator()(uint32_t c0, typename S::U (&word)[4]) const {
    const Product r1(kMultiplier0, c0);
    const Product r2(kMultiplier1, r1.high ^ tag_ ^ key_.k1);
    const Product r3(kMultiplier0, r2.high ^ (key_.k0 + kWeyl0));
    const V mix = S::set1(r1.low ^ (key_.k1 + kWeyl1));
    const V k0 = S::set1(r2.low ^ (key_.k0 + 2 * kWeyl0));
    const V k1 = S::set1(r3.high ^ (key_.k1 + 2 * kWeyl1));
    Rounds<S> state;
    for (int h = 0; h < 2; ++h) {
      const V p = S::multiply(S::xor2(high_[h], mix), kMultiplier1);
      state.c0[h] = S::xor2(S::high(p), k0);
      state.c1[h] = p;
      state.c2[h] = S::xor2(low_[h], k1);
      state.c3[h] = S::set1(r3.low);
    }
    state.finish(key_, word);
  }
};

template <class S>
class ColumnHasher {
  using V = typename S::V;
  Key key_;
  V low1_[2];             // of round 1's first product
  V low2_[2];             // of round 2's second product
  V high3_[2], low3_[2];  // of round 3's first product; all depend on c0 alone

 public:
  ColumnHasher(Key key, uint32_t tag, uint32_t c0) : key_(key) {
    for (int h = 0; h < 2; ++h) {
      const V p = S::multiply(S::lanes_from(c0, h), kMultiplier0);
      const V q = S::multiply(S::xor2(S::high(p), S::set1(tag ^ key.k1)), kMultiplier1);
      const V r = S::multiply(S::xor2(S::high(q), S::set1(key.k0 + kWeyl0)), kMultiplier0);
      low1_[h] = p;
      low2_[h] = q;
      high3_[h] = S::high(r);
      low3_[h] = r;
    }
  }

  NMKERN_INLINE void operator()(uint32_t c1, typename S::U (&word)[4]) const {
    const Product r2(kMultiplier0, c1 ^ key_.k0);
    const V mix = S::set1(r2.high ^ (key_.k1 + kWeyl1));
    const V k0 = S::set1(key_.k0 + 2 * kWeyl0);
    const V k1 = S::set1(r2.low ^ (key_.k1 + 2 * kWeyl1));
    Rounds<S> state;
    for (int h = 0; h < 2; ++h) {
      const V p = S::multiply(S::xor2(low1_[h], mix), kMultiplier1);
      state.c0[h] = S::xor3(S::high(p), low2_[h], k0);
      state.c1[h] = p;
      state.c2[h] = S::xor2(high3_[h], k1);
      state.c3[h] = low3_[h];
    }
    state.finish(key_, word);
  }
};

}  // namespace
}  // namespace nmkern::cpu
