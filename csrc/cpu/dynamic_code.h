// The dynamic 8-bit code of bitsandbytes (Dettmers 2016, arXiv 1511.04561) and the search for its nearest value.
//
// Nearest is exact: the number of midpoints between neighbours that lie below x. Cells of equal leading bits (sign, exponent, seven
// bits of the mantissa) hold at most one midpoint each, so a table by cell gives the count at the cell's lower end, and one
// comparison with the next midpoint the rest. AVX2 reckons instead: the values of a decade (1, 2, 4 ... of them) are equally far
// apart, so a scaled magnitude is the index; where it is too close to a midpoint to tell, the tables decide.
#pragma once

#include <cstdint>

namespace ep {

constexpr int CELL_BITS = 16, CELL_FIRST = (127 - 24) << 7, CELLS = 24 * 128 + 2;  // magnitudes below 2^-24, ..., from 1.0 on

struct DynamicCode {
  const float *value;            // 256, ascending
  float midpoint[256];           // between value[i] and value[i + 1]; the last is infinity
  uint8_t first[2 * CELLS + 4];  // midpoints below the cell; cells of negative numbers follow those of positive ones
  // By class of the magnitude: 0 for zero, then the seven decades. Codes count from that of zero.
  int32_t zero;                // the code of 0
  int32_t begins[8];           // bits of the midpoint before class 1 .. 7, and of the last midpoint, before 1.0
  float inverse[8], shift[8];  // magnitude * inverse + shift: 0 at the lower midpoint of the class, 1 at the next ...
  int32_t base[8], last[8];    // the class's first code, its highest index
};
// Built at first use, never freed.
const DynamicCode &dynamic_code(bool is_signed);

}  // namespace ep

#ifdef EP_ISA
#include "simd.h"
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
  const auto ints = [](const int32_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); };
  const __m256 inverse = _mm256_loadu_ps(c.inverse), shift = _mm256_loadu_ps(c.shift), close = _mm256_set1_ps(1e-3f);
  const __m256i base = ints(c.base), last = ints(c.last), zero = _mm256_set1_epi32(c.zero);
  const __m256i unsigned_code = _mm256_set1_epi32(c.zero == 0 ? -1 : 0), magnitude_mask = _mm256_set1_epi32(0x7fffffff);
  const __m256i first_bytes = _mm256_set1_epi32(0x0c080400);
  __m256i begins[8];
  for (int k = 0; k < 8; k++) begins[k] = _mm256_set1_epi32(c.begins[k]);
  for (int64_t i = 0; i < count; i += N) {
    const __m256 v = _mm256_loadu_ps(x + i);
    const __m256i bits = _mm256_castps_si256(v), size = _mm256_and_si256(bits, magnitude_mask);
    const __m256i negative = _mm256_srai_epi32(bits, 31), key = _mm256_sub_epi32(size, negative);  // a tie goes down
    __m256i kind = _mm256_cmpgt_epi32(key, begins[0]);
    for (int k = 1; k < 7; k++) kind = _mm256_add_epi32(kind, _mm256_cmpgt_epi32(key, begins[k]));
    kind = _mm256_abs_epi32(kind);
    const __m256 t =
        _mm256_fmadd_ps(_mm256_castsi256_ps(size), _mm256_permutevar8x32_ps(inverse, kind), _mm256_permutevar8x32_ps(shift, kind));
    __m256i index = _mm256_max_epi32(_mm256_cvttps_epi32(t), _mm256_setzero_si256());
    index = _mm256_min_epi32(index, _mm256_permutevar8x32_epi32(last, kind));
    index = _mm256_add_epi32(index, _mm256_permutevar8x32_epi32(base, kind));
    index = _mm256_sub_epi32(index, _mm256_andnot_si256(negative, _mm256_cmpgt_epi32(key, begins[7])));
    index = _mm256_sub_epi32(_mm256_xor_si256(index, negative), negative);
    index = _mm256_andnot_si256(_mm256_and_si256(negative, unsigned_code), _mm256_add_epi32(index, zero));
    index = _mm256_shuffle_epi8(index, first_bytes);
    _mm_storel_epi64(reinterpret_cast<__m128i *>(out + i),
                     _mm_unpacklo_epi32(_mm256_castsi256_si128(index), _mm256_extracti128_si256(index, 1)));
    const __m256 off = _mm256_sub_ps(t, _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    const __m256 far = _mm256_cmp_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.f), off), close, _CMP_GE_OQ);  // not NaN
    for (int unsure = ~_mm256_movemask_ps(far) & 255; unsure != 0; unsure &= unsure - 1) {
      const int64_t at = i + __builtin_ctz(unsigned(unsure));
      out[at] = uint8_t(nearest(c, x[at]));
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
