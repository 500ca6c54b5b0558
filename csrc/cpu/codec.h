// How words become weights in float32: one codec per family, over a SIMD policy's decoders.
//
// A codec says how many reduction steps a word (forward) and a patch (transposed) hold, and decodes
// field f of a word into a vector of weights. In float32 a step is one column or one row.
#pragma once

#include "kernels.h"

namespace nmkern::cpu {
namespace {

template <class S>
struct FloatCodec {
  template <Family F>
  struct Of {
    using Weight = typename S::F;
    using X = float;
    using U = typename S::U;
    using Prepared = typename S::template Prepared<F>;
    static constexpr Family family = F;
    static constexpr int columns = columns_per_word(F);
    static constexpr int halves = 1;
    static constexpr int forward_steps = columns;
    static constexpr int patch_steps = kRowsPerPatch;
    static constexpr int run_steps = 0;
    static constexpr int sums_at_once = 1;

    static NMKERN_INLINE Prepared prepare(U word) {
      return S::template prepare<F>(word);
    }
    template <int Field>
    static NMKERN_INLINE Weight decode(const Prepared& word) {
      return S::template decode<F, Field>(word);
    }
    // The word with its first `fields` fields shifted out.
    static NMKERN_INLINE U skip(U word, int fields) {
      return S::shift_right(word, fields * (32 / columns));
    }
    static NMKERN_INLINE void arrange_rows(U (&)[4]) {}
    static NMKERN_INLINE Weight broadcast(const float* x) {
      return S::broadcast(x);
    }
    static NMKERN_INLINE Weight fma(Weight w, Weight x, Weight sum) {
      return S::fma(w, x, sum);
    }
  };
};

}  // namespace
}  // namespace nmkern::cpu
