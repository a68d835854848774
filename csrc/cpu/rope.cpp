// Rotary embedding, half-split layout: for i < R/2, with c = cos[t, i], s = sin[t, i] (s negated for the inverse):
//   y[i] = x[i] c - x[i + R/2] s        y[i + R/2] = x[i + R/2] c + x[i] s        the other dimensions are copied
// Layout: x (T, H, D), heads and dims contiguous, tokens at a stride of their own; y contiguous. A task is one token.
#include "enginepost/rope.h"

#include "parallel.h"
#include "rope.h"
#include "simd.h"
#include "tensor.h"

#ifndef EP_API

namespace ep {
namespace EP_ISA {

template <class T>
static void rotate_token(const Rope &a, int64_t t) {
  const T *x = reinterpret_cast<const T *>(a.x) + t * a.x_stride;
  T *y = reinterpret_cast<T *>(a.y) + t * a.y_stride;
  const float *c = a.cos + t * a.half, *s = a.sin + t * a.half;
  const V sign = set1(a.inverse ? -1.f : 1.f);
  for (int64_t h = 0; h < a.rotated_heads; h++, x += a.dim, y += a.dim) {
    each(a.half, [&](int64_t i, int n) {
      const V x0 = get(x + i, n), x1 = get(x + i + a.half, n), cv = get(c + i, n), sv = get(s + i, n) * sign;
      put(y + i, x0 * cv - x1 * sv, n);
      put(y + i + a.half, fma(x1, cv, x0 * sv), n);
    });
    if (x != y) std::memcpy(y + 2 * a.half, x + 2 * a.half, size_t(a.dim - 2 * a.half) * sizeof(T));
  }
  if (x != y) std::memcpy(y, x, size_t((a.heads - a.rotated_heads) * a.dim) * sizeof(T));
}

void rope_rotate(const Rope &a) {
  constexpr int64_t TOKENS = 8;
  parallel_for((a.tokens + TOKENS - 1) / TOKENS, [&](int64_t task, int) {
    for (int64_t t = task * TOKENS; t < a.tokens && t < (task + 1) * TOKENS; t++) {
      a.dtype == BF16 ? rotate_token<bf16>(a, t) : rotate_token<float>(a, t);
    }
  });
}

}  // namespace EP_ISA
}  // namespace ep

#else

extern "C" int ep_rope(const DLTensor *x, const DLTensor *cos, const DLTensor *sin, const DLTensor *y, int64_t heads, int inverse,
                       void *stream) {
  using namespace ep;
  const char *fn = "rope";
  EP_VIEW(xv, x, 3, FLOATS | GPU);
  EP_VIEW(cv, cos, 2, F32 | GPU);
  EP_VIEW(sv, sin, 2, F32 | GPU);
  EP_VIEW(yv, y, 3, FLOATS | GPU);
  const int64_t tokens = xv.shape[0], dim = xv.shape[2], half = cv.shape[1];
  EP_REQUIRE(cv.contiguous && sv.contiguous, "%s: cos and sin must be contiguous", fn);
  EP_REQUIRE(cv.shape[0] == tokens && sv.shape[0] == tokens && sv.shape[1] == half,
             "%s: cos and sin must both be (%lld, R/2), got (%lld, %lld) and (%lld, %lld)", fn, (long long)tokens,
             (long long)cv.shape[0], (long long)half, (long long)sv.shape[0], (long long)sv.shape[1]);
  EP_REQUIRE(2 * half <= dim, "%s: cos rotates %lld dimensions, a head has only %lld", fn, (long long)(2 * half), (long long)dim);
  EP_REQUIRE(heads >= 0 && heads <= xv.shape[1], "%s: heads must be 0 to %lld, got %lld", fn, (long long)xv.shape[1],
             (long long)heads);
  EP_REQUIRE(yv.dtype == xv.dtype && yv.shape[0] == tokens && yv.shape[1] == xv.shape[1] && yv.shape[2] == dim,
             "%s: y must have the dtype and shape of x", fn);
  if (xv.size == 0) return EP_OK;
  EP_REQUIRE(xv.stride[1] == dim && yv.stride[1] == dim, "%s: heads of x and y must be contiguous", fn);
  EP_REQUIRE(yv.stride[0] >= xv.shape[1] * dim || tokens == 1, "%s: tokens of y overlap", fn);
  Rope args{xv.data,
            reinterpret_cast<const float *>(cv.data),
            reinterpret_cast<const float *>(sv.data),
            yv.data,
            tokens,
            xv.shape[1],
            heads,
            dim,
            half,
            xv.stride[0],
            yv.stride[0],
            inverse != 0,
            xv.dtype};
  EP_DISPATCH(rope_rotate, args, stream, fn, &xv, &cv, &sv, &yv);
}

#endif
