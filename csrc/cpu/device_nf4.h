// A checked quantised tensor as the GPU's kernels take it (csrc/cuda/nf4.h).
#pragma once

#include "device_product.h"
#include "nf4_tile.h"

#if defined(EP_GPU)
#include "../cuda/nf4.h"

namespace ep {

static inline cuda::Nf4Tensor device_nf4(const Nf4 &w) {
  cuda::Nf4Tensor on{w.packed, w.absmax, w.absmax8, w.nested_absmax, w.nested_code, w.offset, w.shift, {}, w.size};
  for (int i = 0; i < 16; i++) on.code[i] = w.code[i];
  return on;
}

}  // namespace ep
#endif
