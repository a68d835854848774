// AdamW, one fused pass over parameter, gradient and both moments (float32), and the float64 sum of squares for the global norm.
//   g' = scale g;  m += (1 - b1)(g' - m);  v += (1 - b2)(g'^2 - v);  p = p (1 - lr wd) - (lr / c1) m / (sqrt(v / c2) + eps)
// with c1 = 1 - b1^t, c2 = 1 - b2^t. Work is cut into BLOCK elements whatever the thread count.
#include "enginepost/adamw.h"

#include <cmath>

#include "isa.h"
#include "parallel.h"
#include "simd.h"
#include "tensor.h"

namespace ep {
struct AdamW {
  char *param;
  const char *grad;
  float *m, *v, *master;
  int64_t size;
  float keep1, take1, keep2, take2, eps, decay, step_size, inv_c2, scale;  // keep = beta, take = 1 - beta
  bool param_bf16, grad_bf16;
};
struct SumSquares {
  const char *x;
  int64_t size;
  bool bf16;
  double *partial;  // one per block
};
constexpr int64_t BLOCK = 16384;
static inline int64_t blocks(int64_t size) { return (size + BLOCK - 1) / BLOCK; }
}  // namespace ep

EP_KERNEL(adamw_step, AdamW)
EP_KERNEL(sum_squares, SumSquares)

#ifndef EP_API

namespace ep {
namespace EP_ISA {

template <class P, class G>
static void step(const AdamW &a) {
  P *param = reinterpret_cast<P *>(a.param);
  const G *grad = reinterpret_cast<const G *>(a.grad);
  const V scale = set1(a.scale), keep1 = set1(a.keep1), keep2 = set1(a.keep2), take1 = set1(a.take1), take2 = set1(a.take2),
          inv_c2 = set1(a.inv_c2), eps = set1(a.eps), decay = set1(a.decay), step_size = set1(a.step_size);
  parallel_for(blocks(a.size), [&](int64_t task, int) {
    const int64_t from = task * BLOCK, count = a.size - from < BLOCK ? a.size - from : BLOCK;
    each(count, [&](int64_t j, int n) {
      const int64_t i = from + j;
      const V g = get(grad + i, n) * scale;
      const V m = fma(keep1, get(a.m + i, n), take1 * g);
      const V v = fma(keep2, get(a.v + i, n), take2 * g * g);
      put(a.m + i, m, n);
      put(a.v + i, v, n);
      const V old = a.master == nullptr ? get(param + i, n) : get(a.master + i, n);
      const V p = old * decay - step_size * (m / (sqrt(v * inv_c2) + eps));
      if (a.master != nullptr) put(a.master + i, p, n);
      put(param + i, p, n);
    });
  });
}

void adamw_step(const AdamW &a) {
  if (a.param_bf16) return a.grad_bf16 ? step<bf16, bf16>(a) : step<bf16, float>(a);
  return a.grad_bf16 ? step<float, bf16>(a) : step<float, float>(a);
}

// Squares are summed in float32 over 256 elements at most, then in float64.
template <class T>
static double block_squares(const T *x, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < count; i += 256) {
    V s = zero();
    each(count - i < 256 ? count - i : 256, [&](int64_t j, int n) {
      const V v = get(x + i + j, n);
      s = fma(v, v, s);
    });
    float lane[N];
    store(lane, s);
    for (int k = 0; k < N; k++) total += double(lane[k]);
  }
  return total;
}

void sum_squares(const SumSquares &a) {
  parallel_for(blocks(a.size), [&](int64_t task, int) {
    const int64_t from = task * BLOCK, count = a.size - from < BLOCK ? a.size - from : BLOCK;
    a.partial[task] = a.bf16 ? block_squares(reinterpret_cast<const bf16 *>(a.x) + from, count)
                             : block_squares(reinterpret_cast<const float *>(a.x) + from, count);
  });
}

}  // namespace EP_ISA
}  // namespace ep

#else

#include <vector>

using namespace ep;

extern "C" int ep_adamw_step(const DLTensor *param, const DLTensor *grad, const DLTensor *exp_avg, const DLTensor *exp_avg_sq,
                             const DLTensor *master, ep_adamw_params params, void *) {
  const char *fn = "adamw_step";
  EP_VIEW(pv, param, 1, FLOATS);
  EP_VIEW(gv, grad, 1, FLOATS);
  EP_VIEW(mv, exp_avg, 1, F32);
  EP_VIEW(vv, exp_avg_sq, 1, F32);
  EP_VIEW_OPTIONAL(wv, master, 1, F32);
  const int64_t size = pv.size;
  EP_REQUIRE(gv.size == size && mv.size == size && vv.size == size && (master == nullptr || wv.size == size),
             "%s: param has %lld elements, grad %lld, exp_avg %lld, exp_avg_sq %lld; all must be equal", fn, (long long)size,
             (long long)gv.size, (long long)mv.size, (long long)vv.size);
  EP_REQUIRE(params.step >= 1, "%s: step counts from 1, got %lld", fn, (long long)params.step);
  EP_REQUIRE(params.beta1 >= 0 && params.beta1 < 1 && params.beta2 >= 0 && params.beta2 < 1, "%s: betas must be in [0, 1)", fn);
  if (size == 0) return EP_OK;
  const double c1 = 1 - std::pow(params.beta1, double(params.step)), c2 = 1 - std::pow(params.beta2, double(params.step));
  AdamW args{pv.data,
             gv.data,
             reinterpret_cast<float *>(mv.data),
             reinterpret_cast<float *>(vv.data),
             reinterpret_cast<float *>(wv.data),
             size,
             float(params.beta1),
             float(1 - params.beta1),
             float(params.beta2),
             float(1 - params.beta2),
             float(params.eps),
             float(1 - params.lr * params.weight_decay),
             float(params.lr / c1),
             float(1 / c2),
             float(params.grad_scale),
             pv.dtype == BF16,
             gv.dtype == BF16};
  EP_RUN(adamw_step, args);
  return EP_OK;
}

extern "C" int ep_sum_squares(const DLTensor *x, double *result, void *) {
  const char *fn = "sum_squares";
  EP_VIEW(xv, x, 1, FLOATS);
  EP_REQUIRE(result != nullptr, "%s: result is missing", fn);
  *result = 0;
  if (xv.size == 0) return EP_OK;
  std::vector<double> partial(size_t(blocks(xv.size)));
  SumSquares args{xv.data, xv.size, xv.dtype == BF16, partial.data()};
  EP_RUN(sum_squares, args);
  for (double p : partial) *result += p;  // in block order
  return EP_OK;
}

#endif
