// Gated linear unit y = act(g) * u, with g and u the halves of a row (T, 2I) = [gate | up].
//   silu: g s, s = sigmoid(g);                          act' = s (1 + g (1 - s))
//   gelu_tanh: g/2 (1 + tanh z) = g s, z = k (g + a g^3), s = sigmoid(2z);  act' = s + 2 g s (1 - s) k (1 + 3 a g^2)
//   gelu: g Phi(g), Phi the normal distribution;        act' = Phi(g) + g phi(g)
// Backward: du = dy act(g), dg = dy u act'(g). A task is a few rows; everything is one pass.
#include "enginepost/glu.h"

#include "glu.h"
#include "parallel.h"
#include "simd.h"
#include "tensor.h"

#ifndef EP_API

namespace ep {
namespace EP_ISA {

struct Act {
  V value, slope;
};

static inline V normal_cdf(V x) {
  float t[N];
  store(t, x);
  for (int i = 0; i < N; i++) t[i] = 0.5f * std::erfc(t[i] * -0.70710678118654752f);
  return load(t);
}

template <int ACT>
static inline Act activate(V g) {
  const V one = set1(1.f), half = set1(0.5f);
  if (ACT == EP_SILU) {
    const V s = sigmoid(g);
    return {g * s, s * fma(g, one - s, one)};
  }
  if (ACT == EP_GELU_TANH) {
    // 2k and a; beyond |g| = 15 the sigmoid is 0 or 1 in float32, and the powers of g could overflow.
    const V k = set1(1.59576912160573072f), a = set1(0.044715f);
    const V x = min(set1(15.f), max(set1(-15.f), g));
    const V s = sigmoid(k * fma(a * x * x, x, x));
    const V inner = k * fma(set1(3.f) * a * x, x, one);
    return {g * s, fma(x * s * (one - s), inner, s)};
  }
  const V cdf = normal_cdf(g);
  return {g * cdf, fma(g * set1(0.39894228040143268f), exp(zero() - half * g * g), cdf)};
}

template <class T, int ACT>
static void forward_row(const Glu &a, int64_t row) {
  const T *x = reinterpret_cast<const T *>(a.x) + row * 2 * a.width;
  T *y = reinterpret_cast<T *>(a.out) + row * a.width;
  each(a.width, [&](int64_t i, int n) { put(y + i, activate<ACT>(get(x + i, n)).value * get(x + a.width + i, n), n); });
}

template <class T, int ACT>
static void backward_row(const Glu &a, int64_t row) {
  const T *dy = reinterpret_cast<const T *>(a.dy) + row * a.width;
  const T *x = reinterpret_cast<const T *>(a.x) + row * 2 * a.width;
  T *dx = reinterpret_cast<T *>(a.out) + row * 2 * a.width;
  each(a.width, [&](int64_t i, int n) {
    const V d = get(dy + i, n), u = get(x + a.width + i, n);
    const Act act = activate<ACT>(get(x + i, n));
    put(dx + i, d * u * act.slope, n);
    put(dx + a.width + i, d * act.value, n);
  });
}

template <class T, int ACT, bool BACKWARD>
static void rows(const Glu &a) {
  constexpr int64_t ROWS = 4;
  parallel_for((a.rows + ROWS - 1) / ROWS, [&](int64_t task, int) {
    for (int64_t row = task * ROWS; row < a.rows && row < (task + 1) * ROWS; row++) {
      BACKWARD ? backward_row<T, ACT>(a, row) : forward_row<T, ACT>(a, row);
    }
  });
}

template <bool BACKWARD>
static void choose(const Glu &a) {
  switch (a.activation) {
    case EP_SILU: return a.dtype == BF16 ? rows<bf16, EP_SILU, BACKWARD>(a) : rows<float, EP_SILU, BACKWARD>(a);
    case EP_GELU_TANH: return a.dtype == BF16 ? rows<bf16, EP_GELU_TANH, BACKWARD>(a) : rows<float, EP_GELU_TANH, BACKWARD>(a);
    default: return a.dtype == BF16 ? rows<bf16, EP_GELU, BACKWARD>(a) : rows<float, EP_GELU, BACKWARD>(a);
  }
}

void glu_forward(const Glu &a) { choose<false>(a); }
void glu_backward(const Glu &a) { choose<true>(a); }

}  // namespace EP_ISA
}  // namespace ep

#else

using namespace ep;

static int check(const char *fn, const char *half_name, const Tensor &half, const char *full_name, const Tensor &full,
                 int activation) {
  EP_REQUIRE(activation >= EP_SILU && activation <= EP_GELU, "%s: activation must be 0 (silu), 1 (gelu_tanh) or 2 (gelu), got %d",
             fn, activation);
  EP_REQUIRE(half.contiguous && full.contiguous, "%s: %s and %s must be contiguous", fn, half_name, full_name);
  EP_REQUIRE(half.dtype == full.dtype, "%s: %s and %s must have one dtype", fn, half_name, full_name);
  EP_REQUIRE(full.shape[0] == half.shape[0] && full.shape[1] == 2 * half.shape[1],
             "%s: %s must be (T, 2I) and %s (T, I), got (%lld, %lld) and (%lld, %lld)", fn, full_name, half_name,
             (long long)full.shape[0], (long long)full.shape[1], (long long)half.shape[0], (long long)half.shape[1]);
  return EP_OK;
}

extern "C" int ep_glu_forward(const DLTensor *gate_up, const DLTensor *y, int activation, void *stream) {
  const char *fn = "glu_forward";
  EP_VIEW(xv, gate_up, 2, FLOATS | GPU);
  EP_VIEW(yv, y, 2, FLOATS | GPU);
  if (int status = check(fn, "y", yv, "gate_up", xv, activation)) return status;
  if (yv.size == 0) return EP_OK;
  Glu args{nullptr, xv.data, yv.data, yv.shape[0], yv.shape[1], activation, xv.dtype};
  EP_DISPATCH(glu_forward, args, stream, fn, &xv, &yv);
}

extern "C" int ep_glu_backward(const DLTensor *dy, const DLTensor *gate_up, const DLTensor *dgate_up, int activation,
                               void *stream) {
  const char *fn = "glu_backward";
  EP_VIEW(dv, dy, 2, FLOATS | GPU);
  EP_VIEW(xv, gate_up, 2, FLOATS | GPU);
  EP_VIEW(dxv, dgate_up, 2, FLOATS | GPU);
  if (int status = check(fn, "dy", dv, "gate_up", xv, activation)) return status;
  if (int status = check(fn, "dy", dv, "dgate_up", dxv, activation)) return status;
  if (dv.size == 0) return EP_OK;
  Glu args{dv.data, xv.data, dxv.data, dv.shape[0], dv.shape[1], activation, xv.dtype};
  EP_DISPATCH(glu_backward, args, stream, fn, &xv, &dv, &dxv);
}

#endif
