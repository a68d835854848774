// RMSNorm: y = x * r * (offset + w), r = rsqrt(mean(x^2) + eps). One row is read twice from cache: the sum of squares, then the
// result. Backward with g = dy * (offset + w): dx = r * g - x * r^3 * sum(g x) / H, dw = sum over rows of dy * x * r.
//
// Layout: rows (T, H) contiguous. Rows are dealt out in tasks of NORM_ROWS; each task of the backward sums its own dw in float32
// and the partial sums are added in task order, so the result does not depend on the thread count.
#include "enginepost/norm.h"

#include "norm.h"
#include "parallel.h"
#include "simd.h"
#include "tensor.h"

#ifndef EP_API

namespace ep {
namespace EP_ISA {

template <class T, class W>
static void forward_row(const NormForward &a, int64_t row) {
  const int64_t at = row * a.width;
  const T *x = reinterpret_cast<const T *>(a.x) + at;
  const W *w = reinterpret_cast<const W *>(a.weight);
  T *y = reinterpret_cast<T *>(a.y) + at;
  V s0 = zero(), s1 = zero();
  if (a.residual != nullptr) {
    const T *residual = reinterpret_cast<const T *>(a.residual) + at;
    T *h = reinterpret_cast<T *>(a.h) + at;
    each(a.width, [&](int64_t i, int n) {
      put(h + i, get(x + i, n) + get(residual + i, n), n);
      V v = get(h + i, n);  // the rounded sum, as two separate ops would read it
      s0 = fma(v, v, s0);
    });
    x = h;
  } else {
    int64_t i = 0;
    for (; i + 2 * N <= a.width; i += 2 * N) {
      V u = load(x + i), v = load(x + i + N);
      s0 = fma(u, u, s0);
      s1 = fma(v, v, s1);
    }
    for (; i < a.width; i += N) {
      V u = get(x + i, int(a.width - i < N ? a.width - i : N));
      s0 = fma(u, u, s0);
    }
  }
  const float r = 1.f / std::sqrt(sum(s0 + s1) / float(a.width) + a.eps);
  a.rstd[row] = r;
  const V scale = set1(r), offset = set1(a.offset);
  each(a.width, [&](int64_t i, int n) { put(y + i, get(x + i, n) * scale * (offset + get(w + i, n)), n); });
}

template <class T, class W>
static void backward_row(const NormBackward &a, int64_t row, float *dw) {
  const int64_t at = row * a.width;
  const T *dy = reinterpret_cast<const T *>(a.dy) + at;
  const T *x = reinterpret_cast<const T *>(a.x) + at;
  const W *w = reinterpret_cast<const W *>(a.weight);
  T *dx = reinterpret_cast<T *>(a.dx) + at;
  const V r = set1(a.rstd[row]), offset = set1(a.offset);
  V dot = zero();
  each(a.width, [&](int64_t i, int n) {
    V d = get(dy + i, n), v = get(x + i, n);
    dot = fma(d * (offset + get(w + i, n)), v, dot);
    if (dw != nullptr) put(dw + i, fma(d * r, v, get(dw + i, n)), n);
  });
  const float rs = a.rstd[row];
  const V pull = set1(-sum(dot) * rs * rs * rs / float(a.width));
  if (a.dh != nullptr) {
    const T *dh = reinterpret_cast<const T *>(a.dh) + at;
    each(a.width, [&](int64_t i, int n) {
      V g = get(dy + i, n) * (offset + get(w + i, n));
      put(dx + i, get(dh + i, n) + fma(get(x + i, n), pull, g * r), n);
    });
  } else {
    each(a.width, [&](int64_t i, int n) {
      V g = get(dy + i, n) * (offset + get(w + i, n));
      put(dx + i, fma(get(x + i, n), pull, g * r), n);
    });
  }
}

template <class T, class W>
static void forward(const NormForward &a) {
  parallel_for(norm_tasks(a.rows), [&](int64_t task, int) {
    for (int64_t row = task * NORM_ROWS; row < a.rows && row < (task + 1) * NORM_ROWS; row++) forward_row<T, W>(a, row);
  });
}

template <class T, class W>
static void backward(const NormBackward &a) {
  const int64_t tasks = norm_tasks(a.rows);
  parallel_for(tasks, [&](int64_t task, int) {
    float *dw = a.partial == nullptr ? nullptr : a.partial + task * a.width;
    if (dw != nullptr) std::memset(dw, 0, size_t(a.width) * 4);
    for (int64_t row = task * NORM_ROWS; row < a.rows && row < (task + 1) * NORM_ROWS; row++) backward_row<T, W>(a, row, dw);
  });
  if (a.dweight == nullptr) return;
  W *dweight = reinterpret_cast<W *>(a.dweight);
  const int64_t strips = (a.width + 4 * N - 1) / (4 * N);
  parallel_for(strips, [&](int64_t strip, int) {
    for (int64_t i = strip * 4 * N; i < a.width && i < (strip + 1) * 4 * N; i += N) {
      const int n = int(a.width - i < N ? a.width - i : N);
      V total = zero();
      for (int64_t task = 0; task < tasks; task++) total = total + get(a.partial + task * a.width + i, n);
      put(dweight + i, total, n);
    }
  });
}

void norm_forward(const NormForward &a) {
  if (a.dtype != BF16) return forward<float, float>(a);
  return a.weight_dtype == BF16 ? forward<bf16, bf16>(a) : forward<bf16, float>(a);
}

void norm_backward(const NormBackward &a) {
  if (a.dtype != BF16) return backward<float, float>(a);
  return a.weight_dtype == BF16 ? backward<bf16, bf16>(a) : backward<bf16, float>(a);
}

}  // namespace EP_ISA
}  // namespace ep

#else

using namespace ep;

static int check_rows(const char *fn, const char *name, const Tensor &t, const Tensor &x) {
  EP_REQUIRE(t.dtype == x.dtype, "%s: %s must have the dtype of x", fn, name);
  EP_REQUIRE(t.shape[0] == x.shape[0] && t.shape[1] == x.shape[1], "%s: %s must have the shape of x, (%lld, %lld)", fn, name,
             (long long)x.shape[0], (long long)x.shape[1]);
  EP_REQUIRE(t.contiguous, "%s: %s must be contiguous", fn, name);
  return EP_OK;
}

static int check_common(const char *fn, const Tensor &x, const Tensor &w, const Tensor &rstd) {
  EP_REQUIRE(x.contiguous, "%s: x must be contiguous", fn);
  EP_REQUIRE(x.shape[1] > 0, "%s: x has width 0", fn);
  EP_REQUIRE(w.shape[0] == x.shape[1], "%s: weight must have %lld elements, got %lld", fn, (long long)x.shape[1],
             (long long)w.shape[0]);
  EP_REQUIRE(w.dtype == F32 || w.dtype == x.dtype, "%s: weight must be float32 or have the dtype of x", fn);
  EP_REQUIRE(rstd.shape[0] == x.shape[0], "%s: rstd must have %lld elements, got %lld", fn, (long long)x.shape[0],
             (long long)rstd.shape[0]);
  return EP_OK;
}

static int forward(const char *fn, const DLTensor *x, const DLTensor *residual, const DLTensor *weight, const DLTensor *y,
                   const DLTensor *h, const DLTensor *rstd, double eps, double offset, bool add, void *stream) {
  EP_VIEW(xv, x, 2, FLOATS | GPU);
  EP_VIEW(wv, weight, 1, FLOATS | GPU);
  EP_VIEW(yv, y, 2, FLOATS | GPU);
  EP_VIEW(rv, rstd, 1, F32 | GPU);
  Tensor residual_view, hv;
  if (int status = check_common(fn, xv, wv, rv)) return status;
  if (int status = check_rows(fn, "y", yv, xv)) return status;
  if (add) {
    if (!view(residual_view, residual, fn, "residual", 2, FLOATS | GPU) || !view(hv, h, fn, "h", 2, FLOATS | GPU)) {
      return EP_INVALID_ARGUMENT;
    }
    if (int status = check_rows(fn, "residual", residual_view, xv)) return status;
    if (int status = check_rows(fn, "h", hv, xv)) return status;
  }
  if (xv.size == 0) return EP_OK;
  NormForward args{xv.data,
                   add ? residual_view.data : nullptr,
                   wv.data,
                   yv.data,
                   add ? hv.data : nullptr,
                   reinterpret_cast<float *>(rv.data),
                   xv.shape[0],
                   xv.shape[1],
                   float(eps),
                   float(offset),
                   xv.dtype,
                   wv.dtype};
  EP_DISPATCH(norm_forward, args, stream, fn, &xv, &residual_view, &wv, &yv, &hv, &rv);
}

extern "C" int ep_rms_norm_forward(const DLTensor *x, const DLTensor *weight, const DLTensor *y, const DLTensor *rstd, double eps,
                                   double offset, void *stream) {
  return forward("rms_norm_forward", x, nullptr, weight, y, nullptr, rstd, eps, offset, false, stream);
}

extern "C" int ep_add_rms_norm_forward(const DLTensor *x, const DLTensor *residual, const DLTensor *weight, const DLTensor *y,
                                       const DLTensor *h, const DLTensor *rstd, double eps, double offset, void *stream) {
  return forward("add_rms_norm_forward", x, residual, weight, y, h, rstd, eps, offset, true, stream);
}

extern "C" int64_t ep_rms_norm_backward_workspace_bytes(int64_t rows, int64_t width) { return norm_tasks(rows) * width * 4; }

extern "C" int ep_rms_norm_backward(const DLTensor *dy, const DLTensor *dh, const DLTensor *x, const DLTensor *weight,
                                    const DLTensor *rstd, const DLTensor *dx, const DLTensor *dweight, void *workspace,
                                    double offset, void *stream) {
  const char *fn = "rms_norm_backward";
  EP_VIEW(xv, x, 2, FLOATS | GPU);
  EP_VIEW(wv, weight, 1, FLOATS | GPU);
  EP_VIEW(rv, rstd, 1, F32 | GPU);
  EP_VIEW(dyv, dy, 2, FLOATS | GPU);
  EP_VIEW(dxv, dx, 2, FLOATS | GPU);
  EP_VIEW_OPTIONAL(dhv, dh, 2, FLOATS | GPU);
  EP_VIEW_OPTIONAL(dwv, dweight, 1, FLOATS | GPU);
  if (int status = check_common(fn, xv, wv, rv)) return status;
  if (int status = check_rows(fn, "dy", dyv, xv)) return status;
  if (int status = check_rows(fn, "dx", dxv, xv)) return status;
  if (dhv) {
    if (int status = check_rows(fn, "dh", dhv, xv)) return status;
  }
  if (dweight != nullptr) {
    EP_REQUIRE(dwv.dtype == wv.dtype && dwv.shape[0] == wv.shape[0], "%s: dweight must have the dtype and shape of weight", fn);
    EP_REQUIRE(workspace != nullptr || xv.size == 0, "%s: dweight needs a workspace", fn);
  }
  if (xv.size == 0 && dweight == nullptr) return EP_OK;
  NormBackward args{dyv.data,
                    dhv.data,
                    xv.data,
                    wv.data,
                    reinterpret_cast<const float *>(rv.data),
                    dxv.data,
                    dwv.data,
                    dweight ? static_cast<float *>(workspace) : nullptr,
                    xv.shape[0],
                    xv.shape[1],
                    float(offset),
                    xv.dtype,
                    wv.dtype};
  EP_DISPATCH(norm_backward, args, stream, fn, &xv, &dyv, &dhv, &wv, &rv, &dxv, &dwv);
}

#endif
