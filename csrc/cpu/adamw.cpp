// AdamW, one fused pass over parameter, gradient and both moments (float32), and the float64 sum of squares for the global norm.
//   g' = scale g;  m += (1 - b1)(g' - m);  v += (1 - b2)(g'^2 - v);  p = p (1 - lr wd) - (lr / c1) m / (sqrt(v / c2) + eps)
// with c1 = 1 - b1^t, c2 = 1 - b2^t. Work is cut into BLOCK elements whatever the thread count.
//
// With moments in 8 bits the same update runs on 256 elements at a time, decoded into registers and kept in float32 on the stack
// until the largest of each moment is known. Where a gradient is not finite both moments become zero and the parameter stays.
// Neither a negative m nor a positive v becomes the code of zero: the sign is what m says, and m over a lost v would be a leap.
#include "enginepost/adamw.h"

#include <cmath>

#include "adamw.h"
#include "dynamic_code.h"
#include "parallel.h"
#include "simd.h"
#include "tensor.h"

namespace ep {
constexpr int64_t BLOCK = 16384;  // elements of a task
static inline int64_t blocks(int64_t size) { return (size + BLOCK - 1) / BLOCK; }
}  // namespace ep

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
  if (a.dtype == BF16) return a.grad_dtype == BF16 ? step<bf16, bf16>(a) : step<bf16, float>(a);
  return a.grad_dtype == BF16 ? step<float, bf16>(a) : step<float, float>(a);
}

// Decoded, updated moments and the moved parameter.
struct Moved {
  V m, v, p;
};
struct Update {
  V scale, keep1, keep2, take1, take2, inv_c2, eps, decay, step_size;
  explicit Update(const AdamW &s)
      : scale(set1(s.scale)),
        keep1(set1(s.keep1)),
        keep2(set1(s.keep2)),
        take1(set1(s.take1)),
        take2(set1(s.take2)),
        inv_c2(set1(s.inv_c2)),
        eps(set1(s.eps)),
        decay(set1(s.decay)),
        step_size(set1(s.step_size)) {}
  Moved operator()(V g, V m, V v, V p) const {
    m = fma(keep1, m, take1 * g);
    v = fma(keep2, v, take2 * g * g);
    return {m, v, p * decay - step_size * (m / (sqrt(v * inv_c2) + eps))};
  }
};

// GROUP elements.
template <class P, class G>
struct Group {
  P *param;
  const G *grad;
  float *master;
  uint8_t *m, *v;
  float *m_scale, *v_scale;
};
struct Codes {
  const DynamicCode &m, &v;
  Encoder<true, true> encode_m;
  Encoder<false, true> encode_v;
};

template <class P, class G>
static void groups(const Group<P, G> &first, int64_t count, const Update &update, const Codes &c) {
  alignas(64) float m[GROUP], v[GROUP];
  for (int64_t k = 0; k < count; k++) {
    P *param = first.param + k * GROUP;
    const G *grad = first.grad + k * GROUP;
    float *master = first.master == nullptr ? nullptr : first.master + k * GROUP;
    uint8_t *m_codes = first.m + k * GROUP, *v_codes = first.v + k * GROUP;
    const Decoder<true> decode_m(c.m, first.m_scale[k]);
    const Decoder<false> decode_v(c.v, first.v_scale[k]);
    V m_most = zero(), v_most = zero();
    for (int64_t i = 0; i < GROUP; i += N) {
      const V g = load(grad + i) * update.scale, old = master == nullptr ? load(param + i) : load(master + i);
      Moved r = update(g, decode_m(m_codes + i), decode_v(v_codes + i), old);
      r = {where_finite(g, r.m, zero()), where_finite(g, r.v, zero()), where_finite(g, r.p, old)};
      m_most = max(magnitude(r.m), m_most);
      v_most = max(r.v, v_most);
      store(m + i, r.m);
      store(v + i, r.v);
      if (master != nullptr) store(master + i, r.p);
      store(param + i, r.p);
    }
    const float m_max = max(m_most), v_max = max(v_most);
    first.m_scale[k] = m_max, first.v_scale[k] = v_max;
    const V m_factor = set1(1.f / (m_max < 1e-38f ? 1e-38f : m_max)), v_factor = set1(1.f / (v_max < 1e-38f ? 1e-38f : v_max));
    encode(c.encode_m, GROUP, m_codes, [&](int64_t i) { return load(m + i) * m_factor; });
    encode(c.encode_v, GROUP, v_codes, [&](int64_t i) { return load(v + i) * v_factor; });
  }
}

template <class P, class G>
static void step8(const AdamW8 &a) {
  const AdamW &s = a.step;
  const Update update(s);
  const Codes codes{*a.m_code, *a.v_code, Encoder<true, true>(*a.m_code), Encoder<false, true>(*a.v_code)};
  parallel_for(blocks(s.size), [&](int64_t task, int) {
    const int64_t from = task * BLOCK, size = s.size - from < BLOCK ? s.size - from : BLOCK, rest = size % GROUP;
    const auto group = [&](int64_t i) {
      return Group<P, G>{reinterpret_cast<P *>(s.param) + i,
                         reinterpret_cast<const G *>(s.grad) + i,
                         s.master == nullptr ? nullptr : s.master + i,
                         a.m + i,
                         a.v + i,
                         a.m_scale + i / GROUP,
                         a.v_scale + i / GROUP};
    };
    groups(group(from), size / GROUP, update, codes);
    if (rest == 0) return;
    // The last group of a tensor: filled up with zeros, in memory of its own.
    const Group<P, G> last = group(from + size - rest);
    P param[GROUP] = {};
    G grad[GROUP] = {};
    float master[GROUP] = {};
    uint8_t m[GROUP], v[GROUP] = {};
    std::memset(m, a.m_code->zero, sizeof m);
    const auto copy = [rest](auto *to, const auto *p) { std::memcpy(to, p, size_t(rest) * sizeof *to); };
    copy(param, last.param), copy(grad, last.grad), copy(m, last.m), copy(v, last.v);
    if (last.master != nullptr) copy(master, last.master);
    groups(Group<P, G>{param, grad, last.master == nullptr ? nullptr : master, m, v, last.m_scale, last.v_scale}, 1, update, codes);
    copy(last.param, param), copy(last.m, m), copy(last.v, v);
    if (last.master != nullptr) copy(last.master, master);
  });
}

void adamw8_step(const AdamW8 &a) {
  const AdamW &s = a.step;
  if (s.dtype == BF16) return s.grad_dtype == BF16 ? step8<bf16, bf16>(a) : step8<bf16, float>(a);
  return s.grad_dtype == BF16 ? step8<float, bf16>(a) : step8<float, float>(a);
}

// Squares are summed in float32 over SQUARES_TILE elements at most, a sum for each lane of a vector, then in float64.
template <class T>
static double block_squares(const T *x, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < count; i += SQUARES_TILE) {
    V s = zero();
    each(count - i < SQUARES_TILE ? count - i : SQUARES_TILE, [&](int64_t j, int n) {
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
  const int64_t tasks = squares_blocks(a.size);
  parallel_for(tasks, [&](int64_t task, int) {
    const int64_t from = task * SQUARES_BLOCK, count = a.size - from < SQUARES_BLOCK ? a.size - from : SQUARES_BLOCK;
    a.partial[task] = a.dtype == BF16 ? block_squares(reinterpret_cast<const bf16 *>(a.x) + from, count)
                                      : block_squares(reinterpret_cast<const float *>(a.x) + from, count);
  });
  *a.result = 0;
  for (int64_t task = 0; task < tasks; task++) *a.result += a.partial[task];  // in this order
}

}  // namespace EP_ISA
}  // namespace ep

#else

using namespace ep;

// What both kinds of step take from their arguments.
static int fill(AdamW &a, const Tensor &pv, const Tensor &gv, const Tensor &wv, const ep_adamw_params &params, const char *fn) {
  EP_REQUIRE(params.step >= 1, "%s: step counts from 1, got %lld", fn, (long long)params.step);
  EP_REQUIRE(params.beta1 >= 0 && params.beta1 < 1 && params.beta2 >= 0 && params.beta2 < 1, "%s: betas must be in [0, 1)", fn);
  const double c1 = 1 - std::pow(params.beta1, double(params.step)), c2 = 1 - std::pow(params.beta2, double(params.step));
  a = AdamW{pv.data,
            gv.data,
            nullptr,
            nullptr,
            reinterpret_cast<float *>(wv.data),
            pv.size,
            float(params.beta1),
            float(1 - params.beta1),
            float(params.beta2),
            float(1 - params.beta2),
            float(params.eps),
            float(1 - params.lr * params.weight_decay),
            float(params.lr / c1),
            float(1 / c2),
            float(params.grad_scale),
            pv.dtype,
            gv.dtype};
  return EP_OK;
}

extern "C" int ep_adamw_step(const DLTensor *param, const DLTensor *grad, const DLTensor *exp_avg, const DLTensor *exp_avg_sq,
                             const DLTensor *master, ep_adamw_params params, void *stream) {
  const char *fn = "adamw_step";
  EP_VIEW(pv, param, 1, FLOATS | GPU);
  EP_VIEW(gv, grad, 1, FLOATS | GPU);
  EP_VIEW(mv, exp_avg, 1, F32 | GPU);
  EP_VIEW(vv, exp_avg_sq, 1, F32 | GPU);
  EP_VIEW_OPTIONAL(wv, master, 1, F32 | GPU);
  const int64_t size = pv.size;
  EP_REQUIRE(gv.size == size && mv.size == size && vv.size == size && (master == nullptr || wv.size == size),
             "%s: param has %lld elements, grad %lld, exp_avg %lld, exp_avg_sq %lld; all must be equal", fn, (long long)size,
             (long long)gv.size, (long long)mv.size, (long long)vv.size);
  AdamW args;
  const int status = fill(args, pv, gv, wv, params, fn);
  if (status != EP_OK || size == 0) return status;
  args.m = reinterpret_cast<float *>(mv.data), args.v = reinterpret_cast<float *>(vv.data);
  EP_DISPATCH(adamw_step, args, stream, fn, &pv, &gv, &mv, &vv, &wv);
}

extern "C" int ep_adamw8_step(const DLTensor *param, const DLTensor *grad, const DLTensor *exp_avg, const DLTensor *exp_avg_sq,
                              const DLTensor *exp_avg_scale, const DLTensor *exp_avg_sq_scale, const DLTensor *master,
                              ep_adamw_params params, void *stream) {
  const char *fn = "adamw8_step";
  EP_VIEW(pv, param, 1, FLOATS | GPU);
  EP_VIEW(gv, grad, 1, FLOATS | GPU);
  EP_VIEW(mv, exp_avg, 1, U8 | GPU);
  EP_VIEW(vv, exp_avg_sq, 1, U8 | GPU);
  EP_VIEW(ms, exp_avg_scale, 1, F32 | GPU);
  EP_VIEW(vs, exp_avg_sq_scale, 1, F32 | GPU);
  EP_VIEW_OPTIONAL(wv, master, 1, F32 | GPU);
  const int64_t size = pv.size, groups = (size + GROUP - 1) / GROUP;
  EP_REQUIRE(gv.size == size && mv.size == size && vv.size == size && (master == nullptr || wv.size == size),
             "%s: param has %lld elements, grad %lld, exp_avg %lld, exp_avg_sq %lld; all must be equal", fn, (long long)size,
             (long long)gv.size, (long long)mv.size, (long long)vv.size);
  EP_REQUIRE(ms.size == groups && vs.size == groups, "%s: %lld elements take %lld scales, got %lld and %lld", fn, (long long)size,
             (long long)groups, (long long)ms.size, (long long)vs.size);
  AdamW8 args{};
  const int status = fill(args.step, pv, gv, wv, params, fn);
  if (status != EP_OK || size == 0) return status;
  args.m = reinterpret_cast<uint8_t *>(mv.data), args.v = reinterpret_cast<uint8_t *>(vv.data);
  args.m_scale = reinterpret_cast<float *>(ms.data), args.v_scale = reinterpret_cast<float *>(vs.data);
  args.m_code = &dynamic_code(true), args.v_code = &dynamic_code(false);
  EP_DISPATCH(adamw8_step, args, stream, fn, &pv, &gv, &mv, &vv, &ms, &vs, &wv);
}

extern "C" int64_t ep_sum_squares_workspace_bytes(int64_t size) { return size < 0 ? 0 : squares_blocks(size) * 8; }

extern "C" int ep_sum_squares(const DLTensor *x, double *result, void *workspace, void *stream) {
  const char *fn = "sum_squares";
  EP_VIEW(xv, x, 1, FLOATS | GPU);
  EP_REQUIRE(result != nullptr, "%s: result is missing", fn);
  EP_REQUIRE((workspace != nullptr && uintptr_t(workspace) % 8 == 0) || xv.size == 0,
             "%s: workspace must hold ep_sum_squares_workspace_bytes(%lld) bytes at a multiple of 8", fn, (long long)xv.size);
  SumSquares args{xv.data, xv.size, xv.dtype, static_cast<double *>(workspace), result};
  EP_DISPATCH(sum_squares, args, stream, fn, &xv);
}

#endif
