// Checks and entry points of attention; the passes are in attention_forward.cpp and attention_backward.cpp.
#include "enginepost/attention.h"

#include "attention.h"
#include "dispatch.h"
#include "parallel.h"
#ifdef EP_API
#include "../cuda/attention.h"
#endif

EP_CUDA_KERNEL(attention_forward, AttentionForward)
EP_CUDA_KERNEL(attention_backward, AttentionBackward)

#ifdef EP_API

using namespace ep;

static bool same_shape(const Tensor &a, const Tensor &b) {
  return a.shape[0] == b.shape[0] && a.shape[1] == b.shape[1] && a.shape[2] == b.shape[2];
}

static int check_like(const char *fn, const char *name, const Tensor &t, const char *like, const Tensor &of) {
  EP_REQUIRE(t.dtype == of.dtype, "%s: %s must have the dtype of %s", fn, name, like);
  EP_REQUIRE(same_shape(t, of), "%s: %s must have the shape of %s, (%lld, %lld, %lld), got (%lld, %lld, %lld)", fn, name, like,
             (long long)of.shape[0], (long long)of.shape[1], (long long)of.shape[2], (long long)t.shape[0], (long long)t.shape[1],
             (long long)t.shape[2]);
  return EP_OK;
}

// A result of three dimensions: nothing may be written twice, nor over the integers that say where to read.
static int check_output(const char *fn, const char *name, const Tensor &t, const Tensor &starts, const Tensor &starts_k,
                        const Tensor &used) {
  if (int status = check_apart(fn, name, t, "cu_seqlens", starts)) return status;
  if (int status = check_apart(fn, name, t, "cu_seqlens_k or block_table", starts_k)) return status;
  if (int status = check_apart(fn, name, t, "seqused_k", used)) return status;
  const bool apart = t.size == 0 || ((t.shape[1] == 1 || t.stride[1] >= t.shape[2]) &&
                                     (t.shape[0] == 1 || t.stride[0] >= (t.shape[1] - 1) * t.stride[1] + t.shape[2]));
  EP_REQUIRE(apart, "%s: %s has strides (%lld, %lld, 1), so that its rows overlap", fn, name, (long long)t.stride[0],
             (long long)t.stride[1]);
  return EP_OK;
}

static int check_lse(const char *fn, const Tensor &lse, const Tensor &starts, const Tensor &starts_k, const Tensor &used) {
  if (int status = check_apart(fn, "lse", lse, "cu_seqlens", starts)) return status;
  if (int status = check_apart(fn, "lse", lse, "cu_seqlens_k or block_table", starts_k)) return status;
  return check_apart(fn, "lse", lse, "seqused_k", used);
}

// What a GPU tensor holds cannot be checked without waiting for it: the kernels then trust it. The emulator's tensors can.
static bool readable(const Tensor &t) { return t.device.device_type == kDLCPU; }

static int check_starts(const char *fn, const char *name, const Tensor &t, int64_t tokens, const char *of) {
  EP_REQUIRE(t.contiguous && t.shape[0] >= 1, "%s: %s must be contiguous and hold at least one element", fn, name);
  if (!readable(t)) return EP_OK;
  const int32_t *p = reinterpret_cast<const int32_t *>(t.data);
  EP_REQUIRE(p[0] == 0, "%s: %s must begin with 0, got %d", fn, name, p[0]);
  for (int64_t b = 1; b < t.shape[0]; b++) {
    EP_REQUIRE(p[b] >= p[b - 1], "%s: %s must not decrease, but %s[%lld] = %d follows %d", fn, name, name, (long long)b, p[b],
               p[b - 1]);
  }
  EP_REQUIRE(p[t.shape[0] - 1] == tokens, "%s: %s must end with the number of rows of %s, %lld, got %d", fn, name, of,
             (long long)tokens, p[t.shape[0] - 1]);
  return EP_OK;
}

static int check_params(const char *fn, const ep_attention_params &params) {
  EP_REQUIRE(params.window >= 0, "%s: window must be 0 (none) or positive, got %lld", fn, (long long)params.window);
  EP_REQUIRE(params.softcap >= 0, "%s: softcap must be 0 (none) or positive, got %g", fn, params.softcap);
  EP_REQUIRE(params.scale - params.scale == 0, "%s: scale must be finite, got %g", fn, params.scale);
  return EP_OK;
}

// What q, the keys and the results have to do with each other; kv_heads and dim are those of the keys.
static int check_heads(const char *fn, const Tensor &q, const Tensor &out, const Tensor &lse, const char *keys, const Tensor &k,
                       int64_t kv_heads, int64_t dim) {
  const int64_t tokens = q.shape[0], heads = q.shape[1], head_dim = q.shape[2];
  EP_REQUIRE(head_dim >= 1 && head_dim <= 256, "%s: q has head dimension %lld; 1 to 256 is supported", fn, (long long)head_dim);
  EP_REQUIRE(k.dtype == q.dtype, "%s: %s must have the dtype of q", fn, keys);
  EP_REQUIRE(dim == head_dim, "%s: %s must have the head dimension of q, %lld, got %lld", fn, keys, (long long)head_dim,
             (long long)dim);
  EP_REQUIRE(kv_heads >= 1 && heads >= 1 && heads % kv_heads == 0, "%s: the %lld heads of q must be a multiple of the %lld of %s",
             fn, (long long)heads, (long long)kv_heads, keys);
  if (int status = check_like(fn, "out", out, "q", q)) return status;
  EP_REQUIRE(lse.contiguous && lse.shape[0] == heads && lse.shape[1] == tokens,
             "%s: lse must be contiguous with shape (%lld, %lld), got (%lld, %lld)", fn, (long long)heads, (long long)tokens,
             (long long)lse.shape[0], (long long)lse.shape[1]);
  return EP_OK;
}

static HeadRows rows_of(const Tensor &t) { return {t.data, t.stride[0], t.stride[1]}; }

namespace {
struct Inputs {
  Tensor q, k, v, out, lse, starts, starts_k, used;
  AttentionShape shape;
};
}  // namespace

// Everything that both passes take, in and out alike.
static int check_inputs(const char *fn, Inputs &in, const DLTensor *q, const DLTensor *k, const DLTensor *v,
                        const DLTensor *cu_seqlens, const DLTensor *cu_seqlens_k, const DLTensor *seqused_k, const DLTensor *out,
                        const DLTensor *lse, const ep_attention_params &params) {
  if (!view(in.q, q, fn, "q", 3, FLOATS | GPU) || !view(in.k, k, fn, "k", 3, FLOATS | GPU) ||
      !view(in.v, v, fn, "v", 3, FLOATS | GPU) || !view(in.out, out, fn, "out", 3, FLOATS | GPU) ||
      !view(in.lse, lse, fn, "lse", 2, F32 | GPU)) {
    return EP_INVALID_ARGUMENT;
  }
  EP_VIEW(starts, cu_seqlens, 1, I32 | GPU);
  EP_VIEW_OPTIONAL(starts_k, cu_seqlens_k, 1, I32 | GPU);
  EP_VIEW_OPTIONAL(used, seqused_k, 1, I32 | GPU);
  const int64_t tokens = in.q.shape[0], heads = in.q.shape[1], head_dim = in.q.shape[2], kv_heads = in.k.shape[1];
  if (int status = check_heads(fn, in.q, in.out, in.lse, "k", in.k, kv_heads, in.k.shape[2])) return status;
  if (int status = check_like(fn, "v", in.v, "k", in.k)) return status;
  if (int status = check_starts(fn, "cu_seqlens", starts, tokens, "q")) return status;
  if (starts_k) {
    EP_REQUIRE(starts_k.shape[0] == starts.shape[0], "%s: cu_seqlens_k must have as many elements as cu_seqlens, %lld, got %lld",
               fn, (long long)starts.shape[0], (long long)starts_k.shape[0]);
    if (int status = check_starts(fn, "cu_seqlens_k", starts_k, in.k.shape[0], "k")) return status;
  } else {
    EP_REQUIRE(in.k.shape[0] == tokens, "%s: k has %lld rows and q %lld; give cu_seqlens_k where they differ", fn,
               (long long)in.k.shape[0], (long long)tokens);
  }
  const int32_t *cu_k = reinterpret_cast<const int32_t *>(starts_k ? starts_k.data : starts.data);
  if (used) {
    EP_REQUIRE(used.contiguous && used.shape[0] == starts.shape[0] - 1,
               "%s: seqused_k must be contiguous with %lld elements, got %lld", fn, (long long)(starts.shape[0] - 1),
               (long long)used.shape[0]);
    const int32_t *u = reinterpret_cast<const int32_t *>(used.data);
    for (int64_t b = 0; readable(used) && b < used.shape[0]; b++) {
      EP_REQUIRE(u[b] >= 0 && u[b] <= cu_k[b + 1] - cu_k[b], "%s: seqused_k[%lld] = %d, but the sequence has %d keys", fn,
                 (long long)b, u[b], cu_k[b + 1] - cu_k[b]);
    }
  }
  if (int status = check_params(fn, params)) return status;
  in.starts = starts, in.starts_k = starts_k, in.used = used;
  in.shape = {reinterpret_cast<const int32_t *>(starts.data),
              cu_k,
              reinterpret_cast<const int32_t *>(used.data),
              starts.shape[0] - 1,
              tokens,
              heads,
              kv_heads,
              head_dim,
              params.window,
              float(params.softcap),
              float(params.scale),
              params.causal != 0,
              in.q.dtype,
              in.k.shape[0]};
  if (!starts_k && on_gpu(in.q.device))
    in.shape.cu_k = nullptr;  // a GPU tells training, where keys are the queries' own, from a cache
  return EP_OK;
}

static int64_t carve_forward(AttentionForward &a, char *workspace, int64_t sequences, int64_t head_dim) {
  Carver at{workspace};
  a.first_task = at.take<int64_t>(sequences + 1);
  a.scratch = at.take<float>(forward_scratch(head_dim) * num_threads());
  return at.bytes;
}

static int64_t carve_backward(AttentionBackward &a, char *workspace, int64_t sequences, int64_t tokens, int64_t heads,
                              int64_t kv_heads, int64_t head_dim) {
  Carver at{workspace};
  const int64_t group = kv_heads > 0 ? heads / kv_heads : 1;
  a.first_task = at.take<int64_t>(sequences + 1);
  a.first_turn = at.take<int64_t>(sequences + 1);
  a.turn = at.take<int32_t>((tokens * group / BACKWARD_ROWS + sequences) * kv_heads);
  a.scratch = at.take<float>(backward_scratch(head_dim) * num_threads());
  a.dq_sum = at.take<float>(tokens * heads * head_dim);
  return at.bytes;
}

extern "C" int64_t ep_attention_forward_workspace_bytes(int64_t sequences, int64_t head_dim) {
  AttentionForward unused;
  return carve_forward(unused, nullptr, sequences, head_dim);
}

extern "C" int64_t ep_attention_backward_workspace_bytes(int64_t sequences, int64_t tokens, int64_t heads, int64_t kv_heads,
                                                         int64_t head_dim) {
  AttentionBackward unused;
  return carve_backward(unused, nullptr, sequences, tokens, heads, kv_heads, head_dim);
}

// Of a GPU: torch, CUDA and every allocator give more than 16.
static int check_workspace(const char *fn, const void *workspace, bool gpu) {
  if (gpu) {
    EP_REQUIRE(reinterpret_cast<uintptr_t>(workspace) % 16 == 0, "%s: workspace must be 16-byte aligned", fn);
  } else {
    EP_REQUIRE(workspace != nullptr && reinterpret_cast<uintptr_t>(workspace) % 64 == 0, "%s: workspace must be 64-byte aligned",
               fn);
  }
  return EP_OK;
}

extern "C" int64_t ep_attention_forward_gpu_workspace_bytes(int64_t tokens, int64_t heads, int64_t head_dim, int64_t keys) {
  cuda::ForwardLaunch x;
  x.shape.tokens = int32_t(tokens), x.shape.heads = int32_t(heads), x.shape.head_dim = int32_t(head_dim), x.shape.keys = keys;
  return cuda::carve(x, nullptr);
}

extern "C" int64_t ep_attention_backward_gpu_workspace_bytes(int64_t sequences, int64_t tokens, int64_t heads, int64_t kv_heads,
                                                             int64_t head_dim) {
  cuda::BackwardLaunch x;
  x.shape.sequences = int32_t(sequences), x.shape.tokens = int32_t(tokens), x.shape.heads = int32_t(heads);
  x.shape.kv_heads = int32_t(kv_heads > 0 && heads >= kv_heads ? kv_heads : 1), x.shape.head_dim = int32_t(head_dim);
  x.shape.group = x.shape.heads / x.shape.kv_heads;
  return cuda::carve(x, nullptr);
}

extern "C" int ep_attention_forward(const DLTensor *q, const DLTensor *k, const DLTensor *v, const DLTensor *cu_seqlens,
                                    const DLTensor *cu_seqlens_k, const DLTensor *seqused_k, const DLTensor *out,
                                    const DLTensor *lse, ep_attention_params params, void *workspace, void *stream) {
  const char *fn = "attention_forward";
  Inputs in;
  if (int status = check_inputs(fn, in, q, k, v, cu_seqlens, cu_seqlens_k, seqused_k, out, lse, params)) return status;
  if (int status = check_output(fn, "out", in.out, in.starts, in.starts_k, in.used)) return status;
  if (int status = check_lse(fn, in.lse, in.starts, in.starts_k, in.used)) return status;
  if (in.out.size == 0) return EP_OK;
  if (int status = check_workspace(fn, workspace, on_gpu(in.q.device))) return status;
  AttentionForward a;
  a.shape = in.shape;
  a.q = rows_of(in.q), a.k = rows_of(in.k), a.v = rows_of(in.v), a.out = rows_of(in.out);
  a.lse = reinterpret_cast<float *>(in.lse.data);
  a.workspace = workspace;
  if (!on_gpu(in.q.device)) carve_forward(a, static_cast<char *>(workspace), in.shape.sequences, in.shape.head_dim);
  EP_DISPATCH(attention_forward, a, stream, fn, &in.q, &in.k, &in.v, &in.out, &in.lse, &in.starts, &in.starts_k, &in.used);
}

// Every page that a key of a sequence lies in must be one of the cache.
static int check_pages(const char *fn, const AttentionShape &s, int64_t pages) {
  for (int64_t b = 0; b < s.sequences; b++) {
    EP_REQUIRE(s.used_k[b] >= 0 && s.used_k[b] <= s.max_blocks * s.page_size,
               "%s: seqused_k[%lld] = %d, but a row of block_table holds %lld pages of %lld keys", fn, (long long)b, s.used_k[b],
               (long long)s.max_blocks, (long long)s.page_size);
    const int32_t *page = s.block_table + b * s.table_row;
    for (int64_t i = 0; i < blocks_of(s.used_k[b], s.page_size); i++) {
      EP_REQUIRE(page[i] >= 0 && page[i] < pages, "%s: block_table[%lld][%lld] = %d is not one of the %lld pages of k_cache", fn,
                 (long long)b, (long long)i, page[i], (long long)pages);
    }
  }
  return EP_OK;
}

extern "C" int ep_paged_attention(const DLTensor *q, const DLTensor *k_cache, const DLTensor *v_cache, const DLTensor *cu_seqlens,
                                  const DLTensor *block_table, const DLTensor *seqused_k, const DLTensor *out, const DLTensor *lse,
                                  ep_attention_params params, void *workspace, void *stream) {
  const char *fn = "paged_attention";
  EP_VIEW(qv, q, 3, FLOATS | GPU);
  EP_VIEW(kv, k_cache, 4, FLOATS | GPU);
  EP_VIEW(vv, v_cache, 4, FLOATS | GPU);
  EP_VIEW(outv, out, 3, FLOATS | GPU);
  EP_VIEW(lsev, lse, 2, F32 | GPU);
  EP_VIEW_OPTIONAL(starts, cu_seqlens, 1, I32 | GPU);
  EP_VIEW(table, block_table, 2, I32 | GPU);
  EP_VIEW(used, seqused_k, 1, I32 | GPU);
  const int64_t tokens = qv.shape[0], sequences = used.shape[0], page_size = kv.shape[1];
  if (int status = check_heads(fn, qv, outv, lsev, "k_cache", kv, kv.shape[2], kv.shape[3])) return status;
  EP_REQUIRE(page_size >= 1, "%s: a page of k_cache must hold at least one key", fn);
  EP_REQUIRE(vv.dtype == kv.dtype, "%s: v_cache must have the dtype of k_cache", fn);
  for (int i = 0; i < 4; i++) {
    EP_REQUIRE(vv.shape[i] == kv.shape[i], "%s: dimension %d of v_cache must be that of k_cache, %lld, got %lld", fn, i,
               (long long)kv.shape[i], (long long)vv.shape[i]);
  }
  EP_REQUIRE(used.contiguous, "%s: seqused_k must be contiguous", fn);
  EP_REQUIRE(table.shape[0] == sequences, "%s: block_table must have a row for each of the %lld sequences of seqused_k, got %lld",
             fn, (long long)sequences, (long long)table.shape[0]);
  if (starts) {
    EP_REQUIRE(starts.shape[0] == sequences + 1, "%s: cu_seqlens must have %lld elements, got %lld", fn, (long long)(sequences + 1),
               (long long)starts.shape[0]);
    if (int status = check_starts(fn, "cu_seqlens", starts, tokens, "q")) return status;
  } else {
    EP_REQUIRE(tokens == sequences, "%s: q has %lld rows and seqused_k %lld; give cu_seqlens where they differ", fn,
               (long long)tokens, (long long)sequences);
  }
  if (int status = check_params(fn, params)) return status;
  AttentionForward a;
  a.shape = {reinterpret_cast<const int32_t *>(starts.data),
             nullptr,
             reinterpret_cast<const int32_t *>(used.data),
             sequences,
             tokens,
             qv.shape[1],
             kv.shape[2],
             qv.shape[2],
             params.window,
             float(params.softcap),
             float(params.scale),
             params.causal != 0,
             qv.dtype,
             table.shape[1] * page_size,
             page_size,
             reinterpret_cast<const int32_t *>(table.data),
             table.stride[0],
             table.shape[1]};
  if (int status = check_output(fn, "out", outv, starts, table, used)) return status;
  if (int status = check_lse(fn, lsev, starts, table, used)) return status;
  if (readable(table) && readable(used)) {
    if (int status = check_pages(fn, a.shape, kv.shape[0])) return status;
  }
  if (outv.size == 0) return EP_OK;
  if (int status = check_workspace(fn, workspace, on_gpu(qv.device))) return status;
  a.q = rows_of(qv), a.out = rows_of(outv);
  a.k = {kv.data, kv.stride[1], kv.stride[2], kv.stride[0]};
  a.v = {vv.data, vv.stride[1], vv.stride[2], vv.stride[0]};
  a.lse = reinterpret_cast<float *>(lsev.data);
  a.workspace = workspace;
  if (!on_gpu(qv.device)) carve_forward(a, static_cast<char *>(workspace), sequences, qv.shape[2]);
  EP_DISPATCH(attention_forward, a, stream, fn, &qv, &kv, &vv, &outv, &lsev, &starts, &table, &used);
}

extern "C" int ep_attention_backward(const DLTensor *dout, const DLTensor *q, const DLTensor *k, const DLTensor *v,
                                     const DLTensor *out, const DLTensor *lse, const DLTensor *cu_seqlens,
                                     const DLTensor *cu_seqlens_k, const DLTensor *seqused_k, const DLTensor *dq,
                                     const DLTensor *dk, const DLTensor *dv, ep_attention_params params, void *workspace,
                                     void *stream) {
  const char *fn = "attention_backward";
  Inputs in;
  EP_VIEW(doutv, dout, 3, FLOATS | GPU);
  EP_VIEW(dqv, dq, 3, FLOATS | GPU);
  EP_VIEW(dkv, dk, 3, FLOATS | GPU);
  EP_VIEW(dvv, dv, 3, FLOATS | GPU);
  if (int status = check_inputs(fn, in, q, k, v, cu_seqlens, cu_seqlens_k, seqused_k, out, lse, params)) return status;
  if (int status = check_like(fn, "dout", doutv, "q", in.q)) return status;
  if (int status = check_like(fn, "dq", dqv, "q", in.q)) return status;
  if (int status = check_like(fn, "dk", dkv, "k", in.k)) return status;
  if (int status = check_like(fn, "dv", dvv, "k", in.k)) return status;
  if (int status = check_output(fn, "dq", dqv, in.starts, in.starts_k, in.used)) return status;
  if (int status = check_output(fn, "dk", dkv, in.starts, in.starts_k, in.used)) return status;
  if (int status = check_output(fn, "dv", dvv, in.starts, in.starts_k, in.used)) return status;
  if (in.q.size == 0 && in.k.size == 0) return EP_OK;
  if (int status = check_workspace(fn, workspace, on_gpu(in.q.device))) return status;
  AttentionBackward a;
  a.shape = in.shape;
  a.dout = rows_of(doutv), a.q = rows_of(in.q), a.k = rows_of(in.k), a.v = rows_of(in.v), a.out = rows_of(in.out);
  a.dq = rows_of(dqv), a.dk = rows_of(dkv), a.dv = rows_of(dvv);
  a.lse = reinterpret_cast<const float *>(in.lse.data);
  a.ordered = params.unordered == 0;
  a.workspace = workspace;
  if (!on_gpu(in.q.device)) {
    carve_backward(a, static_cast<char *>(workspace), in.shape.sequences, in.shape.tokens, in.shape.heads, in.shape.kv_heads,
                   in.shape.head_dim);
  }
  EP_DISPATCH(attention_backward, a, stream, fn, &in.q, &in.k, &in.v, &in.out, &in.lse, &in.starts, &in.starts_k, &in.used, &doutv,
              &dqv, &dkv, &dvv);
}

#endif
