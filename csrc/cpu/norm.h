// The arguments of the norm kernels, on the CPU and on the GPU.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "isa.h"

namespace ep {

struct NormForward {
  const char *x, *residual, *weight;  // residual null: plain norm
  char *y, *h;
  float *rstd;
  int64_t rows, width;
  float eps, offset;
  unsigned dtype, weight_dtype;
};

struct NormBackward {
  const char *dy, *dh, *x, *weight;
  const float *rstd;
  char *dx, *dweight;
  float *partial;  // (tasks, H) at most, null when dweight is not wanted
  int64_t rows, width;
  float offset;
  unsigned dtype, weight_dtype;
};

constexpr int64_t NORM_ROWS = 16;  // of a task, so of a partial sum of dweight
static inline int64_t norm_tasks(int64_t rows) { return (rows + NORM_ROWS - 1) / NORM_ROWS; }

}  // namespace ep

EP_KERNEL(norm_forward, NormForward)
EP_KERNEL(norm_backward, NormBackward)
EP_CUDA_KERNEL(norm_forward, NormForward)
EP_CUDA_KERNEL(norm_backward, NormBackward)
