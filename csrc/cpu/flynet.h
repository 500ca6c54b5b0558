// The paper's network in one sweep over its hidden units, free of any framework.
//
//   m[b, h] = encoder_factor * sum over the ones k of the encoder's row h: x[b, k]
//   r[b, h] = max(0, m[b, h] - mean over h of m[b, h])
//   logits[b, c] = decoder_factor * sum_h code[c, h] * gain[t, h] * r[b, h]           t = context of b
//   gain_grad[t, h] = decoder_factor * sum over b of t: r[b, h] * sum_c code[c, h] * d_logits[b, c]
//
// No activation of hidden size is kept: the backward pass computes r again.
#pragma once

#include "dense.h"

namespace nmkern::cpu {

struct FlyNet {
  int64_t inputs, hidden, classes;

  Key encoder_key;
  int64_t encoder_row, encoder_col, population, fan_in;
  float encoder_factor;

  Family family;  // of the decoder
  Key decoder_key;
  int64_t decoder_row, decoder_col;
  float decoder_factor;

  int64_t batch;
  Matrix x;       // [M, inputs]
  Matrix logits;  // [M, classes]: written forward, read backward
  Bank gain;      // [T, hidden], read forward
  Bank gain_grad;  // [T, hidden], added to backward
  const int64_t* context = nullptr;
};

void flynet_logits(const FlyNet& net, const Runtime& runtime);
void flynet_gain_grad(const FlyNet& net, const Runtime& runtime);

}  // namespace nmkern::cpu
