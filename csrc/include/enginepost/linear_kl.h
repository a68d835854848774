/* What a divergence of two next-token distributions makes of logits, a block of the vocabulary at a time, so that no (T, V) logits
 * are ever held; the products are those of matmul.h. Formulas: enginepost/kernels/linear_kl.py.
 *
 *   z = softcap tanh(u / softcap) / temperature        (softcap 0: u / temperature)
 *
 * u, teacher (T, n) float32, rows contiguous at any stride: the products hidden head^T of the student and the teacher for the
 * vocabulary entries [first, first + n). The blocks are called with in order; that with first = 0 begins the sums. A row's results
 * depend on that row and on how the vocabulary is cut, not on the other rows or the thread count. On a GPU nothing is waited for.
 */
#ifndef ENGINEPOST_LINEAR_KL_H_
#define ENGINEPOST_LINEAR_KL_H_

#include "enginepost/core.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { EP_KL_FORWARD = 0, EP_KL_REVERSE = 1, EP_KL_JS = 2 };

typedef struct {
  int kind;
  double beta; /* EP_KL_JS: the teacher's weight, in (0, 1) */
  double temperature, softcap, teacher_softcap;
  int64_t first;
} ep_linear_kl_params;

/* sums (T, 5) float32, contiguous: of the student the largest z so far and the sum of exp(z - largest), the same two of the
 * teacher, and with forward or reverse the sum of exp(z_w - largest_w) ((z - largest) - (z_teacher - largest_teacher)) with w the
 * teacher or the student.
 *
 * Teacher by its k most likely tokens instead (teacher NULL): ids (T, k) int64 and chosen (T, k) float32, contiguous. Where ids is
 * in the block, z goes to chosen, does not count in the sums, and u is overwritten; ids of a row differ, -1 is padding. */
EP_EXPORT int ep_linear_kl_scan(const DLTensor *u, const DLTensor *teacher, const DLTensor *ids, const DLTensor *chosen,
                                const DLTensor *sums, ep_linear_kl_params params, void *stream);

/* Second pass of EP_KL_JS. norm (T, 4) float32: largest z and log of the sum, of both sides. sums (T, 2) float32: of
 * q (log q - log m) and of p (log p - log m), m = beta q + (1 - beta) p. */
EP_EXPORT int ep_linear_kl_compare(const DLTensor *u, const DLTensor *teacher, const DLTensor *norm, const DLTensor *sums,
                                   ep_linear_kl_params params, void *stream);

/* du (T, n), float32 (also u itself) or bfloat16 (on a GPU float16 too) = dkl (T) times the gradient of the divergence by u.
 * state (T, 5) float32: norm, and the mean under p of log p - log q less the logs of the sums (reverse) or of log p - log m (js).
 * With ids: state (T, 3): largest z, log of the sum, and what p of a token that was not chosen is multiplied by; dchosen (T, k):
 * the gradient by u of those that were, before dkl. */
EP_EXPORT int ep_linear_kl_gradient(const DLTensor *u, const DLTensor *teacher, const DLTensor *ids, const DLTensor *dchosen,
                                    const DLTensor *state, const DLTensor *dkl, const DLTensor *du, ep_linear_kl_params params,
                                    void *stream);

#ifdef __cplusplus
}
#endif
#endif
