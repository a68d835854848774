// The dynamic 8-bit code of bitsandbytes (Dettmers 2016, arXiv 1511.04561) and the search for its nearest value.
//
// Nearest is exact: the number of midpoints between neighbours that lie below x. Cells of equal leading bits (sign, exponent, seven
// bits of the mantissa) hold at most one midpoint each, so a table by cell gives the count at the cell's lower end, and one
// comparison with the next midpoint the rest.
//
// Vectors reckon instead of looking up: the values of a decade (1, 2, 4 ... of them) are equally far apart, so within a class,
// which is a decade, a magnitude times a factor is the code, and a code times a factor the magnitude. Eight classes are enough, so
// their tables are one register each. The class of a magnitude: two binades hold at most one border between decades, so the leading
// bits give the class below that border, and one comparison the rest. The class of a code: a decade has twice the codes of the one
// below, so that the exponent of the code counted from zero, as a float, is the decade. Where a scaled magnitude is so close to a
// midpoint that rounding could have moved it across, the tables decide.
#pragma once

#include <cstdint>

namespace ep {

constexpr int CELL_BITS = 16, CELL_FIRST = (127 - 24) << 7, CELLS = 24 * 128 + 2;  // magnitudes below 2^-24, ..., from 1.0 on

struct DynamicCode {
  const float *value;            // 256, ascending
  float midpoint[256];           // between value[i] and value[i + 1]; the last is infinity
  uint8_t first[2 * CELLS + 4];  // midpoints below the cell; cells of negative numbers follow those of positive ones
  int32_t zero;                  // the code of 0
  // What vectors take. Codes count from that of zero. Class 0: zero and the first decade; 1 to 6: the others; 7: one.
  uint8_t kind[16];                           // by the low four bits of (bits >> 24): the class at the lower end of those binades
  int32_t border[8];                          // bits of the midpoint between a class and the next
  float per_code[8], at_zero[8], highest[8];  // magnitude * per_code + at_zero rounds to the code, which is `highest` at most
  float size_of_code[8], size_at_zero[8];     // the way back, by exponent: decode()
  // What a GPU takes, by class of the magnitude: 0 for zero, then the seven decades.
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

// sized(x, floor): x with a magnitude of `floor` at least. NaN stays NaN: max returns its second operand then.
// where_negative(x, a, b): a where x has its sign bit set, else b; where_finite likewise. where_positive(x, a): a where x > 0, else
// 0. pick: the values of the next N codes. Decoder: the same to a relative error of 4e-7, without reading tables. Encoder: the
// codes of x, if no lane of `unsure` is set. A code's byte is the lowest of its lane.
//
// NOTES: AVX2's gathers are slower than single loads on AMD's cores (Zen 3: 30 cycles for 8 lanes).
#if defined(__AVX512F__)
typedef __m512i I;
typedef __mmask16 Unsure;
static inline I bits_of(V x) { return _mm512_castps_si512(x.v); }
static inline V magnitude(V x) { return {_mm512_abs_ps(x.v)}; }
static inline V flip(V x, V by) {  // x, or -x where `by` has its sign bit set
  const I sign = _mm512_and_si512(bits_of(by), _mm512_set1_epi32(INT32_MIN));
  return {_mm512_castsi512_ps(_mm512_xor_si512(bits_of(x), sign))};
}
static inline V where_negative(V x, V a, V b) { return {_mm512_mask_blend_ps(_mm512_movepi32_mask(bits_of(x)), b.v, a.v)}; }
static inline V where_positive(V x, V a) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_GT_OQ), a.v)};
}
static inline V where_finite(V x, V a, V b) {
  const __m512 none = _mm512_mul_ps(x.v, _mm512_setzero_ps());
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(none, none, _CMP_ORD_Q), b.v, a.v)};
}
static inline V pick(const float *table, const uint8_t *codes) {
  const I at = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(codes)));
  return {_mm512_i32gather_ps(at, table, 4)};
}
static inline V eight(const float *p) { return {_mm512_broadcast_f32x8(_mm256_loadu_ps(p))}; }
static inline I eight(const int32_t *p) { return _mm512_broadcast_i32x8(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
static inline I sixteen_bytes(const uint8_t *p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
static inline V look_up(V table, I at) { return {_mm512_permutexvar_ps(at, table.v)}; }
static inline I look_up(I table, I at) { return _mm512_permutexvar_epi32(at, table); }
static inline I look_up_bytes(I table, I at) { return _mm512_shuffle_epi8(table, at); }
template <int BY>
static inline I shift_right(I a) {
  return _mm512_srli_epi32(a, BY);
}
static inline I plus(I a, I b) { return _mm512_add_epi32(a, b); }
static inline I one_more_above(I a, I x, I border) {  // a + 1 where x > border
  return _mm512_mask_add_epi32(a, _mm512_cmpgt_epi32_mask(x, border), a, _mm512_set1_epi32(1));
}
static inline V floats_of(const uint8_t *p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))))};
}
static inline Unsure sure() { return 0; }
static inline void unless_at_most(Unsure &unsure, V x, V limit) { unsure |= _mm512_cmp_ps_mask(x.v, limit.v, _CMP_NLE_UQ); }
static inline bool any(Unsure unsure) { return unsure != 0; }
static inline void put_bytes(uint8_t *out, const I *codes) {
  for (int j = 0; j < 2; j++) _mm_storeu_si128(reinterpret_cast<__m128i *>(out) + j, _mm512_cvtepi32_epi8(codes[j]));
}
#elif defined(__AVX2__)
typedef __m256i I;
typedef __m256 Unsure;
static inline I bits_of(V x) { return _mm256_castps_si256(x.v); }
static inline V magnitude(V x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), x.v)}; }
static inline V flip(V x, V by) { return {_mm256_xor_ps(x.v, _mm256_and_ps(by.v, _mm256_set1_ps(-0.f)))}; }
static inline V where_negative(V x, V a, V b) { return {_mm256_blendv_ps(b.v, a.v, x.v)}; }
static inline V where_positive(V x, V a) { return {_mm256_and_ps(_mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_GT_OQ), a.v)}; }
static inline V where_finite(V x, V a, V b) {
  const __m256 none = _mm256_mul_ps(x.v, _mm256_setzero_ps());
  return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(none, none, _CMP_ORD_Q))};
}
static inline V pick(const float *table, const uint8_t *c) {
  return {_mm256_setr_ps(table[c[0]], table[c[1]], table[c[2]], table[c[3]], table[c[4]], table[c[5]], table[c[6]], table[c[7]])};
}
static inline V eight(const float *p) { return load(p); }
static inline I eight(const int32_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
static inline I sixteen_bytes(const uint8_t *p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
static inline V look_up(V table, I at) { return {_mm256_permutevar8x32_ps(table.v, at)}; }
static inline I look_up(I table, I at) { return _mm256_permutevar8x32_epi32(table, at); }
static inline I look_up_bytes(I table, I at) { return _mm256_shuffle_epi8(table, at); }
template <int BY>
static inline I shift_right(I a) {
  return _mm256_srli_epi32(a, BY);
}
static inline I plus(I a, I b) { return _mm256_add_epi32(a, b); }
static inline I one_more_above(I a, I x, I border) { return _mm256_sub_epi32(a, _mm256_cmpgt_epi32(x, border)); }
static inline V floats_of(const uint8_t *p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))))};
}
static inline Unsure sure() { return _mm256_setzero_ps(); }
static inline void unless_at_most(Unsure &unsure, V x, V limit) {
  unsure = _mm256_or_ps(unsure, _mm256_cmp_ps(x.v, limit.v, _CMP_NLE_UQ));
}
static inline bool any(Unsure unsure) { return _mm256_movemask_ps(unsure) != 0; }
static inline void put_bytes(uint8_t *out, const I *codes) {
  const I low = _mm256_set1_epi32(255);
  const I a = _mm256_packus_epi32(_mm256_and_si256(codes[0], low), _mm256_and_si256(codes[1], low));
  const I b = _mm256_packus_epi32(_mm256_and_si256(codes[2], low), _mm256_and_si256(codes[3], low));
  const I bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), bytes);
}
#else
struct I {
  uint8_t code[N];
};
struct Unsure {};
static inline Unsure sure() { return {}; }
static inline bool any(Unsure) { return false; }
static inline void put_bytes(uint8_t *out, const I *codes) { std::memcpy(out, codes, 32); }
static inline V magnitude(V x) {
  for (int i = 0; i < N; i++) x.v[i] = std::fabs(x.v[i]);
  return x;
}
static inline V flip(V x, V by) {
  for (int i = 0; i < N; i++) x.v[i] = std::signbit(by.v[i]) ? -x.v[i] : x.v[i];
  return x;
}
static inline V where_negative(V x, V a, V b) {
  for (int i = 0; i < N; i++) x.v[i] = std::signbit(x.v[i]) ? a.v[i] : b.v[i];
  return x;
}
static inline V where_positive(V x, V a) {
  for (int i = 0; i < N; i++) x.v[i] = x.v[i] > 0.f ? a.v[i] : 0.f;
  return x;
}
static inline V where_finite(V x, V a, V b) {
  for (int i = 0; i < N; i++) x.v[i] = std::isfinite(x.v[i]) ? a.v[i] : b.v[i];
  return x;
}
static inline V pick(const float *table, const uint8_t *codes) {
  V out;
  for (int i = 0; i < N; i++) out.v[i] = table[codes[i]];
  return out;
}
#endif

constexpr int WIDTH = 32 / N;  // vectors that are encoded together

template <bool SIGNED>
static inline V sized(V x, V floor) {
  return SIGNED ? flip(max(floor, magnitude(x)), x) : max(floor, x);
}

#if defined(__AVX2__)
template <bool SIGNED>
struct Decoder {
  V size_of_code, size_at_zero;
  explicit Decoder(const DynamicCode &c) : size_of_code(eight(c.size_of_code)), size_at_zero(eight(c.size_at_zero)) {}
  V operator()(const uint8_t *codes) const {
    const V n = SIGNED ? fma(floats_of(codes), set1(2.f), set1(-254.f)) : floats_of(codes) + set1(1.f);
    const I kind = shift_right<23>(bits_of(n));
    const V from = look_up(size_at_zero, kind);
    return fma(n, look_up(size_of_code, kind), SIGNED ? flip(from, n) : from);
  }
};

template <bool SIGNED>
struct Encoder {
  const DynamicCode &code;
  V per_code, at_zero, highest, whole, middle;
  I kinds, border;
  explicit Encoder(const DynamicCode &c)
      : code(c),
        per_code(eight(c.per_code)),
        at_zero(eight(c.at_zero)),
        highest(eight(c.highest)),
        whole(set1(12582912.f + float(c.zero))),  // 1.5 * 2^23: added to a number, its lowest bits are the nearest integer
        middle(set1(0.5f - 1.f / 4096)),
        kinds(sixteen_bytes(c.kind)),
        border(eight(c.border)) {}
  I operator()(V x, V floor, Unsure &unsure) const {
    const V size = max(floor, SIGNED ? magnitude(x) : x);
    const I key = SIGNED ? plus(bits_of(size), shift_right<31>(bits_of(x))) : bits_of(size);  // a tie goes down
    I kind = look_up_bytes(kinds, shift_right<24>(bits_of(size)));
    kind = one_more_above(kind, key, look_up(border, kind));
    V t = min(look_up(highest, kind), fma(size, look_up(per_code, kind), look_up(at_zero, kind)));
    if (SIGNED) t = max(set1(-127.f), flip(t, x));  // there is no -1
    const V rounded = t + whole;
    unless_at_most(unsure, magnitude(t - (rounded - whole)), middle);
    return bits_of(rounded);
  }
};
#else
template <bool SIGNED>
struct Decoder {
  const float *value;
  explicit Decoder(const DynamicCode &c) : value(c.value) {}
  V operator()(const uint8_t *codes) const { return pick(value, codes); }
};

template <bool SIGNED>
struct Encoder {
  const DynamicCode &code;
  explicit Encoder(const DynamicCode &c) : code(c) {}
  I operator()(V x, V floor, Unsure &) const {
    I codes;
    x = sized<SIGNED>(x, floor);
    for (int i = 0; i < N; i++) codes.code[i] = uint8_t(nearest(code, x.v[i]));
    return codes;
  }
};
#endif

// Writes 32 codes; where a lane is unsure, those of take(i, x, floor), which gives numbers i to i + N and their least magnitudes.
template <bool SIGNED, class Take>
static inline void put_codes(const Encoder<SIGNED> &encoder, const I (&codes)[WIDTH], Unsure unsure, uint8_t *out, Take &&take) {
  put_bytes(out, codes);
  if (!any(unsure)) return;
  for (int i = 0; i < 32; i += N) {
    V x, floor;
    take(i, x, floor);
    float lane[N];
    store(lane, sized<SIGNED>(x, floor));
    for (int k = 0; k < N; k++) out[i + k] = uint8_t(nearest(encoder.code, lane[k]));
  }
}

// The nearest codes to `count` numbers, a multiple of 32.
template <bool SIGNED, class Take>
static inline void encode(const Encoder<SIGNED> &encoder, int64_t count, uint8_t *out, Take &&take) {
  for (int64_t i = 0; i < count; i += 32) {
    I codes[WIDTH];
    Unsure unsure = sure();
    for (int j = 0; j < WIDTH; j++) {
      V x, floor;
      take(i + j * N, x, floor);
      codes[j] = encoder(x, floor, unsure);
    }
    put_codes(encoder, codes, unsure, out + i, [&](int j, V &x, V &floor) { take(i + j, x, floor); });
  }
}

}  // namespace EP_ISA
}  // namespace ep
#endif
