// The paper's network in one sweep over its hidden units on CUDA, free of any framework.
//
//   m[b, h] = encoder_factor * sum over the ones k of the encoder's row h: x[b, k]
//   r[b, h] = max(0, m[b, h] - mean over h of m[b, h])
//   logits[b, c] = decoder_factor * sum_h code[c, h] * gain[t, h] * r[b, h]           t = context of b
//   gain_grad[t, h] = sum over b of t: r[b, h] * decoder_factor * sum_c code[c, h] * d_logits[b, c]
//
// Sizes and strides count elements; every pointer is the device's. The contract is that of cpu/flynet.h, but
// for contexts out of range (see bank_row).
#pragma once

#include "../matrix.h"
#include "../stream.h"

namespace nmkern::cuda {

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
  Matrix x;        // [M, inputs]
  Matrix logits;   // [M, classes]: written forward, read backward
  Bank gain;       // [T, hidden], read forward
  Bank gain_grad;  // [T, hidden], overwritten backward; backward is where it has rows
  const int64_t* context = nullptr;
};

// Scratch that the call needs, in bytes; -1 where the kernels have no room for it in 64 MiB, or in the shared
// memory that a block may have. Pointers and strides do not matter.
int64_t flynet_scratch(const FlyNet& net, int64_t shared_bytes);

// Enqueues the call on a cudaStream_t and waits for nothing; a cudaError_t. `scratch` is 16-byte aligned.
int flynet_sweep(const FlyNet& net, void* scratch, void* stream);

}  // namespace nmkern::cuda
