// The arguments of the linear_kl kernels, on the CPU and on the GPU.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "isa.h"

namespace ep {
struct KlSide {
  float *u;     // (rows, width); written where a top-k teacher has chosen
  int64_t row;  // stride
  float softcap;
};
struct LinearKl {
  KlSide student, teacher;  // teacher.u null: top-k
  int64_t rows, width, first, k;
  const int64_t *ids;  // (rows, k)
  float *chosen;       // (rows, k): z, or in the gradient du before dkl
  float *sums;         // (rows, 5) or (rows, 2)
  const float *norm;   // (rows, 4), state (rows, 5) or (rows, 3)
  int64_t norm_row;
  const float *dkl;
  char *du;
  int64_t du_row;
  unsigned du_dtype;
  int kind;
  float beta, temperature;
};
constexpr float KL_NOTHING = -1e30f;  // the largest of no numbers
constexpr int KL_SUMS = 5;
}  // namespace ep

EP_KERNEL(linear_kl_scan, LinearKl)
EP_KERNEL(linear_kl_compare, LinearKl)
EP_KERNEL(linear_kl_gradient, LinearKl)
EP_CUDA_KERNEL(linear_kl_scan, LinearKl)
EP_CUDA_KERNEL(linear_kl_compare, LinearKl)
EP_CUDA_KERNEL(linear_kl_gradient, LinearKl)
