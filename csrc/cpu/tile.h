// The tile kernels, written once over a SIMD policy and compiled once per instruction set.
//
//   sums[o, m] = sum_k W[o, k] * x[m, k]        o over the tile's outputs, see kernels.h
//
// Up to twice `max_block` rows of x: weights go from the decoder straight into the multiply.
// More rows: a block of weights is decoded into a tile in L1 and multiplied with every block of `tile_block` rows.
// At that border, uniform, 8192 x 8192 on 2 threads of AVX2 (Zen 3): M = 6 7.2 ms, 8 10.1, 12 13.5; a tile for all
// M > 2 took 6.2 at M = 4 where fusing takes 5.3, and fusing more rows has no registers. AVX-512 (Zen 4), clocks a
// vector of weights, fused and by a tile: M = 8 10.1 and 10.0 in float32, 9.3 and 10.4 in bfloat16; M = 12 14.3 and
// 13.8, 14.0 and 14.3; M = 13 by a tile 15.2 and 15.8.
// The policy S gives: U (32-bit words), F (floats), lanes, blocks, hashers, decoders, fma.
#pragma once

#include <cstdint>
#include <type_traits>

#include "hash.h"

namespace nmkern::cpu {
namespace {  // a copy per instruction set: never merged by the linker

// Fields of a word that are decoded by unrolled code. A rademacher word has 32: looping over pieces of 8
// costs a shift a piece and takes the compiler a quarter of the time.
constexpr int kUnrolled = 8;

// One reduction step: Vectors vectors of weights times one value (or pair) of each row of x.
template <class S, class C, int Vectors, int Rows>
NMKERN_INLINE void multiply(typename S::F (&sum)[Vectors][Rows],
                            const typename C::Weight (&w)[Vectors], const typename C::X* x) {
  // Whichever are fewer stay in registers and the others are loaded one at a time: AVX2 has 16 registers.
  if constexpr (Rows < Vectors) {
    decltype(C::broadcast(x)) value[Rows];
    unroll<Rows>([&](auto m) NMKERN_FLAT { value[m] = C::broadcast(x + m); });
    unroll<Vectors>([&](auto o) NMKERN_FLAT {
      unroll<Rows>([&](auto m) NMKERN_FLAT { sum[o][m] = C::fma(w[o], value[m], sum[o][m]); });
    });
  } else {
    unroll<Rows>([&](auto m) NMKERN_FLAT {
      const auto value = C::broadcast(x + m);
      unroll<Vectors>([&](auto o) NMKERN_FLAT { sum[o][m] = C::fma(w[o], value, sum[o][m]); });
    });
  }
}

template <class S, int Vectors, int Rows>
NMKERN_INLINE void clear_sums(typename S::F (&sum)[Vectors][Rows]) {
  unroll<Vectors>([&](auto o) NMKERN_FLAT {
    unroll<Rows>([&](auto m) NMKERN_FLAT { sum[o][m] = S::zero(); });
  });
}

// Sums of a run that begins at a step of the reduction: zero, or what Tile::offsets says; transposed, of the vectors
// from number `vector` of the tile on.
template <class S, class C, bool Forward, int Vectors, int Rows>
NMKERN_INLINE void start_sums(typename S::F (&sum)[Vectors][Rows], const Tile& t, int64_t step, int vector) {
  if constexpr (C::run_steps == 0) {
    clear_sums<S, Vectors, Rows>(sum);
  } else {
    const float* offset = t.offsets + step / C::run_steps * (Forward ? 1 : C::columns) * Rows;
    unroll<Rows>([&](auto m) NMKERN_FLAT {
      unroll<Vectors>([&](auto o) NMKERN_FLAT {
        sum[o][m] = S::broadcast(offset + (Forward ? 0 : vector + o) * Rows + m);
      });
    });
  }
}

// Each run of the reduction is summed on its own and then added to the sums in memory: with one sum over all
// steps, the relative error at K = 8192 was 1.6e-6 on average and, on 24 outputs, 2.3e-6; design: 2e-6.
template <class S, int Vectors, int Rows>
NMKERN_INLINE void add_sums(const typename S::F (&sum)[Vectors][Rows], float* to, bool start) {
  unroll<Vectors>([&](auto o) NMKERN_FLAT {
    unroll<Rows>([&](auto m) NMKERN_FLAT {
      float* at = to + (o * Rows + m) * S::lanes;
      S::store(at, start ? sum[o][m] : S::add(S::load(at), sum[o][m]));
    });
  });
}

// Call body(integral_constant<Rows>) for rows in 1..Max.
template <int Max, class Body>
NMKERN_INLINE void with_rows(int rows, Body&& body) {
  unroll<Max>([&](auto i) NMKERN_FLAT {
    if (rows == i + 1) body(std::integral_constant<int, i + 1>{});
  });
}

// The words of a tile's reduction, kTileWords at a time, in the order of their use.
//
// Where the policy has registers for it, a word that has served is replaced by one to come: its hash is cut into
// stages that stand between the multiplies by x. On Zen 4 the 18 integer multiplies of a call take the units of the
// dot products (measured: 8 of each take 16 clocks), all else of a hash other ones; so a vector of 32 weights in
// bfloat16 takes at least M + 18 / 16 clocks. At M = 8, 9.1, it takes 9.3, and 10.6 where words are hashed first.
// Behind the last word come the first ones of the next tile (of the next `lanes` outputs), so that no call is
// wasted until the last tile.
template <class S, class C, class Hasher>
class WordQueue {
  using Words = typename S::U[4];

  const Tile& t_;
  const Hasher hash_, next_;
  Words* const words_;

  // Forward, words are as they are hashed; transposed, rows of a patch are paired.
  static NMKERN_INLINE void arrange(Words& word) {
    if constexpr (std::is_same_v<Hasher, typename S::ColumnHasher>) C::arrange_rows(word);
  }

 public:
  int64_t begin = 0;  // of the words in use

  explicit WordQueue(const Tile& t)
      : t_(t),
        hash_(t.key, uint32_t(C::family), t.output_word),
        next_(t.key, uint32_t(C::family), t.output_word + uint32_t(S::lanes)),
        words_(static_cast<Words*>(t.words)) {}

  int64_t count() const {
    return t_.reduction_words - begin < kTileWords ? t_.reduction_words - begin : kTileWords;
  }
  const Words& operator[](int64_t i) const { return words_[i]; }

  // Hash the words in use, as far as that has not been done ahead.
  void fill(bool ahead) {
    const int64_t ready = !ahead ? 0 : begin > 0 ? count() : t_.ready;
    for (int64_t i = ready; i < count(); ++i) {
      hash_(t_.reduction_word + uint32_t(begin + i), words_[i]);
      arrange(words_[i]);
    }
  }
  // Step number Step of Steps, while word i serves for the last time.
  template <int Step, int Steps>
  NMKERN_INLINE void replace(int64_t i, Rounds<S>& state) const {
    const bool same = begin + kTileWords + i < t_.reduction_words;
    const uint32_t at = uint32_t(same ? begin + kTileWords + i : i);
    hash_stages<Step * kStages / Steps, (Step + 1) * kStages / Steps>(
        same ? hash_ : next_, t_.reduction_word + at, state, words_[i]);
    if constexpr (Step + 1 == Steps) arrange(words_[i]);
  }
};

// Whether preparing a word is work of its own. Then it is not done again for a second pass over its fields:
// normal at M = 6, 8192 x 8192 (Zen 3, 2 threads): 11.4 ms against 18.0.
template <class S, class C>
constexpr bool kPrepares = !std::is_same_v<typename C::Prepared, typename S::U>;

// Rows of x for which sums of four vectors stay in registers, and whether words are replaced as they serve. The
// state of a hash takes 8 registers, which leaves 16 to 24 for sums. Clocks a vector of weights on Zen 4 with and
// without replacing, uniform: bfloat16 forward M = 4 5.8 and 6.6, M = 6 (two passes of two vectors) 7.6 and 8.6;
// float32 forward M = 4 5.3 and 5.6, M = 6 8.0 and 7.2; transposed, where the last chunk's few multiplies stand
// between the stages, M = 1 4.8 and 4.5 in bfloat16. normal at M = 12: 19.6 and 18.0.
template <class S, class C, bool Forward>
constexpr int wide_rows = S::interleaved && Forward && C::halves == 2 ? 4 : S::fused_block;

template <class S, class C, bool Forward>
constexpr bool replaces_words(int64_t rows) {
  if (!S::interleaved || (kPrepares<S, C> && rows > S::fused_block)) return false;
  return Forward ? rows <= 4 || rows > wide_rows<S, C, true> : rows > 2 && (rows <= 4 || rows > S::fused_block);
}

// Call body(first vector, sums, begin, end) for weights that are decoded as they are multiplied: for all of `count`
// words of Steps steps each, the first of which is step `first`, or for one run of them after the other. More rows
// than registers hold sums of four vectors for, beside what decoding takes, go two vectors at a time. They are those
// of chunk number `chunk` of the tile.
template <class S, class C, bool Forward, int Steps, class Body>
NMKERN_INLINE void multiply_fused(const Tile& t, int chunk, float* sums, int64_t first, int64_t count, Body&& body) {
  with_rows<2 * S::max_block>(int(t.batch), [&](auto r) NMKERN_FLAT {
    constexpr int kRows = decltype(r)::value;
    constexpr int kNow = kRows <= wide_rows<S, C, Forward> ? kVectors : kVectors / 2;
    unroll<kVectors / kNow>([&](auto pass) NMKERN_FLAT {
      constexpr int kFirst = pass * kNow;
      constexpr int kChains = Steps > 1 && kNow * kRows < C::sums_at_once ? 2 : 1;
      typename S::F sum[kChains][kNow][kRows];
      float* home = sums + kFirst * kRows * S::lanes;
      const auto run = [&](int64_t begin, int64_t end) NMKERN_FLAT {
        start_sums<S, C, Forward, kNow, kRows>(sum[0], t, first + begin * Steps, chunk * kVectors + kFirst);
        if constexpr (kChains > 1) clear_sums<S, kNow, kRows>(sum[1]);
        body(std::integral_constant<int, kFirst>{}, sum, begin, end);
        if constexpr (kChains > 1) {
          unroll<kNow>([&](auto o) NMKERN_FLAT {
            unroll<kRows>([&](auto m) NMKERN_FLAT { sum[0][o][m] = S::add(sum[0][o][m], sum[1][o][m]); });
          });
        }
        add_sums<S, kNow, kRows>(sum[0], home, first + begin == 0);
      };
      if constexpr (C::run_steps == 0) {
        run(0, count);
      } else {
        constexpr int64_t kRun = C::run_steps / Steps;
        for (int64_t begin = 0; begin < count; begin += kRun) run(begin, begin + kRun < count ? begin + kRun : count);
      }
    });
  });
}

// Multiply a decoded tile, steps [first, first + steps), with the row blocks from row m0 on; the sums live in
// memory between tiles.
template <class S, class C>
void multiply_tile(const Tile& t, const typename C::Weight* weights, int64_t first, int64_t steps,
                   float* sums, int64_t m0 = 0) {
  using X = typename C::X;
  const X* x = static_cast<const X*>(t.x) + first * t.batch + m0 * steps;
  for (int64_t m = m0; m < t.batch; m += t.block) {
    const int rows = int(t.batch - m < t.block ? t.batch - m : t.block);
    with_rows<S::tile_block>(rows, [&](auto r) NMKERN_FLAT {
      constexpr int kRows = decltype(r)::value;
      typename S::F sum[kVectors][kRows];
      float* home = sums + m * kVectors * S::lanes;
      clear_sums<S, kVectors, kRows>(sum);
      const typename C::Weight* w = weights;
      for (int64_t k = 0; k < steps; ++k, w += kVectors, x += kRows) {
        const typename C::Weight now[kVectors] = {w[0], w[1], w[2], w[3]};
        multiply<S, C, kVectors, kRows>(sum, now, x);
      }
      add_sums<S, kVectors, kRows>(sum, home, first == 0);
    });
  }
}

// ---- forward: lanes are patches of rows, a word holds P columns = C::forward_steps steps

template <class C, int Field, int Vectors>
NMKERN_INLINE void decode_field(typename C::Weight (&w)[Vectors], const typename C::Prepared (&word)[Vectors]) {
  if constexpr (requires { C::template mask<Field>(); }) {
    const auto mask = C::template mask<Field>();
    unroll<Vectors>([&](auto r) NMKERN_FLAT { w[r] = C::template decode<Field>(word[r], mask); });
  } else {
    unroll<Vectors>([&](auto r) NMKERN_FLAT { w[r] = C::template decode<Field>(word[r]); });
  }
}

template <class S, class C>
void forward_fused(const Tile& t) {
  using X = typename C::X;
  WordQueue<S, C, typename S::RowHasher> queue(t);
  constexpr int kSteps = C::forward_steps < kUnrolled ? C::forward_steps : kUnrolled;
  for (; queue.begin < t.reduction_words; queue.begin += kTileWords) {
    queue.fill(replaces_words<S, C, true>(t.batch));
    const int64_t step = queue.begin * C::forward_steps;
    const X* all = static_cast<const X*>(t.x) + step * t.batch;
    const auto body = [&](auto first, auto& sum, int64_t begin, int64_t end) NMKERN_FLAT {
      constexpr int kChains = std::extent_v<std::remove_reference_t<decltype(sum)>, 0>;
      constexpr int kNow = std::extent_v<std::remove_reference_t<decltype(sum)>, 1>;
      constexpr int kRows = std::extent_v<std::remove_reference_t<decltype(sum)>, 2>;
      constexpr bool kReplaces = replaces_words<S, C, true>(kRows) && first + kNow == kVectors;
      const X* x = all + begin * C::forward_steps * kRows;
      for (int64_t i = begin; i < end; ++i) {
        Rounds<S> state;
        for (int piece = 0; piece < C::forward_steps / kSteps; ++piece, x += kSteps * kRows) {
          typename C::Prepared prepared[kNow];
          unroll<kNow>([&](auto r) NMKERN_FLAT {
            const auto word = queue[i][first + r];
            prepared[r] = C::prepare(C::forward_steps == kSteps ? word : C::skip(word, piece * kSteps));
          });
          unroll<kSteps>([&](auto f) NMKERN_FLAT {
            typename C::Weight w[kNow];
            decode_field<C, f>(w, prepared);
            multiply<S, C, kNow, kRows>(sum[f % kChains], w, x + f * kRows);
            if constexpr (kReplaces && kSteps == C::forward_steps)
              queue.template replace<f, kSteps>(i, state);
          });
        }
        if constexpr (kReplaces && kSteps < C::forward_steps) queue.template replace<0, 1>(i, state);
      }
    };
    multiply_fused<S, C, true, C::forward_steps>(t, 0, t.sums, step, queue.count(), body);
  }
}

// Words [begin, end) of the reduction as weights: to[step][kVectors].
template <class S, class C>
void decode_words(const Tile& t, int64_t begin, int64_t end, typename C::Weight* to) {
  const typename S::RowHasher hash(t.key, uint32_t(C::family), t.output_word);
  for (int64_t i = begin; i < end; ++i, to += C::forward_steps * kVectors) {
    typename S::U word[4];
    hash(t.reduction_word + uint32_t(i), word);
    typename C::Prepared prepared[4];
    unroll<4>([&](auto r) NMKERN_FLAT { prepared[r] = C::prepare(word[r]); });
    unroll<C::forward_steps>([&](auto f) NMKERN_FLAT {
      unroll<4>([&](auto r) NMKERN_FLAT {
        to[f * kVectors + r] = C::template decode<f>(prepared[r]);
      });
    });
  }
}

// The first block of rows, with a tile of `words` words that are replaced by those from `next` on as they serve:
// word i is hashed between the multiplies by its predecessor in place, and decoded one word later. uniform at
// M = 16 on Zen 4: 18.5 clocks a vector of weights in bfloat16 and 17.8 in float32, decoding between tiles 20.3
// and 19.0 (blocks of 6 rows, which have no registers for a hash: 21.0 and 19.4).
template <class S, class C>
void multiply_replacing(const Tile& t, typename C::Weight* weights, int64_t first, int64_t words, int64_t next) {
  constexpr int kRows = S::tile_block;
  constexpr int kSteps = C::forward_steps;
  const typename S::RowHasher hash(t.key, uint32_t(C::family), t.output_word);
  auto* turns = static_cast<typename S::U (*)[4]>(t.words);
  unroll<4>([&](auto r) NMKERN_FLAT { turns[1][r] = S::set_words(0); });
  typename S::F sum[kVectors][kRows];
  clear_sums<S, kVectors, kRows>(sum);
  const auto* x = static_cast<const typename C::X*>(t.x) + first * t.batch;
  auto* w = weights;
  const auto decode = [&](auto f, const typename C::Prepared(&prepared)[4]) NMKERN_FLAT {
    unroll<4>([&](auto r) NMKERN_FLAT {
      w[(f - kSteps) * kVectors + r] = C::template decode<f>(prepared[r]);  // before the tile at first
    });
  };
  for (int64_t i = 0; i < words; ++i, w += kSteps * kVectors, x += kSteps * kRows) {
    Rounds<S> state;
    typename C::Prepared before[4];
    unroll<4>([&](auto r) NMKERN_FLAT { before[r] = C::prepare(turns[(i + 1) % 2][r]); });
    unroll<kSteps>([&](auto f) NMKERN_FLAT {
      const auto* from = w + f * kVectors;
      const typename C::Weight now[kVectors] = {from[0], from[1], from[2], from[3]};
      multiply<S, C, kVectors, kRows>(sum, now, x + f * kRows);
      decode(f, before);
      hash_stages<f * kStages / kSteps, (f + 1) * kStages / kSteps>(
          hash, t.reduction_word + uint32_t(next + i), state, turns[i % 2]);
    });
  }
  typename C::Prepared last[4];
  unroll<4>([&](auto r) NMKERN_FLAT { last[r] = C::prepare(turns[(words + 1) % 2][r]); });
  unroll<kSteps>([&](auto f) NMKERN_FLAT { decode(f, last); });
  add_sums<S, kVectors, kRows>(sum, t.sums, first == 0);
}

template <class S, class C>
void forward(const Tile& t) {
  if (t.batch <= t.block) return forward_fused<S, C>(t);
  constexpr int64_t kWords = tile_steps(false, C::halves == 2) / C::forward_steps;
  constexpr bool kReplaces = S::interleaved && C::forward_steps <= kUnrolled && !kPrepares<S, C>;
  auto* weights = static_cast<typename C::Weight*>(t.scratch) + kReplaces * kUnrolled * kVectors;
  bool decoded = false;
  for (int64_t begin = 0; begin < t.reduction_words; begin += kWords) {
    const int64_t left = t.reduction_words - begin, words = left < kWords ? left : kWords;
    const int64_t first = begin * C::forward_steps;
    if (!decoded) decode_words<S, C>(t, begin, begin + words, weights);
    decoded = kReplaces && left >= 2 * kWords;
    multiply_tile<S, C>(t, weights, first, words * C::forward_steps, t.sums, decoded ? t.block : 0);
    if constexpr (kReplaces) {
      if (decoded) multiply_replacing<S, C>(t, weights, first, words, begin + kWords);
    }
  }
}

// ---- transposed: lanes are words of columns, a patch holds C::patch_steps steps

// Vectors First to First + Vectors of a chunk of kVectors fields, for one step of a patch whose words have
// been arranged by C::arrange_rows: [step][half], fields of a half in order. A chunk known to the compiler
// costs no shift (uniform at M = 8, 4096 x 4096 on one thread: 1.44 ms against 1.80).
template <class S, class C, int First, int Vectors, class Chunk>
NMKERN_INLINE void decode_step(typename C::Weight (&w)[Vectors], const typename S::U (&word)[4],
                               int step, Chunk chunk) {
  constexpr int kPerHalf = C::columns / C::halves;
  if constexpr (kPerHalf < kVectors) {  // normal in bfloat16: the one chunk spans both halves
    unroll<Vectors>([&](auto j) NMKERN_FLAT {
      constexpr int kField = First + j;
      w[j] = C::template decode<kField % kPerHalf>(
          C::prepare(word[C::halves * step + kField / kPerHalf]));
    });
  } else {
    constexpr int kChunks = kPerHalf / kVectors;  // of a half
    const auto half = word[C::halves * step + chunk / kChunks];
    if constexpr (std::is_same_v<Chunk, int>) {
      const auto rest = C::prepare(C::skip(half, chunk % kChunks * kVectors));
      unroll<Vectors>([&](auto j) NMKERN_FLAT { w[j] = C::template decode<First + j>(rest); });
    } else {
      constexpr int kField = Chunk::value % kChunks * kVectors + First;
      const auto all = C::prepare(half);
      unroll<Vectors>([&](auto j) NMKERN_FLAT { w[j] = C::template decode<kField + j>(all); });
    }
  }
}

template <class C, class Chunk>
constexpr bool is_last_chunk = false;
template <class C, int Chunk>
constexpr bool is_last_chunk<C, std::integral_constant<int, Chunk>> = Chunk == C::columns / kVectors - 1;

constexpr int next_chunk(int chunk) { return chunk + 1; }
template <int Chunk>
constexpr auto next_chunk(std::integral_constant<int, Chunk>) {
  return std::integral_constant<int, Chunk + 1>{};
}

// Chunk number `chunk` of kVectors fields of the words in use, with the sums of all rows of x in registers.
template <class S, class C, class Queue, class Chunk>
void transposed_fused(const Tile& t, const Queue& queue, Chunk chunk, float* sums) {
  using X = typename C::X;
  const int64_t at = queue.begin * C::patch_steps;
  const X* all = static_cast<const X*>(t.x) + at * t.batch;
  const auto body = [&](auto first, auto& sum, int64_t begin, int64_t end) NMKERN_FLAT {
    constexpr int kChains = std::extent_v<std::remove_reference_t<decltype(sum)>, 0>;
    constexpr int kNow = std::extent_v<std::remove_reference_t<decltype(sum)>, 1>;
    constexpr int kRows = std::extent_v<std::remove_reference_t<decltype(sum)>, 2>;
    constexpr bool kReplaces = replaces_words<S, C, false>(kRows) && first + kNow == kVectors &&
                               is_last_chunk<C, Chunk>;
    const X* x = all + begin * C::patch_steps * kRows;
    for (int64_t i = begin; i < end; ++i) {
      Rounds<S> state;
      unroll<C::patch_steps>([&](auto step) NMKERN_FLAT {
        typename C::Weight w[kNow];
        decode_step<S, C, first, kNow>(w, queue[i], step, chunk);
        multiply<S, C, kNow, kRows>(sum[step % kChains], w, x);
        x += kRows;
        if constexpr (kReplaces) queue.template replace<step, C::patch_steps>(i, state);
      });
    }
  };
  multiply_fused<S, C, false, C::patch_steps>(t, chunk, sums, at, queue.count(), body);
}

// Chunk number `chunk` of the words in use as a tile: [step][kVectors].
template <class S, class C, class Queue, class Chunk>
void decode_chunk(const Queue& queue, Chunk chunk, typename C::Weight* to) {
  static_assert(kTileWords * C::patch_steps == tile_steps(true, C::halves == 2));
  for (int64_t i = 0; i < queue.count(); ++i, to += C::patch_steps * kVectors) {
    unroll<C::patch_steps>([&](auto step) NMKERN_FLAT {
      typename C::Weight w[kVectors];
      decode_step<S, C, 0, kVectors>(w, queue[i], step, chunk);
      unroll<kVectors>([&](auto o) NMKERN_FLAT { to[step * kVectors + o] = w[o]; });
    });
  }
}

// The sums of a tile with all rows of x in registers, for weights that take work to decode.
template <class S, class C>
void multiply_whole(const Tile& t, const typename C::Weight* weights, int64_t first, int64_t steps, float* sums) {
  const auto* all = static_cast<const typename C::X*>(t.x) + first * t.batch;
  const auto body = [&](auto vector, auto& sum, int64_t begin, int64_t end) NMKERN_FLAT {
    constexpr int kNow = std::extent_v<std::remove_reference_t<decltype(sum)>, 1>;
    constexpr int kRows = std::extent_v<std::remove_reference_t<decltype(sum)>, 2>;
    const typename C::Weight* from = weights + begin * kVectors + vector;
    const auto* x = all + begin * kRows;
    for (int64_t k = begin; k < end; ++k, from += kVectors, x += kRows) {
      typename C::Weight w[kNow];
      unroll<kNow>([&](auto o) NMKERN_FLAT { w[o] = from[o]; });
      multiply<S, C, kNow, kRows>(sum[0], w, x);
    }
  };
  multiply_fused<S, C, false, 1>(t, 0, sums, first, steps, body);
}

// The first block of rows with the tile of a chunk, which the next chunk's weights replace as they serve; or, of the
// last chunk, words by those to come. As multiply_replacing.
template <class S, class C, class Queue, class Chunk>
void transposed_replacing(const Tile& t, const Queue& queue, Chunk chunk, typename C::Weight* w, float* sums) {
  constexpr int kRows = S::tile_block;
  typename S::F sum[kVectors][kRows];
  clear_sums<S, kVectors, kRows>(sum);
  const auto* x = static_cast<const typename C::X*>(t.x) + queue.begin * C::patch_steps * t.batch;
  for (int64_t i = 0; i < queue.count(); ++i) {
    Rounds<S> state;
    unroll<C::patch_steps>([&](auto step) NMKERN_FLAT {
      typename C::Weight now[kVectors] = {w[0], w[1], w[2], w[3]};
      multiply<S, C, kVectors, kRows>(sum, now, x);
      x += kRows;
      if constexpr (is_last_chunk<C, Chunk>) {
        queue.template replace<step, C::patch_steps>(i, state);
      } else {
        decode_step<S, C, 0, kVectors>(now, queue[i], step, next_chunk(chunk));
        unroll<kVectors>([&](auto o) NMKERN_FLAT { w[o] = now[o]; });
      }
      w += kVectors;
    });
  }
  add_sums<S, kVectors, kRows>(sum, sums, queue.begin == 0);
}

template <class S, class C>
void transposed(const Tile& t) {
  WordQueue<S, C, typename S::ColumnHasher> queue(t);
  auto* weights = static_cast<typename C::Weight*>(t.scratch);
  const int64_t chunk_sums = t.batch * kVectors * S::lanes;
  const bool whole = t.batch <= t.block, fused = whole && !(kPrepares<S, C> && t.batch > S::fused_block);
  constexpr int kChunks = C::columns / kVectors;
  constexpr bool kReplaces = S::interleaved && !kPrepares<S, C>;
  for (; queue.begin < t.reduction_words; queue.begin += kTileWords) {
    queue.fill(fused ? replaces_words<S, C, false>(t.batch) : kReplaces);
    const int64_t first = queue.begin * C::patch_steps, steps = queue.count() * C::patch_steps;
    const auto run = [&](auto chunk) {
      float* sums = t.sums + chunk * chunk_sums;
      if (fused) return transposed_fused<S, C>(t, queue, chunk, sums);
      if (!kReplaces || chunk == 0) decode_chunk<S, C>(queue, chunk, weights);
      if constexpr (kPrepares<S, C>) {
        if (whole) return multiply_whole<S, C>(t, weights, first, steps, sums);
      }
      multiply_tile<S, C>(t, weights, first, steps, sums, kReplaces ? t.block : 0);
      if constexpr (kReplaces) transposed_replacing<S, C>(t, queue, chunk, weights, sums);
    };
    if constexpr (kChunks <= S::unrolled_chunks || C::run_steps != 0) {  // sums of fields are by their places
      unroll<kChunks>(run);
    } else {
      for (int chunk = 0; chunk < kChunks - S::interleaved; ++chunk) run(chunk);
      if constexpr (S::interleaved) run(std::integral_constant<int, kChunks - 1>{});
    }
  }
}

// Few rows, of a family that has fields (fields.h).
template <class S, class C>
__attribute__((noinline)) void multiply_fields(const Tile& t) {
  if (t.transposed) transposed<S, C>(t);
  else forward_fused<S, C>(t);
}
template <class S, template <Family> class C>
NMKERN_INLINE void run_fields_family(const Tile& t) {
  if (t.family == Family::rademacher) multiply_fields<S, C<Family::rademacher>>(t);
  else multiply_fields<S, C<Family::uniform>>(t);
}

template <template <Family> class C, class Body>
NMKERN_INLINE void with_codec(Family family, Body&& body) {
  switch (family) {
    case Family::rademacher: return body(C<Family::rademacher>{});
    case Family::uniform: return body(C<Family::uniform>{});
    case Family::normal: return body(C<Family::normal>{});
  }
}

template <class S, template <Family> class C>
void run_family(const Tile& t) {
  with_codec<C>(t.family, [&](auto codec) {
    if (t.transposed) transposed<S, decltype(codec)>(t);
    else forward<S, decltype(codec)>(t);
  });
}

template <class S, template <Family> class C>
void decode_family(const Tile& t, float* weights) {
  with_codec<C>(t.family, [&](auto codec) {
    decode_words<S, decltype(codec)>(t, 0, t.reduction_words,
                                     reinterpret_cast<typename S::F*>(weights));
  });
}

template <class S>
constexpr int64_t words_bytes() {
  return int64_t{kTileWords} * 4 * S::lanes * 4;
}

template <class S>
constexpr int64_t tile_bytes() {
  return int64_t{tile_steps(false, false) + S::interleaved * kUnrolled} * kVectors * S::lanes * 4;
}

}  // namespace
}  // namespace nmkern::cpu
