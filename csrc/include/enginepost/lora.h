/* Dropout of a low-rank update's input; its products are those of matmul.h and nf4.h. */
#ifndef ENGINEPOST_LORA_H_
#define ENGINEPOST_LORA_H_

#include "enginepost/core.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out = x / (1 - dropout) where an element is kept, 0 where it is dropped; x, out (T, K) of one dtype, float32 or bfloat16 (on a
 * GPU float16 too), rows contiguous at any stride; out may be x. dropout in [0, 1). Which elements are kept depends on seed, row
 * and column alone, and is the same on every device: enginepost/kernels/lora.py, keep_mask. */
EP_EXPORT int ep_lora_dropout(const DLTensor *x, const DLTensor *out, double dropout, uint64_t seed, void *stream);

#ifdef __cplusplus
}
#endif
#endif
