// Checks and entry points of attention; the passes are in attention_forward.cpp and attention_backward.cpp.
#include "enginepost/attention.h"

#include "attention.h"
#include "parallel.h"

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

// A result: nothing may be written twice.
static int check_output(const char *fn, const char *name, const Tensor &t) {
  const bool apart = t.size == 0 || ((t.shape[1] == 1 || t.stride[1] >= t.shape[2]) &&
                                     (t.shape[0] == 1 || t.stride[0] >= (t.shape[1] - 1) * t.stride[1] + t.shape[2]));
  EP_REQUIRE(apart, "%s: %s has strides (%lld, %lld, 1), so that its rows overlap", fn, name, (long long)t.stride[0],
             (long long)t.stride[1]);
  return EP_OK;
}

static int check_starts(const char *fn, const char *name, const Tensor &t, int64_t tokens, const char *of) {
  EP_REQUIRE(t.contiguous && t.shape[0] >= 1, "%s: %s must be contiguous and hold at least one element", fn, name);
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

static HeadRows rows_of(const Tensor &t) { return {t.data, t.stride[0], t.stride[1]}; }

namespace {
struct Inputs {
  Tensor q, k, v, out, lse;
  AttentionShape shape;
};
}  // namespace

// Everything that both passes take, in and out alike.
static int check_inputs(const char *fn, Inputs &in, const DLTensor *q, const DLTensor *k, const DLTensor *v,
                        const DLTensor *cu_seqlens, const DLTensor *cu_seqlens_k, const DLTensor *seqused_k, const DLTensor *out,
                        const DLTensor *lse, const ep_attention_params &params) {
  if (!view(in.q, q, fn, "q", 3, FLOATS) || !view(in.k, k, fn, "k", 3, FLOATS) || !view(in.v, v, fn, "v", 3, FLOATS) ||
      !view(in.out, out, fn, "out", 3, FLOATS) || !view(in.lse, lse, fn, "lse", 2, F32)) {
    return EP_INVALID_ARGUMENT;
  }
  EP_VIEW(starts, cu_seqlens, 1, I32);
  EP_VIEW_OPTIONAL(starts_k, cu_seqlens_k, 1, I32);
  EP_VIEW_OPTIONAL(used, seqused_k, 1, I32);
  const int64_t tokens = in.q.shape[0], heads = in.q.shape[1], head_dim = in.q.shape[2], kv_heads = in.k.shape[1];
  EP_REQUIRE(head_dim >= 1 && head_dim <= 256, "%s: q has head dimension %lld; 1 to 256 is supported", fn, (long long)head_dim);
  EP_REQUIRE(in.k.dtype == in.q.dtype, "%s: k must have the dtype of q", fn);
  EP_REQUIRE(in.k.shape[2] == head_dim, "%s: k must have the head dimension of q, %lld, got %lld", fn, (long long)head_dim,
             (long long)in.k.shape[2]);
  EP_REQUIRE(kv_heads >= 1 && heads >= 1 && heads % kv_heads == 0, "%s: the %lld heads of q must be a multiple of the %lld of k",
             fn, (long long)heads, (long long)kv_heads);
  if (int status = check_like(fn, "v", in.v, "k", in.k)) return status;
  if (int status = check_like(fn, "out", in.out, "q", in.q)) return status;
  EP_REQUIRE(in.lse.contiguous && in.lse.shape[0] == heads && in.lse.shape[1] == tokens,
             "%s: lse must be contiguous with shape (%lld, %lld), got (%lld, %lld)", fn, (long long)heads, (long long)tokens,
             (long long)in.lse.shape[0], (long long)in.lse.shape[1]);
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
    for (int64_t b = 0; b < used.shape[0]; b++) {
      EP_REQUIRE(u[b] >= 0 && u[b] <= cu_k[b + 1] - cu_k[b], "%s: seqused_k[%lld] = %d, but the sequence has %d keys", fn,
                 (long long)b, u[b], cu_k[b + 1] - cu_k[b]);
    }
  }
  EP_REQUIRE(params.window >= 0, "%s: window must be 0 (none) or positive, got %lld", fn, (long long)params.window);
  EP_REQUIRE(params.softcap >= 0, "%s: softcap must be 0 (none) or positive, got %g", fn, params.softcap);
  EP_REQUIRE(params.scale - params.scale == 0, "%s: scale must be finite, got %g", fn, params.scale);
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
              in.q.dtype == BF16};
  return EP_OK;
}

// Hands out parts of the workspace, each on a cache line of its own; with a null workspace it only counts.
namespace {
struct Carver {
  char *base;
  int64_t bytes = 0;
  template <class T>
  T *take(int64_t count) {
    T *part = base == nullptr ? nullptr : reinterpret_cast<T *>(base + bytes);
    bytes += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return part;
  }
};
}  // namespace

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

static int check_workspace(const char *fn, const void *workspace) {
  EP_REQUIRE(workspace != nullptr && reinterpret_cast<uintptr_t>(workspace) % 64 == 0, "%s: workspace must be 64-byte aligned", fn);
  return EP_OK;
}

extern "C" int ep_attention_forward(const DLTensor *q, const DLTensor *k, const DLTensor *v, const DLTensor *cu_seqlens,
                                    const DLTensor *cu_seqlens_k, const DLTensor *seqused_k, const DLTensor *out,
                                    const DLTensor *lse, ep_attention_params params, void *workspace, void *) {
  const char *fn = "attention_forward";
  Inputs in;
  if (int status = check_inputs(fn, in, q, k, v, cu_seqlens, cu_seqlens_k, seqused_k, out, lse, params)) return status;
  if (int status = check_output(fn, "out", in.out)) return status;
  if (in.out.size == 0) return EP_OK;
  if (int status = check_workspace(fn, workspace)) return status;
  AttentionForward a;
  a.shape = in.shape;
  a.q = rows_of(in.q), a.k = rows_of(in.k), a.v = rows_of(in.v), a.out = rows_of(in.out);
  a.lse = reinterpret_cast<float *>(in.lse.data);
  carve_forward(a, static_cast<char *>(workspace), in.shape.sequences, in.shape.head_dim);
  EP_RUN(attention_forward, a);
  return EP_OK;
}

extern "C" int ep_attention_backward(const DLTensor *dout, const DLTensor *q, const DLTensor *k, const DLTensor *v,
                                     const DLTensor *out, const DLTensor *lse, const DLTensor *cu_seqlens,
                                     const DLTensor *cu_seqlens_k, const DLTensor *seqused_k, const DLTensor *dq,
                                     const DLTensor *dk, const DLTensor *dv, ep_attention_params params, void *workspace, void *) {
  const char *fn = "attention_backward";
  Inputs in;
  EP_VIEW(doutv, dout, 3, FLOATS);
  EP_VIEW(dqv, dq, 3, FLOATS);
  EP_VIEW(dkv, dk, 3, FLOATS);
  EP_VIEW(dvv, dv, 3, FLOATS);
  if (int status = check_inputs(fn, in, q, k, v, cu_seqlens, cu_seqlens_k, seqused_k, out, lse, params)) return status;
  if (int status = check_like(fn, "dout", doutv, "q", in.q)) return status;
  if (int status = check_like(fn, "dq", dqv, "q", in.q)) return status;
  if (int status = check_like(fn, "dk", dkv, "k", in.k)) return status;
  if (int status = check_like(fn, "dv", dvv, "k", in.k)) return status;
  if (int status = check_output(fn, "dq", dqv)) return status;
  if (int status = check_output(fn, "dk", dkv)) return status;
  if (int status = check_output(fn, "dv", dvv)) return status;
  if (in.q.size == 0 && in.k.size == 0) return EP_OK;
  if (int status = check_workspace(fn, workspace)) return status;
  AttentionBackward a;
  a.shape = in.shape;
  a.dout = rows_of(doutv), a.q = rows_of(in.q), a.k = rows_of(in.k), a.v = rows_of(in.v), a.out = rows_of(in.out);
  a.dq = rows_of(dqv), a.dk = rows_of(dkv), a.dv = rows_of(dvv);
  a.lse = reinterpret_cast<const float *>(in.lse.data);
  carve_backward(a, static_cast<char *>(workspace), in.shape.sequences, in.shape.tokens, in.shape.heads, in.shape.kv_heads,
                 in.shape.head_dim);
  EP_RUN(attention_backward, a);
  return EP_OK;
}

#endif
