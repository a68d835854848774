// From the arguments that the C API has checked to launches: which kernel, which tiles, where the parts of the workspace are.
#include "attention.h"

#include "../cpu/attention.h"
#include "device.h"
#include "launch.cuh"

namespace ep {
namespace cuda {

// 16-byte loads and 4-byte stores need every row of every head to begin at a multiple of 16 bytes, and whole chunks.
static Rows rows_of(const HeadRows &x, int64_t head_dim) {
  const bool vector = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && (x.token | x.head | x.page | head_dim) % 8 == 0;
  return {x.data, x.token, x.head, x.page, vector};
}

static int problem_of(const AttentionShape &s, const char *fn, Problem &p) {
  constexpr int64_t MOST = 0x3fffffff;
  if (s.dtype == F32) {
    return fail(EP_UNSUPPORTED, "%s: the CUDA kernels take bfloat16 or float16, got float32; cast q, k and v, or use the reference",
                fn);
  }
  if (s.tokens * s.heads > MOST || s.keys * s.kv_heads > MOST || s.sequences > MOST) {
    return fail(EP_UNSUPPORTED, "%s: more than 2^30 rows of heads in one call: give fewer sequences at a time", fn);
  }
  p.cu_q = s.cu_q, p.cu_k = s.cu_k, p.used_k = s.used_k, p.block_table = s.block_table;
  p.sequences = int32_t(s.sequences), p.tokens = int32_t(s.tokens), p.heads = int32_t(s.heads), p.kv_heads = int32_t(s.kv_heads);
  p.head_dim = int32_t(s.head_dim), p.window = int32_t(s.window < MOST ? s.window : 0), p.page_size = int32_t(s.page_size);
  p.table_row = s.table_row, p.keys = s.keys;
  p.group = int32_t(s.heads / s.kv_heads), p.scale = s.scale, p.score = score_scale(s.scale, s.softcap), p.causal = s.causal,
  p.bf16 = s.dtype == BF16;
  return EP_OK;
}

int attention_forward(const AttentionForward &a, void *stream) {
  ForwardLaunch x;
  Device device;
  if (int status = problem_of(a.shape, a.shape.page_size > 0 ? "paged_attention" : "attention_forward", x.shape)) return status;
  if (int status = current_device(device)) return status;
  const int64_t dim = a.shape.head_dim;
  x.q = rows_of(a.q, dim), x.k = rows_of(a.k, dim), x.v = rows_of(a.v, dim), x.out = rows_of(a.out, dim);
  x.lse = a.lse;
  if (!decodes(x.shape)) {
    return device.wgmma && wgmma_takes(x) ? launch_forward_wgmma(x, stream)
                                          : launch_forward(x, tile_family(device.compiled), stream);
  }
  carve(x, a.workspace);
  return launch_decode(x, stream);
}

int attention_backward(const AttentionBackward &a, void *stream) {
  BackwardLaunch x;
  Device device;
  if (int status = problem_of(a.shape, "attention_backward", x.shape)) return status;
  if (int status = current_device(device)) return status;
  const int64_t dim = a.shape.head_dim;
  x.dout = rows_of(a.dout, dim), x.q = rows_of(a.q, dim), x.k = rows_of(a.k, dim), x.v = rows_of(a.v, dim);
  x.out = rows_of(a.out, dim), x.dq = rows_of(a.dq, dim), x.dk = rows_of(a.dk, dim), x.dv = rows_of(a.dv, dim);
  x.lse = a.lse;
  x.ordered = a.ordered;
  carve(x, a.workspace);
  return device.wgmma && wgmma_takes(x) ? launch_backward_wgmma(x, stream)
                                        : launch_backward(x, tile_family(device.compiled), stream);
}

}  // namespace cuda
}  // namespace ep
