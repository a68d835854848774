/* Matrix product: c = a b (+ a2 b2) (+ c), float32 accumulation, float32 or bfloat16 tensors in any mix, on a GPU float16 too. */
#ifndef ENGINEPOST_MATMUL_H_
#define ENGINEPOST_MATMUL_H_

#include "enginepost/core.h"

#ifdef __cplusplus
extern "C" {
#endif

/* a (M, K), b (K, N), optional a2 (M, K2), b2 (K2, N): each contiguous along one of its two dimensions, so transposed views are
 * fine. c (M, N) with contiguous rows at any stride; it may not overlap an input. accumulate != 0 adds to c instead of replacing
 * it. The second product shares the accumulators of the first: a low-rank update costs no pass over c. `workspace` has
 * ep_matmul_workspace_bytes_for these tensors, 64-byte aligned. */
EP_EXPORT int ep_matmul(const DLTensor *a, const DLTensor *b, const DLTensor *a2, const DLTensor *b2, const DLTensor *c,
                        int accumulate, void *workspace, void *stream);
/* Bytes for these arguments, on the device where they are; 0 where they are no good (ep_matmul says why). */
EP_EXPORT int64_t ep_matmul_workspace_bytes_for(const DLTensor *a, const DLTensor *b, const DLTensor *a2, const DLTensor *b2,
                                                const DLTensor *c);
/* The same for tensors in CPU memory, by their shapes; k is K + K2. */
EP_EXPORT int64_t ep_matmul_workspace_bytes(int64_t m, int64_t n, int64_t k);

#ifdef __cplusplus
}
#endif
#endif
