/* Log-probability of one target per row straight from hidden states and the head's weight; the (T, V) logits are never held.
 *
 *   u = hidden weight^T        softcap c > 0: z = c * tanh(u / c), else z = u
 *   lse_t = log sum_v exp(z_tv)        logprob_t = z_t,y(t) - lse_t        entropy_t = lse_t - sum_v p_tv z_tv
 *
 * hidden (T, K) and weight (V, K) are float32 or bfloat16 each, rows contiguous at any stride; targets (T) int64 in [0, V), or
 * -100: such rows cost nothing and give zeros. Arithmetic is float32. The result of a row depends neither on the other rows nor on
 * the thread count, to the last bit.
 *
 * On a GPU hidden and weight are of one type, bfloat16 or float16, and nobody waits to look at the targets: one that is outside of
 * the vocabulary gives NaN. Results are the same bits every time; those of the gradients depend on the number of rows. */
#ifndef ENGINEPOST_LINEAR_LOGPROB_H_
#define ENGINEPOST_LINEAR_LOGPROB_H_

#include "enginepost/core.h"

#ifdef __cplusplus
extern "C" {
#endif

/* -> logprob, lse (T) float32; entropy (T) float32 or NULL; direction (T, K) float32 or NULL:
 *
 *   direction_t = d logprob_t / d hidden_t = z'_t,y weight[y] - sum_v p_tv z'_tv weight[v],        z' = dz / du = 1 - (z / c)^2
 *
 * made in the same pass. With a frozen head it is all that the backward pass of any loss needs: dhidden_t = dlogprob_t *
 * direction_t. */
EP_EXPORT int ep_linear_logprob_forward(const DLTensor *hidden, const DLTensor *weight, const DLTensor *targets,
                                        const DLTensor *logprob, const DLTensor *lse, const DLTensor *entropy,
                                        const DLTensor *direction, double softcap, void *workspace, void *stream);
/* Bytes for these arguments, on the device where they are; the functions that take sizes are for CPU memory. On a GPU: 0.3 GB at
 * any T and V, beside 4 bytes a token; the backward pass has copies of hidden in its own type and in float32 beside them. */
EP_EXPORT int64_t ep_linear_logprob_forward_workspace_bytes_for(const DLTensor *hidden, const DLTensor *weight,
                                                                const DLTensor *direction);
EP_EXPORT int64_t ep_linear_logprob_forward_workspace_bytes(int64_t tokens, int64_t width);

/* The same where the weight comes a part at a time, so that a head larger than memory can be read from its file: call with the rows
 * [first, first + n) of weight (vocab, K), in order from first = 0. n is a multiple of EP_LINEAR_LOGPROB_PART except in the last
 * part. The last call leaves the results, which are those of ep_linear_logprob_forward to the last bit; the others leave what they
 * need in state (4, T) float32 and direction. target_rows (T, K) in weight's dtype holds weight[targets] (skipped rows are not
 * looked at); NULL together with direction. For CPU memory; the workspace is that of ep_linear_logprob_forward and holds nothing
 * between calls. */
#define EP_LINEAR_LOGPROB_PART 4032
EP_EXPORT int ep_linear_logprob_forward_part(const DLTensor *hidden, const DLTensor *weight, const DLTensor *targets,
                                             const DLTensor *target_rows, const DLTensor *state, const DLTensor *logprob,
                                             const DLTensor *lse, const DLTensor *entropy, const DLTensor *direction,
                                             double softcap, int64_t first, int64_t vocab, void *workspace, void *stream);

/* dlogprob (T), and dentropy with entropy (T) or both NULL -> dhidden (T, K) in hidden's dtype or NULL, dweight (V, K) in weight's
 * dtype or NULL. Logits are made again from lse, block by block; both gradients are summed in float32 in a fixed order. */
EP_EXPORT int ep_linear_logprob_backward(const DLTensor *dlogprob, const DLTensor *dentropy, const DLTensor *hidden,
                                         const DLTensor *weight, const DLTensor *targets, const DLTensor *lse,
                                         const DLTensor *entropy, const DLTensor *dhidden, const DLTensor *dweight, double softcap,
                                         void *workspace, void *stream);
EP_EXPORT int64_t ep_linear_logprob_backward_workspace_bytes_for(const DLTensor *hidden, const DLTensor *weight,
                                                                 const DLTensor *dhidden, const DLTensor *dweight);
EP_EXPORT int64_t ep_linear_logprob_backward_workspace_bytes(int64_t tokens, int64_t width);

#ifdef __cplusplus
}
#endif
#endif
