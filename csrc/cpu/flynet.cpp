// The launcher of the fused FlyNet.
//
// Columns are drawn once for all hidden units (fan_in words a unit). The mean over units needs no sweep:
// it is the inputs' sum weighted by how often each is drawn. Forward, a task is a block of 16 batch rows
// and units go by in order; backward, a task is a group of 64 units and batch rows go by in order. So
// every sum has one owner and one order, whatever the number of threads. The decoder's weights exist for
// one chunk of units at a time.
#include "flynet.h"

#include <algorithm>

#include "kernels.h"
#include "launch.h"
#include "sparse.h"

namespace nmkern::cpu {
namespace {

constexpr int64_t kWeightBytes = 1 << 20;  // bounds the decoded chunk of the decoder

struct Sweep {
  const FlyNet& net;
  const Runtime& runtime;
  const Kernels& k = kernels();

  int64_t groups = (net.hidden + kSparseRows - 1) / kSparseRows;
  int64_t blocks = (net.batch + kBatch - 1) / kBatch;
  int64_t block_floats = (net.inputs + 1) * kBatch;
  // Units that are decoded at a time, in groups.
  int64_t chunk = std::clamp<int64_t>(kWeightBytes / 4 / (net.classes * kSparseRows), 1, groups);

  uint32_t* columns = nullptr;  // [groups][kSparseRows / lanes][fan_in][lanes]
  float* x = nullptr;           // [blocks][inputs + 1][kBatch]
  float* mean = nullptr;        // [blocks][kBatch]
  float* weights = nullptr;     // [chunk * kSparseRows][classes]
  float* decoded = nullptr;     // a decoded tile of one group, for every thread

  void* allocate(int64_t bytes) const { return runtime.allocate(runtime.self, bytes); }
  int64_t rows(int64_t block) const { return std::min<int64_t>(kBatch, net.batch - block * kBatch); }
  int64_t units(int64_t g) const {
    return std::min<int64_t>(kSparseRows, net.hidden - g * kSparseRows);
  }
  const uint32_t* group_columns(int64_t g) const { return columns + g * kSparseRows * net.fan_in; }

  int64_t class_lanes() const { return kVectors * k.lanes; }
  // Floats of a decoded tile: a group's units and what pads them to whole words.
  int64_t decoded_floats() const { return (kSparseRows + 64) * class_lanes(); }

  void prepare() {
    columns = static_cast<uint32_t*>(allocate(groups * kSparseRows * net.fan_in * 4));
    x = static_cast<float*>(allocate(blocks * block_floats * 4));
    mean = static_cast<float*>(allocate(blocks * kBatch * 4));
    weights = static_cast<float*>(allocate(chunk * kSparseRows * net.classes * 4));
    decoded = static_cast<float*>(allocate(runtime.threads * decoded_floats() * 4));
    // How often each input is drawn: counted by every worker apart, in integers, so that any split gives the same.
    // One worker, in floats: a step of 784 -> 7840 at batch 128 takes 1.05 ms instead of 1.01 (2 cores of Zen 4).
    const int64_t bins = net.inputs + 1, count_grain = grain(kSparseRows * net.fan_in / 4);
    const int64_t counters = workers(runtime, groups, count_grain);
    auto* counts = static_cast<uint32_t*>(allocate(counters * bins * 4));

    Sparse encoder{};
    encoder.key = net.encoder_key;
    encoder.row_offset = net.encoder_row;
    encoder.col_offset = net.encoder_col;
    encoder.rows = net.hidden;
    encoder.cols = net.inputs;
    encoder.population = net.population;
    encoder.fan_in = net.fan_in;
    encoder.batch = net.batch;
    encoder.x = net.x;
    draw_columns(encoder, runtime, 0, groups, columns);
    std::fill_n(counts, counters * bins, 0u);
    parallel_for(runtime, groups, count_grain, [&](int64_t begin, int64_t end, int64_t worker) {
      uint32_t* mine = counts + worker * bins;
      for (int64_t first = begin * kSparseRows; first < end * kSparseRows; first += k.lanes) {
        const uint32_t* drawn = columns + first * net.fan_in;
        const int64_t lanes = std::min<int64_t>(k.lanes, net.hidden - first);
        for (int64_t s = 0; s < net.fan_in; ++s, drawn += k.lanes)
          for (int64_t lane = 0; lane < lanes; ++lane) ++mine[drawn[lane]];
      }
    });
    for (int64_t worker = 1; worker < counters; ++worker)
      for (int64_t i = 0; i < bins; ++i) counts[i] += counts[worker * bins + i];
    parallel_for(runtime, blocks, grain(2 * block_floats), [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t b = begin; b < end; ++b) {
        float* to = x + b * block_floats;
        transpose_rows(net.x, b * kBatch, rows(b), net.inputs, to);
        float* sum = mean + b * kBatch;
        std::fill_n(sum, kBatch, 0.0f);
        for (int64_t i = 0; i < net.inputs; ++i) {
          if (counts[i] == 0) continue;  // not even a NaN of an input that no unit draws
          const auto times = float(counts[i]);
          for (int lane = 0; lane < kBatch; ++lane) sum[lane] += times * to[i * kBatch + lane];
        }
        for (int lane = 0; lane < kBatch; ++lane)
          sum[lane] = sum[lane] * net.encoder_factor / float(net.hidden);
      }
    });
  }

  // The decoder's weights of groups [g0, g0 + count): codes times factor, [unit][class].
  void decode(int64_t g0, int64_t count) const {
    const int64_t per_word = columns_per_word(net.family);
    const int64_t head = net.decoder_row % kRowsPerPatch;
    const int64_t cost = kSparseRows * (2 * class_lanes() / k.lanes + net.classes);
    parallel_for(runtime, count, grain(cost), [&](int64_t begin, int64_t end, int64_t worker) {
      float* tile = decoded + worker * decoded_floats();
      for (int64_t g = begin; g < end; ++g) {
        const int64_t first = net.decoder_col + (g0 + g) * kSparseRows;
        const int64_t padding = first % per_word;
        float* to = weights + g * kSparseRows * net.classes;
        Tile t{};
        t.family = net.family;
        t.key = net.decoder_key;
        t.reduction_word = uint32_t(first / per_word);
        t.reduction_words = (padding + kSparseRows + per_word - 1) / per_word;
        for (int64_t c0 = -head; c0 < net.classes; c0 += class_lanes()) {
          t.output_word = uint32_t((net.decoder_row + c0) / kRowsPerPatch);
          k.decode(t, tile);
          for (int64_t c = std::max<int64_t>(0, c0); c < std::min(net.classes, c0 + class_lanes()); ++c) {
            const int64_t row = c - c0;
            const float* from =
                tile + padding * class_lanes() + row % kVectors * k.lanes + row / kVectors;
            for (int64_t u = 0; u < kSparseRows; ++u)
              to[u * net.classes + c] = from[u * class_lanes()] * net.decoder_factor;
          }
        }
      }
    });
  }

  // A kernel that computes the hidden units of group g for block b, with what it does of its own with them.
  template <class Kernel, class... Arguments>
  void run(Kernel kernel, int64_t g, int64_t b, Arguments... arguments) const {
    kernel(group_columns(g), net.fan_in, x + b * block_floats, mean + b * kBatch, net.encoder_factor,
           arguments...);
  }

  int64_t bank_row(const Bank& bank, int64_t m) const {
    return bank.rows == 1 ? 0 : net.context ? net.context[m] : m;
  }
};

}  // namespace

void flynet_logits(const FlyNet& net, const Runtime& runtime) {
  if (net.batch == 0) return;
  Sweep sweep{net, runtime};
  sweep.prepare();
  auto* sums = static_cast<float*>(sweep.allocate(sweep.blocks * net.classes * kBatch * 4));
  for (int64_t g0 = 0; g0 < sweep.groups; g0 += sweep.chunk) {
    const int64_t count = std::min(sweep.chunk, sweep.groups - g0);
    sweep.decode(g0, count);
    const int64_t cost = count * kSparseRows * (net.fan_in + net.classes + 4);
    parallel_for(runtime, sweep.blocks, grain(cost), [&](int64_t begin, int64_t end, int64_t) {
      alignas(64) float hidden[kSparseRows * kBatch];
      alignas(64) float gain[kSparseRows];
      for (int64_t b = begin; b < end; ++b) {
        float* sum = sums + b * net.classes * kBatch;
        if (g0 == 0) std::fill_n(sum, net.classes * kBatch, 0.0f);
        for (int64_t g = 0; g < count; ++g) {
          const int64_t first = (g0 + g) * kSparseRows, units = sweep.units(g0 + g);
          const float* weights = sweep.weights + g * kSparseRows * net.classes;
          if (net.gain.rows == 1 && net.classes <= sweep.k.fly.classes) {
            sweep.run(sweep.k.fly.logits, g0 + g, b, net.gain.data + first, weights, units, net.classes, sum);
            continue;
          }
          sweep.run(sweep.k.fly.hidden, g0 + g, b, hidden);
          if (net.gain.rows == 1) {
            std::copy_n(net.gain.data + first, units, gain);
          } else {
            std::fill_n(gain, units, 1.0f);
            for (int64_t lane = 0; lane < sweep.rows(b); ++lane) {
              const float* row =
                  net.gain.data + sweep.bank_row(net.gain, b * kBatch + lane) * net.hidden + first;
              for (int64_t u = 0; u < units; ++u) hidden[u * kBatch + lane] *= row[u];
            }
          }
          sweep.k.fly.readout(hidden, gain, weights, units, net.classes, sum);
        }
      }
    });
  }
  for (int64_t m = 0; m < net.batch; ++m) {
    for (int64_t c = 0; c < net.classes; ++c) {
      write_row(net.logits, m, c, 1, sums + (m / kBatch * net.classes + c) * kBatch + m % kBatch);
    }
  }
}

void flynet_gain_grad(const FlyNet& net, const Runtime& runtime) {
  if (net.batch == 0) return;
  Sweep sweep{net, runtime};
  sweep.prepare();
  const int64_t d_floats = (net.classes + 1) * kBatch;
  auto* d_logits = static_cast<float*>(sweep.allocate(sweep.blocks * d_floats * 4));
  for (int64_t b = 0; b < sweep.blocks; ++b)
    transpose_rows(net.logits, b * kBatch, sweep.rows(b), net.classes, d_logits + b * d_floats);
  for (int64_t g0 = 0; g0 < sweep.groups; g0 += sweep.chunk) {
    const int64_t count = std::min(sweep.chunk, sweep.groups - g0);
    sweep.decode(g0, count);
    const int64_t cost = sweep.blocks * kSparseRows * (net.fan_in + net.classes + 4);
    parallel_for(runtime, count, grain(cost), [&](int64_t begin, int64_t end, int64_t) {
      alignas(64) float product[kSparseRows * kBatch];
      alignas(64) float total[kSparseRows * kBatch];
      for (int64_t g = begin; g < end; ++g) {
        const int64_t first = (g0 + g) * kSparseRows, units = sweep.units(g0 + g);
        std::fill_n(total, kSparseRows * kBatch, 0.0f);
        for (int64_t b = 0; b < sweep.blocks; ++b) {
          const bool one = net.gain_grad.rows == 1;
          sweep.run(sweep.k.fly.products, g0 + g, b, d_logits + b * d_floats,
                    sweep.weights + g * kSparseRows * net.classes, net.classes, one, one ? total : product);
          if (one) continue;
          for (int64_t lane = 0; lane < sweep.rows(b); ++lane) {
            float* row = net.gain_grad.data +
                         sweep.bank_row(net.gain_grad, b * kBatch + lane) * net.hidden + first;
            for (int64_t u = 0; u < units; ++u) row[u] += product[u * kBatch + lane];
          }
        }
        if (net.gain_grad.rows != 1) continue;
        for (int64_t u = 0; u < units; ++u) {
          float sum = 0;
          for (int lane = 0; lane < kBatch; ++lane) sum += total[u * kBatch + lane];
          net.gain_grad.data[first + u] += sum;
        }
      }
    });
  }
}

}  // namespace nmkern::cpu
