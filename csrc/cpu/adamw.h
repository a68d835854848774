// The arguments of the adamw kernels, on the CPU and on the GPU.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "isa.h"

namespace ep {
struct DynamicCode;
struct AdamW {
  char *param;
  const char *grad;
  float *m, *v, *master;
  int64_t size;
  float keep1, take1, keep2, take2, eps, decay, step_size, inv_c2, scale;  // keep = beta, take = 1 - beta
  unsigned dtype, grad_dtype;
};
struct AdamW8 {
  AdamW step;  // m and v unused
  uint8_t *m, *v;
  float *m_scale, *v_scale;
  const DynamicCode *m_code, *v_code;
};
constexpr int64_t GROUP = 256;  // elements of a scale
struct SumSquares {
  const char *x;
  int64_t size;
  unsigned dtype;
  double *partial;  // one per SQUARES_BLOCK
  double *result;
};
constexpr int64_t SQUARES_BLOCK = 16384, SQUARES_TILE = 256;  // elements of a partial sum, and of the float32 sums it is made of
static inline int64_t squares_blocks(int64_t size) { return (size + SQUARES_BLOCK - 1) / SQUARES_BLOCK; }
}  // namespace ep

EP_KERNEL(adamw_step, AdamW)
EP_KERNEL(adamw8_step, AdamW8)
EP_KERNEL(sum_squares, SumSquares)
EP_CUDA_KERNEL(adamw_step, AdamW)
EP_CUDA_KERNEL(adamw8_step, AdamW8)
EP_CUDA_KERNEL(sum_squares, SumSquares)
