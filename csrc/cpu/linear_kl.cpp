// Divergence of two next-token distributions: what is made of a block of logits (csrc/include/enginepost/linear_kl.h). A task is a
// row, whose logits stay in the second-level cache: it is read once for the largest and once more for the sums, which are float32
// over CHUNK columns and double beyond.
#include "enginepost/linear_kl.h"

#include <cmath>

#include "linear_kl.h"
#include "parallel.h"
#include "simd.h"
#include "tensor.h"

#ifndef EP_API

namespace ep {
namespace EP_ISA {

constexpr int64_t CHUNK = 256;

struct Logit {
  V z, slope;  // dz / du
};
static inline Logit logit_of(V u, float softcap, float temperature) {
  Logit l{u, set1(1.f)};
  if (softcap > 0.f) {
    const V t = tanh(u / set1(softcap));
    l.z = set1(softcap) * t, l.slope = fma(zero() - t, t, set1(1.f));
  }
  if (temperature != 1.f) l.z = l.z / set1(temperature), l.slope = l.slope / set1(temperature);
  return l;
}
// z of n columns; in the lanes beyond them KL_NOTHING, whose weight is 0.
static inline V z_of(const KlSide &s, const float *u, int n, float temperature) {
  const V z = logit_of(get(u, n), s.softcap, temperature).z;
  if (n == N) return z;
  float lane[N];
  store(lane, z);
  for (int i = n; i < N; i++) lane[i] = KL_NOTHING;
  return load(lane);
}
static inline float largest(const KlSide &s, const float *u, int64_t width, float temperature, float so_far) {
  V most = set1(so_far);
  each(width, [&](int64_t i, int n) { most = max(z_of(s, u + i, n, temperature), most); });
  return max(most);
}

// e^x - 1 for x <= 0
static inline V expm1(V x) {
  V n;
  const V p = exp_reduced(max(set1(-30.f), x), n), power = scale2(set1(1.f), n);
  return fma(p, power, power - set1(1.f));
}
// log p - log m and log q - log m for m = beta q + (1 - beta) p, from d = log q - log p: the one whose side is larger first, by
// log1p, so that sides that are nearly the same keep their difference.
struct Apart {
  V p, q;
};
static inline Apart from_mixture(V d, float beta) {
  float apart[N], less[N], p[N], q[N];
  store(apart, d);
  store(less, expm1(min(d, zero() - d)));
  for (int i = 0; i < N; i++) {
    const bool theirs = apart[i] >= 0.f;
    const float larger = -std::log1p((theirs ? 1.f - beta : beta) * less[i]);
    p[i] = theirs ? larger - apart[i] : larger;
    q[i] = theirs ? larger : larger + apart[i];
  }
  return {load(p), load(q)};
}

struct Sums {
  float high_p, sum_p, high_q, sum_q, weighted;
};
static void move(Sums &s, int kind, float high_p, float high_q) {
  const float by_p = std::exp(s.high_p - high_p), by_q = std::exp(s.high_q - high_q);
  const float moved = (high_p - s.high_p) - (high_q - s.high_q);
  if (kind == EP_KL_FORWARD) s.weighted = (s.weighted - moved * s.sum_q) * by_q;
  if (kind == EP_KL_REVERSE) s.weighted = (s.weighted - moved * s.sum_p) * by_p;
  s.sum_p *= by_p, s.sum_q *= by_q;
  s.high_p = high_p, s.high_q = high_q;
}

// The z of a row's chosen tokens leave it, and all others take the place of u.
static void take_chosen(const LinearKl &a, int64_t row, float *u) {
  each(a.width, [&](int64_t i, int n) { put(u + i, logit_of(get(u + i, n), a.student.softcap, a.temperature).z, n); });
  for (int64_t j = row * a.k; j < (row + 1) * a.k; j++) {
    const int64_t at = a.ids[j] - a.first;
    if (at < 0 || at >= a.width) continue;
    a.chosen[j] = u[at];
    u[at] = KL_NOTHING;
  }
}

static void scan_row(const LinearKl &a, int64_t row) {
  float *u = a.student.u + row * a.student.row;
  const float *v = a.teacher.u == nullptr ? nullptr : a.teacher.u + row * a.teacher.row;
  KlSide student = a.student;
  float temperature = a.temperature;
  if (v == nullptr) {
    take_chosen(a, row, u);
    student.softcap = 0.f, temperature = 1.f;
  }
  float *of = a.sums + row * KL_SUMS;
  Sums before{KL_NOTHING, 0.f, KL_NOTHING, 0.f, 0.f};
  if (a.first > 0) before = {of[0], of[1], of[2], of[3], of[4]};
  // From the largest so far of all blocks, so that this block's sums need not move, which rounds.
  Sums s{largest(student, u, a.width, temperature, before.high_p), 0.f, before.high_q, 0.f, 0.f};
  if (v != nullptr) s.high_q = largest(a.teacher, v, a.width, temperature, before.high_q);
  const V high_p = set1(s.high_p), high_q = set1(s.high_q);
  double sum_p = 0, sum_q = 0, weighted = 0;
  for (int64_t from = 0; from < a.width; from += CHUNK) {
    V of_p = zero(), of_q = zero(), of_both = zero();
    each(a.width - from < CHUNK ? a.width - from : CHUNK, [&](int64_t j, int n) {
      const V beyond_p = z_of(student, u + from + j, n, temperature) - high_p, by_p = exp(beyond_p);
      of_p = of_p + by_p;
      if (v == nullptr) return;
      const V beyond_q = z_of(a.teacher, v + from + j, n, temperature) - high_q, by_q = exp(beyond_q);
      of_q = of_q + by_q;
      if (a.kind != EP_KL_JS) of_both = fma(a.kind == EP_KL_FORWARD ? by_q : by_p, beyond_p - beyond_q, of_both);
    });
    sum_p += double(sum(of_p)), sum_q += double(sum(of_q)), weighted += double(sum(of_both));
  }
  s.sum_p = float(sum_p), s.sum_q = float(sum_q), s.weighted = float(weighted);
  if (s.high_p == KL_NOTHING) s.sum_p = 0.f;  // every token of the row was chosen
  move(before, a.kind, s.high_p, s.high_q);
  s.sum_p += before.sum_p, s.sum_q += before.sum_q, s.weighted += before.weighted;
  of[0] = s.high_p, of[1] = s.sum_p, of[2] = s.high_q, of[3] = s.sum_q, of[4] = s.weighted;
}
void linear_kl_scan(const LinearKl &a) {
  parallel_for(a.rows, [&](int64_t row, int) { scan_row(a, row); });
}

void linear_kl_compare(const LinearKl &a) {
  parallel_for(a.rows, [&](int64_t row, int) {
    const float *u = a.student.u + row * a.student.row, *v = a.teacher.u + row * a.teacher.row, *norm = a.norm + row * a.norm_row;
    const V high_p = set1(norm[0]), log_p_sum = set1(norm[1]), high_q = set1(norm[2]), log_q_sum = set1(norm[3]);
    double of_q = 0, of_p = 0;
    for (int64_t from = 0; from < a.width; from += CHUNK) {
      V q = zero(), p = zero();
      each(a.width - from < CHUNK ? a.width - from : CHUNK, [&](int64_t j, int n) {
        const V log_p = z_of(a.student, u + from + j, n, a.temperature) - high_p - log_p_sum;
        const V log_q = z_of(a.teacher, v + from + j, n, a.temperature) - high_q - log_q_sum;
        const Apart apart = from_mixture(log_q - log_p, a.beta);
        q = fma(exp(log_q), apart.q, q);
        p = fma(exp(log_p), apart.p, p);
      });
      of_q += double(sum(q)), of_p += double(sum(p));
    }
    float *of = a.sums + row * 2;
    of[0] = a.first > 0 ? of[0] + float(of_q) : float(of_q);
    of[1] = a.first > 0 ? of[1] + float(of_p) : float(of_p);
  });
}

template <class T>
static void gradient_row(const LinearKl &a, int64_t row) {
  const float *u = a.student.u + row * a.student.row, *norm = a.norm + row * a.norm_row;
  const float *v = a.teacher.u == nullptr ? nullptr : a.teacher.u + row * a.teacher.row;
  T *du = reinterpret_cast<T *>(a.du) + row * a.du_row;
  const V high_p = set1(norm[0]), log_p_sum = set1(norm[1]), dkl = set1(a.dkl[row]);
  each(a.width, [&](int64_t i, int n) {
    const Logit l = logit_of(get(u + i, n), a.student.softcap, a.temperature);
    const V beyond = l.z - high_p, p = exp(beyond - log_p_sum);
    V dz = p;
    if (v == nullptr) {
      dz = p * set1(norm[2]);
    } else {
      const V theirs = logit_of(get(v + i, n), a.teacher.softcap, a.temperature).z - set1(norm[2]);
      if (a.kind == EP_KL_FORWARD) {
        dz = p - exp(theirs - set1(norm[3]));
      } else if (a.kind == EP_KL_REVERSE) {  // without the logs of the sums, which would leave their roundings
        dz = p * (beyond - theirs - set1(norm[4]));
      } else {
        const V d = (theirs - set1(norm[3])) - (beyond - log_p_sum);
        dz = p * set1(1.f - a.beta) * (from_mixture(d, a.beta).p - set1(norm[4]));
      }
    }
    put(du + i, dz * l.slope * dkl, n);
  });
  if (v != nullptr) return;
  for (int64_t j = row * a.k; j < (row + 1) * a.k; j++) {
    const int64_t at = a.ids[j] - a.first;
    if (at >= 0 && at < a.width) from_float(a.chosen[j] * a.dkl[row], du + at);
  }
}
void linear_kl_gradient(const LinearKl &a) {
  parallel_for(a.rows, [&](int64_t row, int) { a.du_dtype == BF16 ? gradient_row<bf16>(a, row) : gradient_row<float>(a, row); });
}

}  // namespace EP_ISA
}  // namespace ep

#else

using namespace ep;

// What all three take: the logits and the parameters.
static int fill(LinearKl &a, const Tensor &u, const Tensor &teacher, const ep_linear_kl_params &p, const char *fn) {
  EP_REQUIRE(p.kind >= EP_KL_FORWARD && p.kind <= EP_KL_JS, "%s: kind must be 0 (forward), 1 (reverse) or 2 (js), got %d", fn,
             p.kind);
  EP_REQUIRE(p.beta > 0 && p.beta < 1, "%s: beta must be between 0 and 1, got %g", fn, p.beta);
  EP_REQUIRE(p.temperature > 0 && p.softcap >= 0 && p.teacher_softcap >= 0,
             "%s: temperature must be positive and softcaps not negative, got %g, %g and %g", fn, p.temperature, p.softcap,
             p.teacher_softcap);
  EP_REQUIRE(p.first >= 0 && p.first < int64_t(1) << 40, "%s: first must be an entry of the vocabulary, got %lld", fn,
             (long long)p.first);
  EP_REQUIRE(u.shape[1] >= 1, "%s: u has no columns", fn);
  EP_REQUIRE(!teacher || (teacher.shape[0] == u.shape[0] && teacher.shape[1] == u.shape[1]),
             "%s: u (%lld, %lld) and teacher (%lld, %lld) must be alike", fn, (long long)u.shape[0], (long long)u.shape[1],
             (long long)teacher.shape[0], (long long)teacher.shape[1]);
  a = LinearKl{};
  a.student = {reinterpret_cast<float *>(u.data), u.stride[0], float(p.softcap)};
  a.teacher = {reinterpret_cast<float *>(teacher.data), teacher.stride[0], float(p.teacher_softcap)};
  a.rows = u.shape[0], a.width = u.shape[1], a.first = p.first;
  a.kind = p.kind, a.beta = float(p.beta), a.temperature = float(p.temperature);
  return EP_OK;
}

static int take_topk(LinearKl &a, bool teacher, bool topk, bool place, const Tensor &ids, const Tensor &chosen, const char *name,
                     const char *fn) {
  EP_REQUIRE(teacher != topk && topk == place, "%s: give teacher, or ids with %s", fn, name);
  if (!topk) return EP_OK;
  EP_REQUIRE(
      ids.contiguous && chosen.contiguous && ids.shape[0] == a.rows && chosen.shape[0] == a.rows && ids.shape[1] == chosen.shape[1],
      "%s: ids and %s must be contiguous and alike, with %lld rows; got (%lld, %lld) and (%lld, %lld)", fn, name, (long long)a.rows,
      (long long)ids.shape[0], (long long)ids.shape[1], (long long)chosen.shape[0], (long long)chosen.shape[1]);
  a.ids = reinterpret_cast<const int64_t *>(ids.data), a.chosen = reinterpret_cast<float *>(chosen.data), a.k = ids.shape[1];
  return EP_OK;
}

static int need_rows(const Tensor &t, int64_t rows, int64_t columns, const char *name, const char *fn) {
  EP_REQUIRE(t.contiguous && t.shape[0] == rows && t.shape[1] >= columns,
             "%s: %s must be contiguous and have %lld rows of %lld, got (%lld, %lld)", fn, name, (long long)rows,
             (long long)columns, (long long)t.shape[0], (long long)t.shape[1]);
  return EP_OK;
}

extern "C" int ep_linear_kl_scan(const DLTensor *u, const DLTensor *teacher, const DLTensor *ids, const DLTensor *chosen,
                                 const DLTensor *sums, ep_linear_kl_params params, void *stream) {
  const char *fn = "linear_kl_scan";
  EP_VIEW(uv, u, 2, F32 | GPU);
  EP_VIEW_OPTIONAL(tv, teacher, 2, F32 | GPU);
  EP_VIEW_OPTIONAL(iv, ids, 2, I64 | GPU);
  EP_VIEW_OPTIONAL(cv, chosen, 2, F32 | GPU);
  EP_VIEW(sv, sums, 2, F32 | GPU);
  LinearKl args;
  if (int status = fill(args, uv, tv, params, fn)) return status;
  if (int status = take_topk(args, teacher != nullptr, ids != nullptr, chosen != nullptr, iv, cv, "chosen", fn)) return status;
  if (int status = need_rows(sv, args.rows, KL_SUMS, "sums", fn)) return status;
  EP_REQUIRE(sv.shape[1] == KL_SUMS, "%s: sums must have 5 columns, got %lld", fn, (long long)sv.shape[1]);
  if (int status = check_apart(fn, "chosen", cv, "ids", iv)) return status;
  if (int status = check_apart(fn, "u", uv, "ids", iv)) return status;
  if (int status = check_apart(fn, "sums", sv, "ids", iv)) return status;
  if (args.rows == 0) return EP_OK;
  args.sums = reinterpret_cast<float *>(sv.data);
  EP_DISPATCH(linear_kl_scan, args, stream, fn, &uv, &tv, &iv, &cv, &sv);
}

extern "C" int ep_linear_kl_compare(const DLTensor *u, const DLTensor *teacher, const DLTensor *norm, const DLTensor *sums,
                                    ep_linear_kl_params params, void *stream) {
  const char *fn = "linear_kl_compare";
  EP_VIEW(uv, u, 2, F32 | GPU);
  EP_VIEW(tv, teacher, 2, F32 | GPU);
  EP_VIEW(nv, norm, 2, F32 | GPU);
  EP_VIEW(sv, sums, 2, F32 | GPU);
  LinearKl args;
  if (int status = fill(args, uv, tv, params, fn)) return status;
  if (int status = need_rows(nv, args.rows, 4, "norm", fn)) return status;
  if (int status = need_rows(sv, args.rows, 2, "sums", fn)) return status;
  EP_REQUIRE(sv.shape[1] == 2, "%s: sums must have 2 columns, got %lld", fn, (long long)sv.shape[1]);
  if (args.rows == 0) return EP_OK;
  args.norm = reinterpret_cast<const float *>(nv.data), args.norm_row = nv.stride[0];
  args.sums = reinterpret_cast<float *>(sv.data);
  EP_DISPATCH(linear_kl_compare, args, stream, fn, &uv, &tv, &nv, &sv);
}

extern "C" int ep_linear_kl_gradient(const DLTensor *u, const DLTensor *teacher, const DLTensor *ids, const DLTensor *dchosen,
                                     const DLTensor *state, const DLTensor *dkl, const DLTensor *du, ep_linear_kl_params params,
                                     void *stream) {
  const char *fn = "linear_kl_gradient";
  EP_VIEW(uv, u, 2, F32 | GPU);
  EP_VIEW_OPTIONAL(tv, teacher, 2, F32 | GPU);
  EP_VIEW_OPTIONAL(iv, ids, 2, I64 | GPU);
  EP_VIEW_OPTIONAL(cv, dchosen, 2, F32 | GPU);
  EP_VIEW(sv, state, 2, F32 | GPU);
  EP_VIEW(kv, dkl, 1, F32 | GPU);
  EP_VIEW(dv, du, 2, FLOATS | GPU);
  LinearKl args;
  if (int status = fill(args, uv, tv, params, fn)) return status;
  if (int status = take_topk(args, teacher != nullptr, ids != nullptr, dchosen != nullptr, iv, cv, "dchosen", fn)) return status;
  if (int status = need_rows(sv, args.rows, teacher != nullptr ? 5 : 3, "state", fn)) return status;
  EP_REQUIRE(kv.size == args.rows && kv.contiguous, "%s: dkl must be contiguous, with %lld elements, got %lld", fn,
             (long long)args.rows, (long long)kv.size);
  EP_REQUIRE(dv.shape[0] == args.rows && dv.shape[1] == args.width, "%s: du must be (%lld, %lld) as u is, got (%lld, %lld)", fn,
             (long long)args.rows, (long long)args.width, (long long)dv.shape[0], (long long)dv.shape[1]);
  if (int status = check_apart(fn, "du", dv, "ids", iv)) return status;
  if (args.rows == 0) return EP_OK;
  args.norm = reinterpret_cast<const float *>(sv.data), args.norm_row = sv.stride[0];
  args.dkl = reinterpret_cast<const float *>(kv.data);
  args.du = dv.data, args.du_row = dv.stride[0], args.du_dtype = dv.dtype;
  EP_DISPATCH(linear_kl_gradient, args, stream, fn, &uv, &tv, &iv, &cv, &sv, &kv, &dv);
}

#endif
