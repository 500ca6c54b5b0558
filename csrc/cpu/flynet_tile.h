// The kernels of the fused FlyNet over a SIMD policy, for kSparseRows hidden units and kBatch rows.
#pragma once

#include "codec.h"
#include "sparse_tile.h"

namespace nmkern::cpu {
namespace {

// Hidden units that are summed side by side: a step of 784 -> 7840 at batch 128 on one thread of an Emerald Rapids
// takes 2.5 ms; one by one 2.8, eight 2.5.
constexpr int kUnits = 4;

// max(0, factor * sum over a unit's columns k: x[k][lane] - mean[lane])
template <class S>
struct HiddenUnits {
  const int64_t fan_in;
  const float* const x;
  const Batch<S> center;
  const typename S::F scale;

  HiddenUnits(int64_t drawn, const float* rows, const float* mean, float factor)
      : fan_in(drawn), x(rows), center(Batch<S>::load(mean)), scale(S::broadcast(&factor)) {}

  // Units [h, h + Units) of a group, which share a vector of S::lanes.
  template <int Units>
  NMKERN_INLINE void operator()(Batch<S> (&hidden)[Units], const uint32_t* group, int64_t h) const {
    sum_rows<S, Units>(hidden, group + h / S::lanes * S::lanes * fan_in + h % S::lanes, fan_in, x);
    unroll<Units>([&](auto u) NMKERN_FLAT {
      unroll<Batch<S>::kParts>([&](auto p) NMKERN_FLAT {
        auto& part = hidden[u].part[p];
        part = S::relu(S::subtract(S::multiply(part, scale), center.part[p]));
      });
    });
  }
};

template <class S>
void fly_hidden(const uint32_t* columns, int64_t fan_in, const float* x, const float* mean,
                float factor, float* hidden) {
  const HiddenUnits<S> units(fan_in, x, mean, factor);
  for (int64_t h = 0; h < kSparseRows; h += kUnits) {
    Batch<S> value[kUnits];
    units(value, columns, h);
    unroll<kUnits>([&](auto u) NMKERN_FLAT { value[u].store(hidden + (h + u) * kBatch); });
  }
}

template <class S>
constexpr int kFlyClasses = S::lanes == kBatch ? 12 : 4;  // classes that registers hold sums for

// sums[class] += weights[class] * value * gain
template <class S, int Classes>
NMKERN_INLINE void add_readout(Batch<S> (&sum)[Classes], const float* weights, Batch<S> value, const float* gain) {
  const auto g = S::broadcast(gain);
  unroll<Batch<S>::kParts>([&](auto p) NMKERN_FLAT { value.part[p] = S::multiply(value.part[p], g); });
  unroll<Classes>([&](auto i) NMKERN_FLAT {
    const auto w = S::broadcast(weights + i);
    unroll<Batch<S>::kParts>([&](auto p) NMKERN_FLAT {
      sum[i].part[p] = S::fma(w, value.part[p], sum[i].part[p]);
    });
  });
}

// sums[class][lane] += sum over units: weights[unit][class] * gain[unit] * hidden[unit][lane]
template <class S>
void fly_readout(const float* hidden, const float* gain, const float* weights, int64_t units,
                 int64_t classes, float* sums) {
  const int64_t chunks = (classes + kFlyClasses<S> - 1) / kFlyClasses<S>;
  const int64_t chunk = (classes + chunks - 1) / chunks;
  for (int64_t c = 0; c < classes; c += chunk) {
    with_rows<kFlyClasses<S>>(int(classes - c < chunk ? classes - c : chunk), [&](auto n) NMKERN_FLAT {
      constexpr int kNow = decltype(n)::value;
      Batch<S> sum[kNow];
      unroll<kNow>([&](auto i) NMKERN_FLAT { sum[i] = Batch<S>::load(sums + (c + i) * kBatch); });
      for (int64_t h = 0; h < units; ++h)
        add_readout<S, kNow>(sum, weights + h * classes + c, Batch<S>::load(hidden + h * kBatch), gain + h);
      unroll<kNow>([&](auto i) NMKERN_FLAT { sum[i].store(sums + (c + i) * kBatch); });
    });
  }
}

// hidden and readout at once, for at most kFlyClasses classes: one's loads are in flight while the other
// multiplies. With products done the same way a step of 784 -> 7840 at batch 128 takes 0.93 ms, was 1.01 (Zen 4).
template <class S>
void fly_logits(const uint32_t* columns, int64_t fan_in, const float* x, const float* mean, float factor,
                const float* gain, const float* weights, int64_t units, int64_t classes, float* sums) {
  const HiddenUnits<S> hidden(fan_in, x, mean, factor);
  with_rows<kFlyClasses<S>>(int(classes), [&](auto n) NMKERN_FLAT {
    constexpr int kNow = decltype(n)::value;
    Batch<S> sum[kNow];
    unroll<kNow>([&](auto i) NMKERN_FLAT { sum[i] = Batch<S>::load(sums + i * kBatch); });
    const auto add = [&](int64_t h, auto number) NMKERN_FLAT {
      Batch<S> value[number];
      hidden(value, columns, h);
      unroll<number>([&](auto u) NMKERN_FLAT {
        add_readout<S, kNow>(sum, weights + (h + u) * classes, value[u], gain + h + u);
      });
    };
    int64_t h = 0;
    for (; h + kUnits <= units; h += kUnits) add(h, std::integral_constant<int, kUnits>{});
    for (; h < units; ++h) add(h, std::integral_constant<int, 1>{});
    unroll<kNow>([&](auto i) NMKERN_FLAT { sum[i].store(sums + i * kBatch); });
  });
}

// sum[unit][lane] += sum over classes: weights[unit][class] * d_logits[class][lane]
template <class S>
NMKERN_INLINE void pull_back(Batch<S> (&sum)[kUnits], const float* d_logits, const float* weights, int64_t classes) {
  for (int64_t c = 0; c < classes; ++c) {
    const auto d = Batch<S>::load(d_logits + c * kBatch);
    unroll<kUnits>([&](auto u) NMKERN_FLAT {
      const auto w = S::broadcast(weights + u * classes + c);
      unroll<Batch<S>::kParts>([&](auto p) NMKERN_FLAT {
        sum[u].part[p] = S::fma(w, d.part[p], sum[u].part[p]);
      });
    });
  }
}

// products[unit][lane] = hidden[unit][lane] * sum over classes: weights[unit][class] * d_logits[class][lane]
// Where `add`, they are added to what is there.
template <class S>
void fly_products(const uint32_t* columns, int64_t fan_in, const float* x, const float* mean, float factor,
                  const float* d_logits, const float* weights, int64_t classes, bool add, float* products) {
  const HiddenUnits<S> hidden(fan_in, x, mean, factor);
  for (int64_t h = 0; h < kSparseRows; h += kUnits) {
    Batch<S> sum[kUnits] = {}, value[kUnits];
    pull_back<S>(sum, d_logits, weights + h * classes, classes);
    hidden(value, columns, h);
    unroll<kUnits>([&](auto u) NMKERN_FLAT {
      unroll<Batch<S>::kParts>([&](auto p) NMKERN_FLAT {
        value[u].part[p] = S::multiply(value[u].part[p], sum[u].part[p]);
      });
      float* to = products + (h + u) * kBatch;
      if (add) value[u] += Batch<S>::load(to);
      value[u].store(to);
    });
  }
}

template <class S>
constexpr FlyKernels fly_kernels() {
  return {kFlyClasses<S>, fly_hidden<S>, fly_readout<S>, fly_logits<S>, fly_products<S>};
}

// The table of an instruction set, whose dense products are `run`.
template <class S>
constexpr Kernels kernels_of(const char* name, bool bf16, void (*run)(const Tile&)) {
  return {.name = name,
          .lanes = S::lanes,
          .max_block = S::max_block,
          .tile_block = S::tile_block,
          .fused_block = S::fused_block,
          .bf16 = bf16,
          .scratch_bytes = tile_bytes<S>(),
          .words_bytes = words_bytes<S>(),
          .run = run,
          .decode = decode_family<S, FloatCodec<S>::template Of>,
          .sparse = sparse_kernels<S>(),
          .fly = fly_kernels<S>()};
}

}  // namespace
}  // namespace nmkern::cpu
