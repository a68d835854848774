// The dynamic 8-bit code of bitsandbytes (Dettmers 2016, arXiv 1511.04561) and the search for its nearest value.
//
// Nearest is exact: the number of midpoints between neighbours that lie below x. Cells of equal leading bits (sign, exponent, seven
// bits of the mantissa) hold at most one midpoint each, so a table by cell gives the count at the cell's lower end, and one
// comparison with the next midpoint the rest.
#pragma once

#include "simd.h"

namespace ep {

constexpr int CELL_BITS = 16, CELL_FIRST = (127 - 24) << 7, CELLS = 24 * 128 + 2;  // magnitudes below 2^-24, ..., from 1.0 on

struct DynamicCode {
  const float *value;            // 256, ascending
  float midpoint[256];           // between value[i] and value[i + 1]; the last is infinity
  uint8_t first[2 * CELLS + 4];  // midpoints below the cell; cells of negative numbers follow those of positive ones
};
// Built at first use, never freed.
const DynamicCode &dynamic_code(bool is_signed);

}  // namespace ep

#ifdef EP_ISA
namespace ep {
namespace EP_ISA {

static inline int nearest(const DynamicCode &c, float x) {
  if (x != x) return 255;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  int cell = int((bits & 0x7fffffffu) >> CELL_BITS) - CELL_FIRST;
  cell = cell < 0 ? 0 : cell > CELLS - 1 ? CELLS - 1 : cell;
  const int below = c.first[cell + (bits >> 31) * CELLS];
  return below + (x > c.midpoint[below]);
}

#if defined(__AVX512F__)
typedef __m512i Bytes;  // one byte in each 32-bit lane
// x where its sign bit is clear, the smaller of x and limit where it is set.
static inline V lower_negative(V x, V limit) {
  return {_mm512_mask_min_ps(x.v, _mm512_movepi32_mask(_mm512_castps_si512(x.v)), x.v, limit.v)};
}
static inline V magnitude(V x) { return {_mm512_abs_ps(x.v)}; }
static inline Bytes load_bytes(const uint8_t *p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
static inline void store_bytes(uint8_t *p, Bytes b) { _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(b)); }
static inline V pick(const float *table, Bytes at) { return {_mm512_i32gather_ps(at, table, 4)}; }
static inline Bytes nearest(const DynamicCode &c, V x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  __m512i cell = _mm512_srli_epi32(_mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)), CELL_BITS);
  cell = _mm512_sub_epi32(cell, _mm512_set1_epi32(CELL_FIRST));
  cell = _mm512_min_epi32(_mm512_max_epi32(cell, _mm512_setzero_si512()), _mm512_set1_epi32(CELLS - 1));
  cell = _mm512_mask_add_epi32(cell, _mm512_movepi32_mask(bits), cell, _mm512_set1_epi32(CELLS));
  const __m512i below = _mm512_and_si512(_mm512_i32gather_epi32(cell, c.first, 1), _mm512_set1_epi32(255));
  const __mmask16 above = _mm512_cmp_ps_mask(x.v, pick(c.midpoint, below).v, _CMP_GT_OQ);
  const __m512i found = _mm512_mask_add_epi32(below, above, below, _mm512_set1_epi32(1));
  return _mm512_mask_mov_epi32(found, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), _mm512_set1_epi32(255));
}
#elif defined(__AVX2__)
typedef __m256i Bytes;
static inline V lower_negative(V x, V limit) { return {_mm256_blendv_ps(x.v, _mm256_min_ps(x.v, limit.v), x.v)}; }
static inline V magnitude(V x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), x.v)}; }
static inline Bytes load_bytes(const uint8_t *p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)));
}
static inline void store_bytes(uint8_t *p, Bytes b) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i *>(p), _mm_packus_epi16(words, words));
}
static inline V pick(const float *table, Bytes at) { return {_mm256_i32gather_ps(table, at, 4)}; }
static inline Bytes nearest(const DynamicCode &c, V x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  __m256i cell = _mm256_srli_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)), CELL_BITS);
  cell = _mm256_sub_epi32(cell, _mm256_set1_epi32(CELL_FIRST));
  cell = _mm256_min_epi32(_mm256_max_epi32(cell, _mm256_setzero_si256()), _mm256_set1_epi32(CELLS - 1));
  cell = _mm256_add_epi32(cell, _mm256_and_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(CELLS)));
  const int *first = reinterpret_cast<const int *>(c.first);
  const __m256i below = _mm256_and_si256(_mm256_i32gather_epi32(first, cell, 1), _mm256_set1_epi32(255));
  const __m256 above = _mm256_cmp_ps(x.v, pick(c.midpoint, below).v, _CMP_GT_OQ);
  const __m256i found = _mm256_sub_epi32(below, _mm256_castps_si256(above));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(found, _mm256_set1_epi32(255), nan);
}
#else
struct Bytes {
  uint8_t b[N];
};
static inline V lower_negative(V x, V limit) {
  for (int i = 0; i < N; i++) x.v[i] = std::signbit(x.v[i]) && limit.v[i] < x.v[i] ? limit.v[i] : x.v[i];
  return x;
}
static inline V magnitude(V x) {
  for (int i = 0; i < N; i++) x.v[i] = std::fabs(x.v[i]);
  return x;
}
static inline Bytes load_bytes(const uint8_t *p) {
  Bytes out;
  std::memcpy(out.b, p, N);
  return out;
}
static inline void store_bytes(uint8_t *p, Bytes b) { std::memcpy(p, b.b, N); }
static inline V pick(const float *table, Bytes at) {
  V out;
  for (int i = 0; i < N; i++) out.v[i] = table[at.b[i]];
  return out;
}
static inline Bytes nearest(const DynamicCode &c, V x) {
  Bytes out;
  for (int i = 0; i < N; i++) out.b[i] = uint8_t(nearest(c, float(x.v[i])));
  return out;
}
#endif

}  // namespace EP_ISA
}  // namespace ep
#endif
