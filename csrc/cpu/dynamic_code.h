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
  uint8_t kind[16];                        // by the low four bits of (bits >> 24): the class at the lower end of those binades
  int32_t border[8];                       // bits of the midpoint between a class and the next
  float per_code[8], at_zero[8];           // magnitude * per_code + at_zero, rounded down and ...
  uint8_t highest[16];                     // ... not above this (twice the same eight), is the code
  float size_of_code[8], size_at_zero[8];  // the way back, by exponent: decode()
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

// where_finite(x, a, b): a where x is finite, else b.
// pick: the values of the next N codes. Decoder: the same to a relative error of 4e-7, without reading tables.
// Encoder: the nearest codes to 32 numbers, taken N at a time into Encoded and then put. Magnitudes are at most 1, give or take a
// rounding; a NaN has no payload. KEEP: a negative number does not become the code of zero (nor a positive one without signs).
//
// NOTES: AVX2's gathers are slower than single loads on AMD's cores (Zen 3: 30 cycles for 8 lanes). What bounds an encoder there is
// the number of instructions, vpermps (three of them, in effect) above all; so what can be done to 32 bytes at once is.
#if defined(__AVX2__)
#if defined(__AVX512F__)
typedef __m512i I;
static inline I bits_of(V x) { return _mm512_castps_si512(x.v); }
static inline V magnitude(V x) { return {_mm512_abs_ps(x.v)}; }
static inline V flip(V x, V by) {  // x, or -x where `by` has its sign bit set
  const I sign = _mm512_and_si512(bits_of(by), _mm512_set1_epi32(INT32_MIN));
  return {_mm512_castsi512_ps(_mm512_xor_si512(bits_of(x), sign))};
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
static inline I ints(int32_t x) { return _mm512_set1_epi32(x); }
static inline I both(I a, I b) { return _mm512_and_si512(a, b); }
static inline I smaller(I a, I b) { return _mm512_min_epu32(a, b); }
static inline I one_more_above(I a, I x, I border) {  // a + 1 where x > border
  return _mm512_mask_add_epi32(a, _mm512_cmpgt_epi32_mask(x, border), a, _mm512_set1_epi32(1));
}
static inline bool any_zero(I a) { return _mm512_cmpeq_epi32_mask(a, _mm512_setzero_si512()) != 0; }
static inline V floats_of(const uint8_t *p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))))};
}
static inline __m256i joined(__m128i a, __m128i b) { return _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1); }
// The lowest bytes of 32 lanes; of lanes below 256; lanes as signed bytes, with saturation. in_order: bytes in the order of their
// lanes.
static inline __m256i low_bytes(const I *a) { return joined(_mm512_cvtepi32_epi8(a[0]), _mm512_cvtepi32_epi8(a[1])); }
static inline __m256i small_bytes(const I *a) { return low_bytes(a); }
static inline __m256i signed_bytes(const I *a) { return joined(_mm512_cvtsepi32_epi8(a[0]), _mm512_cvtsepi32_epi8(a[1])); }
static inline __m256i in_order(__m256i bytes) { return bytes; }
#else
typedef __m256i I;
static inline I bits_of(V x) { return _mm256_castps_si256(x.v); }
static inline V magnitude(V x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), x.v)}; }
static inline V flip(V x, V by) { return {_mm256_xor_ps(x.v, _mm256_and_ps(by.v, _mm256_set1_ps(-0.f)))}; }
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
static inline I ints(int32_t x) { return _mm256_set1_epi32(x); }
static inline I both(I a, I b) { return _mm256_and_si256(a, b); }
static inline I smaller(I a, I b) { return _mm256_min_epu32(a, b); }
static inline I one_more_above(I a, I x, I border) { return _mm256_sub_epi32(a, _mm256_cmpgt_epi32(x, border)); }
static inline bool any_zero(I a) { return _mm256_movemask_epi8(_mm256_cmpeq_epi32(a, _mm256_setzero_si256())) != 0; }
static inline V floats_of(const uint8_t *p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))))};
}
static inline __m256i small_bytes(const I *a) {
  return _mm256_packus_epi16(_mm256_packus_epi32(a[0], a[1]), _mm256_packus_epi32(a[2], a[3]));
}
static inline __m256i low_bytes(const I *a) {
  const I low[] = {both(a[0], ints(255)), both(a[1], ints(255)), both(a[2], ints(255)), both(a[3], ints(255))};
  return small_bytes(low);
}
static inline __m256i signed_bytes(const I *a) {
  return _mm256_packs_epi16(_mm256_packs_epi32(a[0], a[1]), _mm256_packs_epi32(a[2], a[3]));
}
static inline __m256i in_order(__m256i bytes) {
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
#endif

template <bool SIGNED>
struct Decoder {
  V size_of_code, size_at_zero;
  Decoder(const DynamicCode &c, float scale)
      : size_of_code(eight(c.size_of_code) * set1(scale)), size_at_zero(eight(c.size_at_zero) * set1(scale)) {}
  V operator()(const uint8_t *codes) const {
    const V n = SIGNED ? fma(floats_of(codes), set1(2.f), set1(-254.f)) : floats_of(codes) + set1(1.f);
    const I kind = shift_right<23>(bits_of(n));
    const V from = look_up(size_at_zero, kind);
    return fma(n, look_up(size_of_code, kind), SIGNED ? flip(from, n) : from);
  }
};

struct Encoded {
  I index[32 / N], kind[32 / N], x[32 / N], fraction = ints(-1);
};

template <bool SIGNED, bool KEEP>
struct Encoder {
  const DynamicCode &code;
  V per_code, at_zero;
  I border, kinds;
  explicit Encoder(const DynamicCode &c)
      : code(c), per_code(eight(c.per_code)), at_zero(eight(c.at_zero)), border(eight(c.border)), kinds(sixteen_bytes(c.kind)) {}

  void operator()(V x, int j, Encoded &to) const {
    const V size = max(set1(0x1p-24f), SIGNED ? magnitude(x) : x);  // NaN stays
    I kind = look_up_bytes(kinds, shift_right<24>(bits_of(size)));
    kind = one_more_above(kind, bits_of(size), look_up(border, kind));
    const V t = fma(size, look_up(per_code, kind), look_up(at_zero, kind));
    // 1.5 * 2^12 added to a number leaves it in the lower bits, 11 of them below the point. Those are zero close to a midpoint and
    // for NaN, and for a magnitude that is a border, of which the tie rule makes one thing or the other.
    const I fixed = bits_of(t + set1(6144.f));
    to.fraction = smaller(to.fraction, both(fixed, ints(2047)));
    to.index[j] = shift_right<11>(fixed);
    to.kind[j] = kind;
    if (SIGNED || KEEP) to.x[j] = bits_of(x);
  }

  // take(i): numbers i to i + N again.
  template <class Take>
  void put(const Encoded &from, uint8_t *out, Take &&take) const {
    const __m256i highest = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(code.highest)));
    const __m256i one = _mm256_set1_epi8(1), zero_code = _mm256_set1_epi8(127);
    __m256i index = _mm256_min_epu8(low_bytes(from.index), _mm256_shuffle_epi8(highest, small_bytes(from.kind)));
    if (SIGNED) {
      const __m256i below = _mm256_subs_epu8(zero_code, KEEP ? _mm256_max_epu8(index, one) : index);  // down from 0: there is no -1
      index = _mm256_blendv_epi8(_mm256_add_epi8(zero_code, index), below, signed_bytes(from.x));
    } else if (KEEP) {
      index = _mm256_max_epu8(index, _mm256_min_epu8(signed_bytes(from.x), one));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), in_order(index));
    if (any_zero(from.fraction)) one_by_one(out, take);
  }
#else
static inline V magnitude(V x) {
  for (int i = 0; i < N; i++) x.v[i] = std::fabs(x.v[i]);
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

template <bool SIGNED>
struct Decoder {
  const float *value;
  V scale;
  Decoder(const DynamicCode &c, float s) : value(c.value), scale(set1(s)) {}
  V operator()(const uint8_t *codes) const { return pick(value, codes) * scale; }
};

struct Encoded {};

template <bool SIGNED, bool KEEP>
struct Encoder {
  const DynamicCode &code;
  explicit Encoder(const DynamicCode &c) : code(c) {}
  void operator()(V, int, Encoded &) const {}
  template <class Take>
  void put(const Encoded &, uint8_t *out, Take &&take) const {
    one_by_one(out, take);
  }
#endif
  template <class Take>
  void one_by_one(uint8_t *out, Take &&take) const {
    for (int i = 0; i < 32; i += N) {
      float x[N];
      store(x, take(i));
      for (int k = 0; k < N; k++) {
        const int found = nearest(code, x[k]);
        const bool lost = KEEP && found == code.zero && (SIGNED ? std::signbit(x[k]) : x[k] > 0.f);
        out[i + k] = uint8_t(!lost ? found : SIGNED ? found - 1 : found + 1);
      }
    }
  }
};

// The nearest codes to `count` numbers, a multiple of 32: take(i) gives numbers i to i + N.
template <class Encoder, class Take>
static inline void encode(const Encoder &encoder, int64_t count, uint8_t *out, Take &&take) {
  for (int64_t i = 0; i < count; i += 32) {
    Encoded codes;
    for (int j = 0; j < 32 / N; j++) encoder(take(i + j * N), j, codes);
    encoder.put(codes, out + i, [&](int64_t k) { return take(i + k); });
  }
}

}  // namespace EP_ISA
}  // namespace ep
#endif
