// The arguments of the lora kernels, on the CPU and on the GPU, and the hash that both drop by.
//
//   key = 64 bits of the seed;  line(row) = mix(row A + low(key));  bits = mix(line(row) + column B + high(key));  kept: bits >=
//   threshold
//
// all in 32 bits that wrap, mix the finalizer of MurmurHash3 (public domain), of which 31 bits are used.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "isa.h"

namespace ep {
struct LoraDropout {
  const char *x;
  char *out;
  int64_t rows, width, x_row, out_row;  // strides of rows, in elements
  uint32_t low, high;                   // the key
  int32_t threshold;                    // of 2^31
  float scale;
  unsigned dtype;
};
constexpr uint32_t DROPOUT_ROW = 0x9E3779B1u, DROPOUT_COLUMN = 0x85EBCA77u;
}  // namespace ep

EP_KERNEL(lora_dropout, LoraDropout)
EP_CUDA_KERNEL(lora_dropout, LoraDropout)
