// The register-blocked product that packed kernels are made of: an MR x NR tile of c stays in registers while k runs, after Goto
// and van de Geijn 2008 ("Anatomy of High-Performance Matrix Multiplication"). Operands are float32; bfloat16 is widened while
// packing.
//
// NOTES: bfloat16 is multiplied by float32 FMA on purpose: vdpbf16ps has half the rate of two FMA ports on Intel's server cores,
// and widening inside a copy that is made anyway costs nothing.
#pragma once

#include "simd.h"

namespace ep {
namespace EP_ISA {

// The tile fills the register file: MR * NV accumulators, NV vectors of b, one broadcast of a.
#if defined(__AVX512F__)
constexpr int MR = 14, NV = 2;
#elif defined(__AVX2__)
constexpr int MR = 6, NV = 2;
#else
constexpr int MR = 4, NV = 1;
#endif
constexpr int NR = NV * N;

// c (MR, NR) = or += a (MR, k) b (k, NR). Element (i, p) of a is a[i * AI + p * AP], constants so that they become address offsets;
// row p of b is b + p * ldb, row i of c is c + i * ldc.
template <int AI, int AP, bool ADD>
static inline void micro(int64_t k, const float *__restrict a, const float *__restrict b, int64_t ldb, float *__restrict c,
                         int64_t ldc) {
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) acc[i][j] = zero();
  }
  for (int64_t p = 0; p < k; p++, a += AP, b += ldb) {
    V bv[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) bv[j] = load(b + j * N);
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      const V av = set1(a[i * AI]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) acc[i][j] = fma(av, bv[j], acc[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) {
      float *at = c + i * ldc + j * N;
      store(at, ADD ? load(at) + acc[i][j] : acc[i][j]);
    }
  }
}

// An N x N block turned in registers (AVX-512, AVX2) or through memory.
static inline void transpose(V (&r)[N]) {
#if defined(__AVX512F__)
  __m512 s[16], t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    s[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    s[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    s[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    s[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int j = 0; j < 4; j++) {
    t[j] = _mm512_shuffle_f32x4(s[j], s[j + 4], 0x88);
    t[j + 4] = _mm512_shuffle_f32x4(s[j], s[j + 4], 0xdd);
    t[j + 8] = _mm512_shuffle_f32x4(s[j + 8], s[j + 12], 0x88);
    t[j + 12] = _mm512_shuffle_f32x4(s[j + 8], s[j + 12], 0xdd);
  }
  for (int j = 0; j < 4; j++) {
    r[j].v = _mm512_shuffle_f32x4(t[j], t[j + 8], 0x88);
    r[j + 4].v = _mm512_shuffle_f32x4(t[j + 4], t[j + 12], 0x88);
    r[j + 8].v = _mm512_shuffle_f32x4(t[j], t[j + 8], 0xdd);
    r[j + 12].v = _mm512_shuffle_f32x4(t[j + 4], t[j + 12], 0xdd);
  }
#elif defined(__AVX2__)
  __m256 s[8], t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    s[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    s[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    s[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    s[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int j = 0; j < 4; j++) {
    r[j].v = _mm256_permute2f128_ps(s[j], s[j + 4], 0x20);
    r[j + 4].v = _mm256_permute2f128_ps(s[j], s[j + 4], 0x31);
  }
#else
  float t[N][N];
  for (int i = 0; i < N; i++) {
    for (int j = 0; j < N; j++) t[j][i] = r[i].v[j];
  }
  for (int i = 0; i < N; i++) r[i] = load(t[i]);
#endif
}

// panel (depth, WIDTH) = scale * lines^T: line i becomes column i; columns from `count` on are zero. line(i) is a pointer.
template <int WIDTH, class Line>
static inline void pack_columns(Line &&line, int count, int64_t depth, float scale, float *__restrict panel) {
  const V factor = set1(scale);
  for (int64_t p = 0; p < depth; p += N) {
    const int steps = int(depth - p < N ? depth - p : N);
    for (int i0 = 0; i0 < WIDTH; i0 += N) {
      V r[N];
      for (int i = 0; i < N; i++) r[i] = i0 + i < count ? get(line(i0 + i) + p, steps) * factor : zero();
      transpose(r);
      const int width = WIDTH - i0 < N ? WIDTH - i0 : N;
      for (int s = 0; s < steps; s++) {
        // What a whole vector writes beyond its line, the next line overwrites; masked stores are slow on some processors.
        const bool spill = WIDTH < N && 2 * WIDTH >= N && p + s + 1 < depth;
        put(panel + (p + s) * WIDTH + i0, r[s], spill ? N : width);
      }
    }
  }
}

// out (count, ld) = lines, widened; columns from `depth` to ld are zero.
template <class Line>
static inline void pack_rows(Line &&line, int64_t count, int64_t depth, int64_t ld, float *__restrict out) {
  for (int64_t i = 0; i < count; i++, out += ld) {
    const auto *p = line(i);
    each(depth, [&](int64_t d, int n) { put(out + d, get(p + d, n), N); });
    for (int64_t d = (depth + N - 1) / N * N; d < ld; d += N) store(out + d, zero());
  }
}

// out = lines, widened, as panels (height, NR) of NR columns side by side, of which the first `count` rows are written; columns
// from `depth` on are zero. Rows a power of two apart would share few sets of the cache.
template <class Line>
static inline void pack_row_panels(Line &&line, int64_t count, int64_t depth, int64_t height, float *__restrict out) {
  for (int64_t i = 0; i < count; i++, out += NR) {
    const auto *p = line(i);
    each(depth, [&](int64_t d, int n) { put(out + d / NR * NR * height + d % NR, get(p + d, n), N); });
    for (int64_t d = (depth + N - 1) / N * N; d % NR != 0; d += N) store(out + d / NR * NR * height + d % NR, zero());
  }
}

}  // namespace EP_ISA
}  // namespace ep
