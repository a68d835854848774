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

// pick: the values of the next N codes. encode: the nearest codes to x, `count` a multiple of N.
//
// NOTES: AVX2's gathers are slower than single loads on AMD's cores (Zen 3: 30 cycles for 8 lanes), so there the tables are read
// one element at a time, and only cells are computed in vectors.
#if defined(__AVX512F__)
// x where its sign bit is clear, the smaller of x and limit where it is set.
static inline V lower_negative(V x, V limit) {
  return {_mm512_mask_min_ps(x.v, _mm512_movepi32_mask(_mm512_castps_si512(x.v)), x.v, limit.v)};
}
static inline V magnitude(V x) { return {_mm512_abs_ps(x.v)}; }
static inline V pick(const float *table, const uint8_t *codes) {
  const __m512i at = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(codes)));
  return {_mm512_i32gather_ps(at, table, 4)};
}
static inline void encode(const DynamicCode &c, const float *x, int64_t count, uint8_t *out) {
  for (int64_t i = 0; i < count; i += N) {
    const __m512 v = _mm512_loadu_ps(x + i);
    const __m512i bits = _mm512_castps_si512(v);
    __m512i cell = _mm512_srli_epi32(_mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)), CELL_BITS);
    cell = _mm512_sub_epi32(cell, _mm512_set1_epi32(CELL_FIRST));
    cell = _mm512_min_epi32(_mm512_max_epi32(cell, _mm512_setzero_si512()), _mm512_set1_epi32(CELLS - 1));
    cell = _mm512_mask_add_epi32(cell, _mm512_movepi32_mask(bits), cell, _mm512_set1_epi32(CELLS));
    const __m512i below = _mm512_and_si512(_mm512_i32gather_epi32(cell, c.first, 1), _mm512_set1_epi32(255));
    const __mmask16 above = _mm512_cmp_ps_mask(v, _mm512_i32gather_ps(below, c.midpoint, 4), _CMP_GT_OQ);
    const __m512i found = _mm512_mask_add_epi32(below, above, below, _mm512_set1_epi32(1));
    const __m512i code = _mm512_mask_mov_epi32(found, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(255));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out + i), _mm512_cvtepi32_epi8(code));
  }
}
#elif defined(__AVX2__)
static inline V lower_negative(V x, V limit) { return {_mm256_blendv_ps(x.v, _mm256_min_ps(x.v, limit.v), x.v)}; }
static inline V magnitude(V x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), x.v)}; }
static inline V pick(const float *table, const uint8_t *c) {
  return {_mm256_setr_ps(table[c[0]], table[c[1]], table[c[2]], table[c[3]], table[c[4]], table[c[5]], table[c[6]], table[c[7]])};
}
static inline void encode(const DynamicCode &c, const float *x, int64_t count, uint8_t *out) {
  constexpr int64_t RUN = 64;
  alignas(32) int32_t cells[RUN];
  for (int64_t from = 0; from < count; from += RUN) {
    const int64_t run = count - from < RUN ? count - from : RUN;
    for (int64_t i = 0; i < run; i += N) {
      const __m256 v = _mm256_loadu_ps(x + from + i);
      const __m256i bits = _mm256_castps_si256(v);
      __m256i cell = _mm256_srli_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)), CELL_BITS);
      cell = _mm256_sub_epi32(cell, _mm256_set1_epi32(CELL_FIRST));
      cell = _mm256_min_epi32(_mm256_max_epi32(cell, _mm256_setzero_si256()), _mm256_set1_epi32(CELLS - 1));
      // NaN of either sign is in the last cell of the positive numbers
      const __m256i negative = _mm256_and_si256(_mm256_srai_epi32(bits, 31), _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_ORD_Q)));
      cell = _mm256_add_epi32(cell, _mm256_and_si256(negative, _mm256_set1_epi32(CELLS)));
      _mm256_store_si256(reinterpret_cast<__m256i *>(cells + i), cell);
    }
    for (int64_t i = 0; i < run; i++) {
      const int below = c.first[cells[i]];
      out[from + i] = uint8_t(below + (x[from + i] > c.midpoint[below]));
    }
  }
}
#else
static inline V lower_negative(V x, V limit) {
  for (int i = 0; i < N; i++) x.v[i] = std::signbit(x.v[i]) && limit.v[i] < x.v[i] ? limit.v[i] : x.v[i];
  return x;
}
static inline V magnitude(V x) {
  for (int i = 0; i < N; i++) x.v[i] = std::fabs(x.v[i]);
  return x;
}
static inline V pick(const float *table, const uint8_t *codes) {
  V out;
  for (int i = 0; i < N; i++) out.v[i] = table[codes[i]];
  return out;
}
static inline void encode(const DynamicCode &c, const float *x, int64_t count, uint8_t *out) {
  for (int64_t i = 0; i < count; i++) out[i] = uint8_t(nearest(c, x[i]));
}
#endif

}  // namespace EP_ISA
}  // namespace ep
#endif
