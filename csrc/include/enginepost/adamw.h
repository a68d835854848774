/* AdamW with decoupled weight decay, one tensor a call: see enginepost/kernels/adamw.py for the formula. */
#ifndef ENGINEPOST_ADAMW_H_
#define ENGINEPOST_ADAMW_H_

#include "enginepost/core.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  double lr, beta1, beta2, eps, weight_decay;
  int64_t step;      /* from 1 */
  double grad_scale; /* multiplies the gradient: the clip of the global norm */
} ep_adamw_params;

/* param, grad (N) float32 or bfloat16; exp_avg, exp_avg_sq (N) float32; master (N) float32 or NULL: the exact parameter where param
 * is bfloat16. Updated in place. */
EP_EXPORT int ep_adamw_step(const DLTensor *param, const DLTensor *grad, const DLTensor *exp_avg, const DLTensor *exp_avg_sq,
                            const DLTensor *master, ep_adamw_params params, void *stream);

/* The same with moments in 8 bits, in blocks of 256 elements: codes (N) uint8 of the dynamic code of nf4.h, signed for exp_avg and
 * unsigned for exp_avg_sq, and a scale per block (ceil(N / 256)) float32; all zero at first. Where a gradient is not finite both
 * moments become 0 and the parameter stays. */
EP_EXPORT int ep_adamw8_step(const DLTensor *param, const DLTensor *grad, const DLTensor *exp_avg, const DLTensor *exp_avg_sq,
                             const DLTensor *exp_avg_scale, const DLTensor *exp_avg_sq_scale, const DLTensor *master,
                             ep_adamw_params params, void *stream);

/* *result = sum of squares of x (N) float32 or bfloat16, float64 in a fixed order; result lies in the memory of x. On a GPU: of any
 * float dtype, with the bits of the CPU's AVX2 kernels. */
EP_EXPORT int ep_sum_squares(const DLTensor *x, double *result, void *workspace, void *stream);
EP_EXPORT int64_t ep_sum_squares_workspace_bytes(int64_t size);

#ifdef __cplusplus
}
#endif
#endif
