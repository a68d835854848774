// The arguments of the rope kernels, on the CPU and on the GPU.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "isa.h"

namespace ep {
struct Rope {
  const char *x;
  const float *cos, *sin;
  char *y;
  int64_t tokens, heads, rotated_heads, dim, half, x_stride, y_stride;
  bool inverse;
  unsigned dtype;
};
}  // namespace ep

EP_KERNEL(rope_rotate, Rope)
EP_CUDA_KERNEL(rope_rotate, Rope)
