/* RMSNorm: y = x * rsqrt(mean(x^2) + eps) * (offset + weight), alone or after a residual addition. float32 or bfloat16 tensors,
 * float32 arithmetic. Rows are contiguous; x, y, h, residual share one dtype; weight is float32 or that dtype. */
#ifndef ENGINEPOST_NORM_H_
#define ENGINEPOST_NORM_H_

#include "enginepost/core.h"

#ifdef __cplusplus
extern "C" {
#endif

/* x (T, H), weight (H) -> y (T, H), rstd (T) float32. */
EP_EXPORT int ep_rms_norm_forward(const DLTensor *x, const DLTensor *weight, const DLTensor *y, const DLTensor *rstd, double eps,
                                  double offset, void *stream);

/* h = residual + x, rounded; y = norm(h). All (T, H); rstd (T) float32. h may be x or residual itself. */
EP_EXPORT int ep_add_rms_norm_forward(const DLTensor *x, const DLTensor *residual, const DLTensor *weight, const DLTensor *y,
                                      const DLTensor *h, const DLTensor *rstd, double eps, double offset, void *stream);

/* dx = dh + gradient of the norm at x; dh may be NULL. dweight (H) in weight's dtype, or NULL when the weight is frozen; it is
 * summed over rows in a fixed order and needs `workspace` of ep_rms_norm_backward_workspace_bytes. */
EP_EXPORT int ep_rms_norm_backward(const DLTensor *dy, const DLTensor *dh, const DLTensor *x, const DLTensor *weight,
                                   const DLTensor *rstd, const DLTensor *dx, const DLTensor *dweight, void *workspace,
                                   double offset, void *stream);
EP_EXPORT int64_t ep_rms_norm_backward_workspace_bytes(int64_t rows, int64_t width);

#ifdef __cplusplus
}
#endif
#endif
