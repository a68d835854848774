// A vector of float32, as wide as the instruction set has it: 16 lanes (AVX-512), 8 (AVX2), or 8 in the compiler's own vectors
// (portable: SSE2, NEON, anything). Kernels are written once against it. bfloat16 is widened on load and rounded to nearest even
// on store.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace ep {
struct bf16 {
  uint16_t bits;
};
}  // namespace ep

namespace ep {
namespace EP_ISA {

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
static inline void from_float(float x, float *p) { *p = x; }
static inline void from_float(float x, bf16 *p) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) {
    p->bits = uint16_t((u >> 16) | 0x40);  // NaN stays NaN
  } else {
    p->bits = uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
  }
}

#if defined(__AVX512F__)

constexpr int N = 16;
struct V {
  __m512 v;
};
static inline V set1(float x) { return {_mm512_set1_ps(x)}; }
static inline V zero() { return {_mm512_setzero_ps()}; }
static inline V load(const float *p) { return {_mm512_loadu_ps(p)}; }
static inline V widen(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
static inline V load(const bf16 *p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
static inline __mmask16 lanes(int n) { return __mmask16((1u << n) - 1); }
static inline V load_n(const float *p, int n) { return {_mm512_maskz_loadu_ps(lanes(n), p)}; }
static inline V load_n(const bf16 *p, int n) { return widen(_mm256_maskz_loadu_epi16(lanes(n), p)); }
static inline void store(float *p, V a) { _mm512_storeu_ps(p, a.v); }
static inline void store_n(float *p, V a, int n) { _mm512_mask_storeu_ps(p, lanes(n), a.v); }
static inline __m256i narrow(V a) {
  __m512i u = _mm512_castps_si512(a.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(r);
}
static inline void store(bf16 *p, V a) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), narrow(a)); }
static inline void store_n(bf16 *p, V a, int n) { _mm256_mask_storeu_epi16(p, lanes(n), narrow(a)); }
static inline V operator+(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline V operator-(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline V operator*(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline V operator/(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline V min(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline V sqrt(V a) { return {_mm512_sqrt_ps(a.v)}; }
static inline V round(V a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
static inline V scale2(V a, V n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a * 2^n
static inline float sum(V a) { return _mm512_reduce_add_ps(a.v); }
static inline float max(V a) { return _mm512_reduce_max_ps(a.v); }

#elif defined(__AVX2__)

constexpr int N = 8;
struct V {
  __m256 v;
};
static inline V set1(float x) { return {_mm256_set1_ps(x)}; }
static inline V zero() { return {_mm256_setzero_ps()}; }
static inline V load(const float *p) { return {_mm256_loadu_ps(p)}; }
static inline V widen(__m128i h) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))}; }
static inline V load(const bf16 *p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
static inline __m256i lanes(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
static inline V load_n(const float *p, int n) { return {_mm256_maskload_ps(p, lanes(n))}; }
static inline V load_n(const bf16 *p, int n) {
  bf16 t[8] = {};
  std::memcpy(t, p, size_t(n) * 2);
  return load(t);
}
static inline void store(float *p, V a) { _mm256_storeu_ps(p, a.v); }
static inline void store_n(float *p, V a, int n) { _mm256_maskstore_ps(p, lanes(n), a.v); }
static inline __m128i narrow(V a) {
  __m256i u = _mm256_castps_si256(a.v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  r = _mm256_blendv_epi8(r, quiet, nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
static inline void store(bf16 *p, V a) { _mm_storeu_si128(reinterpret_cast<__m128i *>(p), narrow(a)); }
static inline void store_n(bf16 *p, V a, int n) {
  bf16 t[8];
  store(t, a);
  std::memcpy(p, t, size_t(n) * 2);
}
static inline V operator+(V a, V b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline V operator-(V a, V b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline V operator*(V a, V b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline V operator/(V a, V b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
static inline V max(V a, V b) { return {_mm256_max_ps(a.v, b.v)}; }
static inline V min(V a, V b) { return {_mm256_min_ps(a.v, b.v)}; }
static inline V sqrt(V a) { return {_mm256_sqrt_ps(a.v)}; }
static inline V round(V a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
static inline V scale2(V a, V n) {  // a * 2^n in two halves, so that results near the ends of the range are right
  __m256i k = _mm256_cvtps_epi32(n.v);
  __m256i half = _mm256_srai_epi32(k, 1);
  __m256i bias = _mm256_set1_epi32(127);
  __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(k, half), bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, first), second)};
}
static inline float sum(V a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float max(V a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

#else

constexpr int N = 8;
typedef float Lanes __attribute__((vector_size(32)));
typedef int32_t IntLanes __attribute__((vector_size(32)));
struct V {
  Lanes v;
};
static inline V set1(float x) { return {Lanes{x, x, x, x, x, x, x, x}}; }
static inline V zero() { return set1(0.f); }
static inline V load(const float *p) {
  V a;
  std::memcpy(&a.v, p, 32);
  return a;
}
static inline V load(const bf16 *p) {
  V a;
  for (int i = 0; i < N; i++) a.v[i] = to_float(p[i]);
  return a;
}
template <class T>
static inline V load_n(const T *p, int n) {
  V a = zero();
  for (int i = 0; i < n; i++) a.v[i] = to_float(p[i]);
  return a;
}
static inline void store(float *p, V a) { std::memcpy(p, &a.v, 32); }
static inline void store(bf16 *p, V a) {
  for (int i = 0; i < N; i++) from_float(a.v[i], p + i);
}
template <class T>
static inline void store_n(T *p, V a, int n) {
  for (int i = 0; i < n; i++) from_float(a.v[i], p + i);
}
static inline V operator+(V a, V b) { return {a.v + b.v}; }
static inline V operator-(V a, V b) { return {a.v - b.v}; }
static inline V operator*(V a, V b) { return {a.v * b.v}; }
static inline V operator/(V a, V b) { return {a.v / b.v}; }
static inline V fma(V a, V b, V c) { return {a.v * b.v + c.v}; }
// NOTES: max and min return b when a is NaN, as the x86 instructions do.
static inline V max(V a, V b) { return {a.v > b.v ? a.v : b.v}; }
static inline V min(V a, V b) { return {a.v < b.v ? a.v : b.v}; }
static inline V sqrt(V a) {
  for (int i = 0; i < N; i++) a.v[i] = std::sqrt(a.v[i]);
  return a;
}
static inline V round(V a) {
  for (int i = 0; i < N; i++) a.v[i] = std::nearbyint(a.v[i]);
  return a;
}
static inline V scale2(V a, V n) {
  IntLanes k = __builtin_convertvector(n.v, IntLanes);
  IntLanes half = k >> 1, other = k - half;
  IntLanes f = (half + 127) << 23, g = (other + 127) << 23;
  V x, y;
  std::memcpy(&x.v, &f, 32);
  std::memcpy(&y.v, &g, 32);
  return a * x * y;
}
static inline float sum(V a) { return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7])); }
static inline float max(V a) {
  float m = a.v[0];
  for (int i = 1; i < N; i++) m = a.v[i] > m ? a.v[i] : m;
  return m;
}

#endif

// x = n ln2 + r: returns e^r - 1 on |r| <= ln2 / 2 to about 1 ulp, a degree-6 polynomial (coefficients of Cephes expf).
static inline V exp_reduced(V x, V &n) {
  n = round(x * set1(1.44269504088896341f));
  V r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  V p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  return fma(p, r * r, r);
}

// e^x to about 1 ulp. Far below -87 the result is 0; above 88.72 it is that of 88.72. NaN stays NaN: min and max return their
// second operand then.
static inline V exp(V x) {
  V n;
  const V p = exp_reduced(min(set1(88.72284f), max(set1(-104.f), x)), n);
  return scale2(p + set1(1.f), n);
}

// (e^2x - 1) / (e^2x + 1), from e^2x - 1 itself so that small x keep their digits; flat beyond |x| = 10.
static inline V tanh(V x) {
  V n;
  const V p = exp_reduced(min(set1(20.f), max(set1(-20.f), x + x)), n);
  const V power = scale2(set1(1.f), n), e = fma(p, power, power - set1(1.f));
  return e / (e + set1(2.f));
}

// e^x / (1 + e^x), which underflows to 0 where 1 / (1 + e^-x) would stop at the largest e^-x.
static inline V sigmoid(V x) {
  const V e = exp(min(set1(30.f), x));
  return e / (e + set1(1.f));
}

// Calls body(i, n) over [0, width) in steps of N; n < N only for the tail.
template <class Body>
static inline void each(int64_t width, Body &&body) {
  int64_t i = 0;
  for (; i + N <= width; i += N) body(i, N);
  if (i < width) body(i, int(width - i));
}
template <class T>
static inline V get(const T *p, int n) {
  return n == N ? load(p) : load_n(p, n);
}
template <class T>
static inline void put(T *p, V a, int n) {
  if (n == N)
    store(p, a);
  else
    store_n(p, a, n);
}

}  // namespace EP_ISA
}  // namespace ep
