/* 4-bit weights (NF4, FP4) and blockwise 8-bit numbers, in the formats of bitsandbytes (on a GPU of float16 too): see
 * enginepost/kernels/nf4.py for the rules.
 *
 * A tensor is quantised flat, in blocks of `blocksize` elements that share one scale, absmax; the last block may be short. Element
 * 2i is the high nibble of byte i, element 2i + 1 the low one. */
#ifndef ENGINEPOST_NF4_H_
#define ENGINEPOST_NF4_H_

#include "enginepost/core.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { EP_NF4 = 0, EP_FP4 = 1 };

/* x (N) float32 or bfloat16 -> packed (ceil(N / 2)) uint8, absmax (ceil(N / blocksize)) float32. blocksize: a power of two, 32 to
 * 4096. */
EP_EXPORT int ep_nf4_quantize(const DLTensor *x, const DLTensor *packed, const DLTensor *absmax, int64_t blocksize, int type,
                              void *stream);

/* A quantised tensor. absmax (blocks) is float32, or uint8 when the scales are quantised themselves ("double quantisation"): then
 * scale_i = nested_code[absmax_i] * nested_absmax[i / 256] + offset, with nested_absmax (ceil(blocks / 256)) and nested_code (256)
 * float32. Without: both NULL. */
typedef struct ep_nf4_tensor {
  const DLTensor *packed, *absmax, *nested_absmax, *nested_code;
  double offset;
  int64_t blocksize;
  int type;
} ep_nf4_tensor;

/* -> out (N) float32 or bfloat16: code * scale in float32, rounded once. */
EP_EXPORT int ep_nf4_dequantize(ep_nf4_tensor w, const DLTensor *out, void *stream);

/* The matrix products of a linear layer whose weight (n, k) is quantised; float32 accumulation, never a whole dequantised weight.
 *
 *   transposed == 0:  c (M, n) = a (M, k) weight^T      the layer
 *   transposed != 0:  c (M, k) = a (M, n) weight        the gradient of its input
 *
 * plus a2 (M, K2) b2 (K2, columns of c) where given, and plus c itself where accumulate != 0. a, a2, b2, c are float32 or bfloat16,
 * laid out as ep_matmul takes them. `workspace` has ep_nf4_matmul_workspace_bytes_for these arguments, 64-byte aligned. On a GPU
 * the weight is rounded to a's type before it is multiplied, and for many rows it is decoded as a whole, into the workspace. */
EP_EXPORT int ep_nf4_matmul(const DLTensor *a, ep_nf4_tensor weight, int64_t n, int64_t k, int transposed, const DLTensor *a2,
                            const DLTensor *b2, const DLTensor *c, int accumulate, void *workspace, void *stream);
/* Bytes on the device where the tensors are; 0 where they are no good (ep_nf4_matmul says why). */
EP_EXPORT int64_t ep_nf4_matmul_workspace_bytes_for(const DLTensor *a, ep_nf4_tensor weight, int64_t n, int64_t k, int transposed,
                                                    const DLTensor *a2, const DLTensor *b2, const DLTensor *c);
/* The same for tensors in CPU memory, by their shapes; k2: K2, or 0. */
EP_EXPORT int64_t ep_nf4_matmul_workspace_bytes(int64_t m, int64_t n, int64_t k, int transposed, int64_t k2);

/* The dynamic 8-bit code: 256 float32 values, ascending, in [-1, 1] (is_signed) or [0, 1]. */
EP_EXPORT const float *ep_dynamic_code(int is_signed);

/* x (N) float32 or bfloat16 -> q (N) uint8, absmax (ceil(N / blocksize)) float32: the nearest value of the dynamic code to
 * x / absmax, a tie going down. blocksize: a power of two, 32 to 4096. */
EP_EXPORT int ep_blockwise8_quantize(const DLTensor *x, const DLTensor *q, const DLTensor *absmax, int64_t blocksize, int is_signed,
                                     void *stream);
/* out (N) float32 or bfloat16 = code[q] * absmax[i / blocksize] + offset; code (256) float32. */
EP_EXPORT int ep_blockwise8_dequantize(const DLTensor *q, const DLTensor *absmax, const DLTensor *code, const DLTensor *out,
                                       int64_t blocksize, double offset, void *stream);

#ifdef __cplusplus
}
#endif
#endif
