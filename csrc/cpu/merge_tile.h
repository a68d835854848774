// Tiles of the merging kernels: every function goes through its inputs in tiles of 256 floats that stay in the first-level cache;
// loops over a tile have no branches, so the compiler turns them into vector code for each instruction set. Sums are double over
// eight lanes in a fixed order, and nothing contracts a*b + c, so results are the same bits everywhere.
#pragma once

#include <cmath>
#include <cstring>

#include "merge.h"
#include "parallel.h"
#include "simd.h"
#include "tensor.h"

#ifndef EP_API

namespace ep {
namespace EP_ISA {

// Elements [at, at + n) as floats; the rest of the tile becomes 0.
static inline void load_tile(const Piece &p, int64_t at, int n, float *out) {
  if (p.dtype == BF16) {
    const bf16 *x = reinterpret_cast<const bf16 *>(p.data) + at;
    each(n, [&](int64_t j, int m) { put(out + j, get(x + j, m), m); });
  } else {
    const float *x = reinterpret_cast<const float *>(p.data) + at;
    each(n, [&](int64_t j, int m) { put(out + j, get(x + j, m), m); });
  }
  for (int j = n; j < TILE; j++) out[j] = 0.f;
}

static inline void store_tile(char *out, unsigned dtype, int64_t at, int n, const float *x) {
  if (dtype == BF16) {
    bf16 *y = reinterpret_cast<bf16 *>(out) + at;
    each(n, [&](int64_t j, int m) { put(y + j, get(x + j, m), m); });
  } else {
    std::memcpy(reinterpret_cast<float *>(out) + at, x, size_t(n) * 4);
  }
}

// x less the base, of which a tile has been loaded
static inline void load_minus(const Piece &p, const float *b, int64_t at, int n, float *d) {
  if (p.dtype == BF16) {
    const bf16 *x = reinterpret_cast<const bf16 *>(p.data) + at;
    each(n, [&](int64_t j, int m) { put(d + j, get(x + j, m) - get(b + j, m), m); });
  } else {
    const float *x = reinterpret_cast<const float *>(p.data) + at;
    each(n, [&](int64_t j, int m) { put(d + j, get(x + j, m) - get(b + j, m), m); });
  }
  for (int j = n; j < TILE; j++) d[j] = 0.f;
}
static inline void load_delta(const Piece &x, const Piece &base, int64_t at, int n, float *d) {
  if (base.data == nullptr) return load_tile(x, at, n, d);
  if (x.dtype == BF16 && base.dtype == BF16 && n == TILE) {
    const bf16 *p = reinterpret_cast<const bf16 *>(x.data) + at, *q = reinterpret_cast<const bf16 *>(base.data) + at;
    for (int j = 0; j < TILE; j += N) store(d + j, load(p + j) - load(q + j));
    return;
  }
  float b[TILE];
  load_tile(base, at, n, b);
  load_minus(x, b, at, n, d);
}

// NOTES: bits change their type one element at a time: that becomes vector code, and a memcpy of a tile does not.
static inline int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
static inline float float_of(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

static inline void magnitude_bits(const float *d, int32_t *bits) {
  for (int j = 0; j < TILE; j++) bits[j] = bits_of(d[j]) & 0x7fffffff;
}

// The bits of a tile of |x - base|, those behind n 0; returns the largest.
static inline int32_t load_bits(const Piece &x, const Piece &base, int64_t at, int n, int32_t *bits) {
  int32_t most = 0;
#if defined(__AVX2__)
  if (n == TILE && x.dtype == BF16 && base.data != nullptr && base.dtype == BF16) {
    const bf16 *p = reinterpret_cast<const bf16 *>(x.data) + at, *q = reinterpret_cast<const bf16 *>(base.data) + at;
    const auto wide = [](const bf16 *h) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(h));
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    };
    __m256i high = _mm256_setzero_si256();
    for (int j = 0; j < TILE; j += 8) {
      const __m256i d = _mm256_castps_si256(_mm256_sub_ps(wide(p + j), wide(q + j)));
      const __m256i b = _mm256_and_si256(d, _mm256_set1_epi32(0x7fffffff));
      high = _mm256_max_epi32(high, b);
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(bits + j), b);
    }
    int32_t lanes[8];
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(lanes), high);
    for (int l = 0; l < 8; l++) most = lanes[l] > most ? lanes[l] : most;
    return most;
  }
#endif
  float d[TILE];
  load_delta(x, base, at, n, d);
  magnitude_bits(d, bits);
  for (int j = 0; j < TILE; j++) most = bits[j] > most ? bits[j] : most;
  return most;
}

// Vectors chosen element by element, else 0: x where keep is -1; where bit j + l of a mask, j a multiple of N, is set; where the
// bits of |x| are above `above` and no more than `upto`; where c > least; where c == 0. v with the sign turned where s has one.
#if defined(__AVX512F__)
static inline V where(const int32_t *keep, V x) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x.v), _mm512_loadu_si512(keep)))};
}
static inline V where_bits(const int32_t *mask, int j, V x) {
  return {_mm512_maskz_mov_ps(__mmask16(uint32_t(mask[j >> 5]) >> (j & 31)), x.v)};
}
static inline V where_between(V above, V upto, V x) {
  const __m512i bits = _mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffffff));
  const __mmask16 in = _mm512_cmpgt_epi32_mask(bits, _mm512_castps_si512(above.v));
  return {_mm512_maskz_mov_ps(__mmask16(in & ~_mm512_cmpgt_epi32_mask(bits, _mm512_castps_si512(upto.v))), x.v)};
}
static inline V where_above(V c, V least, V x) { return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(c.v, least.v, _CMP_GT_OQ), x.v)}; }
static inline V where_zero(V c, V x) { return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(c.v, zero().v, _CMP_EQ_OQ), x.v)}; }
static inline V turned(V v, V s) {
  const __m512i sign = _mm512_and_si512(_mm512_castps_si512(s.v), _mm512_set1_epi32(int32_t(0x80000000u)));
  return {_mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(v.v), sign))};
}
#elif defined(__AVX2__)
static inline V where(const int32_t *keep, V x) { return {_mm256_and_ps(x.v, load(reinterpret_cast<const float *>(keep)).v)}; }
static inline V where_bits(const int32_t *mask, int j, V x) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i here = _mm256_and_si256(_mm256_set1_epi32(int32_t(uint32_t(mask[j >> 5]) >> (j & 31))), each);
  return {_mm256_and_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(here, each)), x.v)};
}
static inline V where_between(V above, V upto, V x) {
  const __m256i bits = _mm256_and_si256(_mm256_castps_si256(x.v), _mm256_set1_epi32(0x7fffffff));
  const __m256i in = _mm256_cmpgt_epi32(bits, _mm256_castps_si256(above.v));
  return {_mm256_and_ps(_mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpgt_epi32(bits, _mm256_castps_si256(upto.v)), in)), x.v)};
}
static inline V where_above(V c, V least, V x) { return {_mm256_and_ps(_mm256_cmp_ps(c.v, least.v, _CMP_GT_OQ), x.v)}; }
static inline V where_zero(V c, V x) { return {_mm256_and_ps(_mm256_cmp_ps(c.v, zero().v, _CMP_EQ_OQ), x.v)}; }
static inline V turned(V v, V s) { return {_mm256_xor_ps(v.v, _mm256_and_ps(s.v, set1(-0.f).v))}; }
#else
static inline V where(const int32_t *keep, V x) {
  IntLanes k;
  std::memcpy(&k, keep, 32);
  return {Lanes(IntLanes(x.v) & k)};
}
static inline V where_bits(const int32_t *mask, int j, V x) {
  IntLanes k;
  for (int l = 0; l < N; l++) k[l] = -int32_t((uint32_t(mask[j >> 5]) >> ((j & 31) + l)) & 1);
  return {Lanes(IntLanes(x.v) & k)};
}
static inline V where_between(V above, V upto, V x) {
  const IntLanes bits = IntLanes(x.v) & 0x7fffffff;
  return {Lanes(IntLanes(x.v) & (bits > IntLanes(above.v)) & (bits <= IntLanes(upto.v)))};
}
static inline V where_above(V c, V least, V x) { return {Lanes(IntLanes(c.v > least.v) & IntLanes(x.v))}; }
static inline V where_zero(V c, V x) { return {Lanes(IntLanes(c.v == zero().v) & IntLanes(x.v))}; }
static inline V turned(V v, V s) { return {Lanes(IntLanes(v.v) ^ (IntLanes(s.v) & IntLanes(set1(-0.f).v)))}; }
#endif

// 32 masks (-1 or 0) to 32 bits, the first to the lowest.
static inline uint32_t pack(const int32_t *mask) {
#if defined(__AVX2__)
  uint32_t word = 0;
  for (int j = 0; j < 32; j += 8)
    word |= uint32_t(_mm256_movemask_ps(_mm256_loadu_ps(reinterpret_cast<const float *>(mask + j)))) << j;
  return word;
#else
  uint32_t word = 0;
  for (int j = 0; j < 32; j++) word |= uint32_t(mask[j] & 1) << j;
  return word;
#endif
}

static inline uint64_t block_key(uint64_t key, uint64_t block) {
  uint64_t z = key + (block + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}
static inline uint32_t mix(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x7FEB352Du;
  h = (h ^ (h >> 15)) * 0x846CA68Bu;
  return h ^ (h >> 16);
}

// out[j] = to(draw of element first + j) for j < n
template <class Out, class To>
static inline void draws_of_tile(uint64_t key, int64_t first, int n, Out *out, To &&to) {
  int done = 0;
  while (done < n) {
    const uint64_t index = uint64_t(first + done), z = block_key(key, index >> 16);
    const uint32_t k0 = uint32_t(z), k1 = uint32_t(z >> 32), low = uint32_t(index & 0xffff);
    uint32_t counter = low * 0x9E3779B9u;
    const int left = int(65536 - low), count = n - done < left ? n - done : left;
    Out *o = out + done;
    for (int j = 0; j < count; j++, counter += 0x9E3779B9u) o[j] = to(mix(k0 ^ counter) + k1);
    done += count;
  }
}
static inline void random_tile(uint64_t key, int64_t first, int n, uint32_t *out) {
  draws_of_tile(key, first, n, out, [](uint32_t draw) { return draw; });
}

// all += sum of |x| over a tile, kept += that of its elements where keep is -1 and not 0: in doubles, eight lanes.
static inline void sum_tile(const float *x, const int32_t *keep, double &all, double &kept) {
#if defined(__AVX2__)
  __m256d a0 = _mm256_setzero_pd(), a1 = a0, k0 = a0, k1 = a0;
  const __m128 size = _mm_castsi128_ps(_mm_set1_epi32(0x7fffffff));
  for (int j = 0; j < TILE; j += 8) {
    const __m128 x0 = _mm_and_ps(_mm_loadu_ps(x + j), size), x1 = _mm_and_ps(_mm_loadu_ps(x + j + 4), size);
    a0 = _mm256_add_pd(a0, _mm256_cvtps_pd(x0));
    a1 = _mm256_add_pd(a1, _mm256_cvtps_pd(x1));
    k0 = _mm256_add_pd(k0, _mm256_cvtps_pd(_mm_and_ps(x0, _mm_loadu_ps(reinterpret_cast<const float *>(keep + j)))));
    k1 = _mm256_add_pd(k1, _mm256_cvtps_pd(_mm_and_ps(x1, _mm_loadu_ps(reinterpret_cast<const float *>(keep + j + 4)))));
  }
  double lane[4];
  _mm256_storeu_pd(lane, _mm256_add_pd(a0, a1));
  all += (lane[0] + lane[2]) + (lane[1] + lane[3]);
  _mm256_storeu_pd(lane, _mm256_add_pd(k0, k1));
  kept += (lane[0] + lane[2]) + (lane[1] + lane[3]);
#else
  double a[8] = {}, k[8] = {};
  for (int j = 0; j < TILE; j += 8) {
    for (int l = 0; l < 8; l++) a[l] += std::fabs(double(x[j + l]));
    for (int l = 0; l < 8; l++) k[l] += keep[j + l] ? std::fabs(double(x[j + l])) : 0.0;
  }
  all += ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
  kept += ((k[0] + k[4]) + (k[2] + k[6])) + ((k[1] + k[5]) + (k[3] + k[7]));
#endif
}

}  // namespace EP_ISA
}  // namespace ep

#else

namespace ep {
// `at` is the first tensor of the call, on whose device the others must be; empty before.
static inline bool piece(Piece &out, const DLTensor *t, const char *fn, const char *name, int64_t size, Tensor &at) {
  Tensor v;
  if (!view(v, t, fn, name, 1, FLOATS | GPU)) return false;
  if (size >= 0 && v.size != size) {
    fail(EP_INVALID_ARGUMENT, "%s: %s has %lld elements, expected %lld", fn, name, (long long)v.size, (long long)size);
    return false;
  }
  if (!at) at = v;
  if (check_one_device(fn, {&at, &v})) return false;
  out = {v.data, v.dtype};
  return true;
}
// Several inputs of one length; returns it, or -1 after an error.
static inline int64_t pieces(Piece *out, const DLTensor *const *x, int count, const char *fn, Tensor &at) {
  if (count < 1 || count > EP_MERGE_MAX_INPUTS) {
    fail(EP_INVALID_ARGUMENT, "%s: %d inputs; 1 to %d are taken", fn, count, int(EP_MERGE_MAX_INPUTS));
    return -1;
  }
  if (x == nullptr) return fail(EP_INVALID_ARGUMENT, "%s: x is missing", fn), -1;
  int64_t size = -1;
  for (int i = 0; i < count; i++) {
    if (!piece(out[i], x[i], fn, "x", size, at)) return -1;
    size = x[i]->shape[0];
  }
  return size;
}
// On a GPU a workspace is wanted.
static inline bool workspace_of(const void *workspace, const Tensor &at, const char *fn) {
  if (!on_gpu(at.device) || (workspace != nullptr && reinterpret_cast<uintptr_t>(workspace) % 8 == 0)) return true;
  fail(EP_INVALID_ARGUMENT, "%s: workspace is %s", fn, workspace == nullptr ? "missing" : "not aligned to 8 bytes");
  return false;
}
// The index of the first element of a piece, which is counted on from.
static inline bool start_of(int64_t start, const char *fn) {
  if (start >= 0 && start < int64_t(1) << 62) return true;
  fail(EP_INVALID_ARGUMENT, "%s: start is %lld; 0 to 2^62 is taken", fn, (long long)start);
  return false;
}
}  // namespace ep

#endif
