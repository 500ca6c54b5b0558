// The kernels of the fused FlyNet over a SIMD policy, for kSparseRows hidden units and kBatch rows.
#pragma once

#include "codec.h"
#include "sparse_tile.h"

namespace nmkern::cpu {
namespace {

// hidden[unit][lane] = max(0, factor * sum over the unit's columns k: x[k][lane] - mean[lane])
template <class S>
void fly_hidden(const uint32_t* columns, int64_t fan_in, const float* x, const float* mean,
                float factor, float* hidden) {
  const auto center = Batch<S>::load(mean);
  const auto scale = S::broadcast(&factor);
  for (int64_t first = 0; first < kSparseRows; first += S::lanes, columns += fan_in * S::lanes) {
    for (int lane = 0; lane < S::lanes; ++lane, hidden += kBatch) {
      auto sum = Batch<S>::load(x + int64_t{columns[lane]} * kBatch);
      for (int64_t s = 1; s < fan_in; ++s)
        sum += Batch<S>::load(x + int64_t{columns[s * S::lanes + lane]} * kBatch);
      unroll<Batch<S>::kParts>([&](auto i) NMKERN_FLAT {
        sum.part[i] = S::relu(S::subtract(S::multiply(sum.part[i], scale), center.part[i]));
      });
      sum.store(hidden);
    }
  }
}

// sums[class][lane] += sum over units: weights[unit][class] * gain[unit] * hidden[unit][lane]
template <class S>
void fly_readout(const float* hidden, const float* gain, const float* weights, int64_t units,
                 int64_t classes, float* sums) {
  constexpr int kClasses = S::lanes == kBatch ? 12 : 4;  // classes that registers hold sums for
  const int64_t chunks = (classes + kClasses - 1) / kClasses;
  const int64_t chunk = (classes + chunks - 1) / chunks;
  for (int64_t c = 0; c < classes; c += chunk) {
    with_rows<kClasses>(int(classes - c < chunk ? classes - c : chunk), [&](auto n) NMKERN_FLAT {
      constexpr int kNow = decltype(n)::value;
      Batch<S> sum[kNow];
      unroll<kNow>([&](auto i) NMKERN_FLAT { sum[i] = Batch<S>::load(sums + (c + i) * kBatch); });
      for (int64_t h = 0; h < units; ++h) {
        auto value = Batch<S>::load(hidden + h * kBatch);
        const auto g = S::broadcast(gain + h);
        unroll<Batch<S>::kParts>([&](auto p) NMKERN_FLAT { value.part[p] = S::multiply(value.part[p], g); });
        unroll<kNow>([&](auto i) NMKERN_FLAT {
          const auto w = S::broadcast(weights + h * classes + c + i);
          unroll<Batch<S>::kParts>([&](auto p) NMKERN_FLAT {
            sum[i].part[p] = S::fma(w, value.part[p], sum[i].part[p]);
          });
        });
      }
      unroll<kNow>([&](auto i) NMKERN_FLAT { sum[i].store(sums + (c + i) * kBatch); });
    });
  }
}

// hidden[unit][lane] *= sum over classes: weights[unit][class] * d_logits[class][lane]
// Where there is a total, the products are added to it instead.
template <class S>
void fly_pullback(const float* d_logits, const float* weights, int64_t classes, float* hidden,
                  float* total) {
  constexpr int kUnits = 4;  // chains of dependent sums that run side by side
  for (int64_t h = 0; h < kSparseRows; h += kUnits, weights += kUnits * classes) {
    Batch<S> sum[kUnits] = {};
    for (int64_t c = 0; c < classes; ++c) {
      const auto d = Batch<S>::load(d_logits + c * kBatch);
      unroll<kUnits>([&](auto u) NMKERN_FLAT {
        const auto w = S::broadcast(weights + u * classes + c);
        unroll<Batch<S>::kParts>([&](auto p) NMKERN_FLAT {
          sum[u].part[p] = S::fma(w, d.part[p], sum[u].part[p]);
        });
      });
    }
    unroll<kUnits>([&](auto u) NMKERN_FLAT {
      auto value = Batch<S>::load(hidden + (h + u) * kBatch);
      unroll<Batch<S>::kParts>([&](auto p) NMKERN_FLAT {
        value.part[p] = S::multiply(value.part[p], sum[u].part[p]);
      });
      float* to = (total ? total : hidden) + (h + u) * kBatch;
      if (total) value += Batch<S>::load(to);
      value.store(to);
    });
  }
}

template <class S>
constexpr FlyKernels fly_kernels() {
  return {fly_hidden<S>, fly_readout<S>, fly_pullback<S>};
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
