// The arguments of the glu kernels, on the CPU and on the GPU.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "isa.h"

namespace ep {
struct Glu {
  const char *dy, *x;
  char *out;  // y, or dx in the backward
  int64_t rows, width;
  int activation;
  unsigned dtype;
};
}  // namespace ep

EP_KERNEL(glu_forward, Glu)
EP_KERNEL(glu_backward, Glu)
EP_CUDA_KERNEL(glu_forward, Glu)
EP_CUDA_KERNEL(glu_backward, Glu)
