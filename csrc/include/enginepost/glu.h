/* Gated linear unit: y = act(gate) * up with gate and up side by side in one tensor (T, 2I) = [gate | up]. */
#ifndef ENGINEPOST_GLU_H_
#define ENGINEPOST_GLU_H_

#include "enginepost/core.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { EP_SILU = 0, EP_GELU_TANH = 1, EP_GELU = 2 };

/* gate_up (T, 2I) -> y (T, I); float32 or bfloat16, rows contiguous. */
EP_EXPORT int ep_glu_forward(const DLTensor *gate_up, const DLTensor *y, int activation, void *stream);
/* dy (T, I), gate_up (T, 2I) -> dgate_up (T, 2I), which may be gate_up itself. */
EP_EXPORT int ep_glu_backward(const DLTensor *dy, const DLTensor *gate_up, const DLTensor *dgate_up, int activation, void *stream);

#ifdef __cplusplus
}
#endif
#endif
