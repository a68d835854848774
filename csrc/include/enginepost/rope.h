/* Rotary position embedding, half-split layout: see enginepost/kernels/rope.py for the formula. */
#ifndef ENGINEPOST_ROPE_H_
#define ENGINEPOST_ROPE_H_

#include "enginepost/core.h"

#ifdef __cplusplus
extern "C" {
#endif

/* x (T, H, D) float32 or bfloat16, tokens at any stride; cos, sin (T, R/2) float32 with R <= D; y (T, H, D), may be x itself.
 * The first `heads` heads are rotated (by the conjugate angle when inverse != 0), the rest copied. */
EP_EXPORT int ep_rope(const DLTensor *x, const DLTensor *cos, const DLTensor *sin, const DLTensor *y, int64_t heads, int inverse,
                      void *stream);

#ifdef __cplusplus
}
#endif
#endif
