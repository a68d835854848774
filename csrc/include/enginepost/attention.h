/* Attention over a packed stream of sequences: no padding, no mask tensor, no [T, T] buffer.
 *
 *   s_ij = scale * q_i . k_j        softcap c > 0: s = c * tanh(s / c)
 *   out_i = sum_j exp(s_ij - lse_i) v_j        lse_i = log sum_j exp(s_ij), over the keys that query i sees
 *
 * Query i of Tq sees key j of Tk when j <= i + Tk - Tq (causal) and j > i + Tk - Tq - window (window > 0). A query that sees
 * nothing has out 0 and lse -infinity. float32 or bfloat16 tensors (on a GPU bfloat16 or float16), float32 sums.
 *
 * q, k, v, out and their gradients are (tokens, heads, head_dim), head_dim contiguous, any stride between heads and tokens, so that
 * slices of one fused projection pass as they are. H is a multiple of Hk; head_dim is 1 to 256. */
#ifndef ENGINEPOST_ATTENTION_H_
#define ENGINEPOST_ATTENTION_H_

#include "enginepost/core.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ep_attention_params {
  int causal;
  int64_t window; /* 0 = unlimited */
  double softcap; /* 0 = none */
  double scale;
  int unordered; /* GPU, backward: 1 = add up dq in whatever order blocks come, a little faster and not the same bits twice */
} ep_attention_params;

/* q (T, H, D), k and v (Tk, Hk, D) -> out (T, H, D), lse (H, T) float32.
 * cu_seqlens (S + 1) int32: where each sequence's queries begin, from 0 to T. cu_seqlens_k: the same for keys, 0 to Tk; NULL =
 * cu_seqlens. seqused_k (S) int32: how many keys of each sequence count; NULL = all. */
EP_EXPORT int ep_attention_forward(const DLTensor *q, const DLTensor *k, const DLTensor *v, const DLTensor *cu_seqlens,
                                   const DLTensor *cu_seqlens_k, const DLTensor *seqused_k, const DLTensor *out,
                                   const DLTensor *lse, ep_attention_params params, void *workspace, void *stream);
EP_EXPORT int64_t ep_attention_forward_workspace_bytes(int64_t sequences, int64_t head_dim);
/* What it takes on a GPU. keys: rows of k; with pages, max_blocks * page_size. */
EP_EXPORT int64_t ep_attention_forward_gpu_workspace_bytes(int64_t tokens, int64_t heads, int64_t head_dim, int64_t keys);

/* The same for queries of running sequences whose keys lie in pages of a cache. q (T, H, D), k_cache and v_cache
 * (num_pages, page_size, Hk, D), D contiguous, any other stride -> out (T, H, D), lse (H, T) float32.
 * cu_seqlens (S + 1) int32: where each sequence's queries begin; NULL = one query each, T = S. block_table (S, max_blocks) int32,
 * rows at any stride: key j of sequence b is row j % page_size of page block_table[b][j / page_size]. seqused_k (S) int32: keys of
 * each sequence, its new ones included; entries of block_table beyond them are not read. The workspace is
 * ep_attention_forward_workspace_bytes. */
EP_EXPORT int ep_paged_attention(const DLTensor *q, const DLTensor *k_cache, const DLTensor *v_cache, const DLTensor *cu_seqlens,
                                 const DLTensor *block_table, const DLTensor *seqused_k, const DLTensor *out, const DLTensor *lse,
                                 ep_attention_params params, void *workspace, void *stream);

/* The gradients of q, k and v from that of out; the same bits at any thread count. Keys beyond seqused_k get gradient 0. */
EP_EXPORT int ep_attention_backward(const DLTensor *dout, const DLTensor *q, const DLTensor *k, const DLTensor *v,
                                    const DLTensor *out, const DLTensor *lse, const DLTensor *cu_seqlens,
                                    const DLTensor *cu_seqlens_k, const DLTensor *seqused_k, const DLTensor *dq, const DLTensor *dk,
                                    const DLTensor *dv, ep_attention_params params, void *workspace, void *stream);
EP_EXPORT int64_t ep_attention_backward_workspace_bytes(int64_t sequences, int64_t tokens, int64_t heads, int64_t kv_heads,
                                                        int64_t head_dim);
EP_EXPORT int64_t ep_attention_backward_gpu_workspace_bytes(int64_t sequences, int64_t tokens, int64_t heads, int64_t kv_heads,
                                                            int64_t head_dim);

#ifdef __cplusplus
}
#endif
#endif
