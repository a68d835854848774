// c = a W^T (+ a2 b2) (+ c) for a few rows of a and a weight W (n, k) in 4 bits: bound by the reading of W, so it is decoded in
// registers where it is multiplied, 64 elements at a time, and each row of W is read once for up to four rows of a.
//
//   c_in = sum over blocks b of absmax_b * (sum over the block of a_ij * codebook[code_nj])
//
// The codebook stays in registers as it is and the scale multiplies a block's sum: weights are exact, never rounded to bfloat16.
// a is put once in the order in which codes come out of their bytes. How a row of c is summed depends on k alone.
//
// NOTES: with AVX2 alone, looking up four bytes of each entry is what the time goes to. Where a is bfloat16 the products are
// integers: the codebook times FACTOR is rounded to 15 bits with sign, and so are 64 numbers of a times what makes the largest
// 16383. Eight products then fit into 32 bits. The error of a weight is 1.8e-5 of the largest of its block, root mean square, where
// one that is rounded to bfloat16, as a dequantised layer has it, is off by 8.3e-4 on average; FP4 times 12288 is exact. A row of a
// with a number that is not finite gives NaN.
#include "nf4_matvec.h"

#include "parallel.h"

#ifndef EP_API

namespace ep {
namespace EP_ISA {

constexpr int64_t CHUNK = 64, PAD = 16;

// prepare: a row of a as `chunk` wants it. chunk: adds to acc what 64 weights are worth, elements p to p + 64 of a row of k.
template <class D, class Get>
static inline void widen(float *x, int64_t k, Get &&get) {
  for (int64_t p = 0; p < k; p++) x[p] = get(D::element_at(p));
}

// scale: of the first and the second half of the chunk; SMALL: they differ.
#if defined(__AVX512F__)
// 32 codes are 16 bytes widened to 32 bits: the high nibbles are the even elements, the low ones the odd. vpermps looks at the
// low four bits of an index alone.
template <bool EXACT>
struct Decoder {
  static constexpr float stretch = 1.f;
  V table;
  explicit Decoder(const float *code) : table(load(code)) {}
  static int64_t element_at(int64_t i) { return i / 32 * 32 + (i % 16) * 2 + i / 16 % 2; }
  template <class Get>
  static void prepare(float *x, int64_t k, Get &&get) {
    widen<Decoder>(x, k, get);
  }
  template <int R, bool SMALL>
  void chunk(const uint8_t *packed, const float *x, int64_t p, int64_t, int64_t ld, const float (&scale)[2], V (&acc)[R]) const {
    x += p;
    for (int half = 0; half < 2; half++, packed += 16, x += 32) {
      const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(packed)));
      const V even = {_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table.v)}, odd = {_mm512_permutexvar_ps(bytes, table.v)};
      const V s = set1(scale[SMALL ? half : 0]);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) acc[r] = fma(fma(odd, load(x + r * ld + 16), even * load(x + r * ld)), s, acc[r]);
    }
  }
};
#elif defined(__AVX2__)
template <bool SMALL>
static inline V scales(const float (&scale)[2]) {
  return SMALL ? V{_mm256_set_m128(_mm_set1_ps(scale[1]), _mm_set1_ps(scale[0]))} : set1(scale[0]);
}

// The bytes of each codebook entry are looked up apart (vpshufb); a plane holds one byte of all entries, in both halves.
template <class Entry>
static inline void planes(const Entry (&code)[16], __m256i (&plane)[sizeof(Entry)]) {
  for (size_t b = 0; b < sizeof(Entry); b++) {
    alignas(32) uint8_t bytes[32];
    for (int i = 0; i < 32; i++) bytes[i] = reinterpret_cast<const uint8_t *>(code + i % 16)[b];
    plane[b] = _mm256_load_si256(reinterpret_cast<const __m256i *>(bytes));
  }
}

template <bool EXACT>
struct Decoder;

// Four bytes are put together by two rounds of unpacking. Vector v of the high nibbles then holds elements 8v + 0, 2, 4, 6 of the
// chunk's first half and of its second; the low nibbles the odd ones.
template <>
struct Decoder<true> {
  static constexpr float stretch = 1.f;
  __m256i plane[4];
  explicit Decoder(const float *code) {
    float copy[16];
    std::memcpy(copy, code, sizeof copy);
    planes(copy, plane);
  }
  static int64_t element_at(int64_t i) {
    const int64_t at = i % 64, vector = at / 8, lane = at % 8;
    return i - at + lane / 4 * 32 + vector % 4 * 8 + lane % 4 * 2 + vector / 4;
  }
  template <class Get>
  static void prepare(float *x, int64_t k, Get &&get) {
    widen<Decoder>(x, k, get);
  }
  template <int R, bool SMALL>
  void chunk(const uint8_t *packed, const float *x, int64_t p, int64_t, int64_t ld, const float (&scale)[2], V (&acc)[R]) const {
    x += p;
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(packed)), mask = _mm256_set1_epi8(15);
    V part[R];
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++, x += 32) {
      const __m256i c = _mm256_and_si256(half ? bytes : _mm256_srli_epi16(bytes, 4), mask);
      const __m256i b0 = _mm256_shuffle_epi8(plane[0], c), b1 = _mm256_shuffle_epi8(plane[1], c);
      const __m256i b2 = _mm256_shuffle_epi8(plane[2], c), b3 = _mm256_shuffle_epi8(plane[3], c);
      const __m256i low0 = _mm256_unpacklo_epi8(b0, b1), low1 = _mm256_unpackhi_epi8(b0, b1);
      const __m256i high0 = _mm256_unpacklo_epi8(b2, b3), high1 = _mm256_unpackhi_epi8(b2, b3);
      const V w[4] = {{_mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0))},
                      {_mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0))},
                      {_mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1))},
                      {_mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1))}};
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const float *xr = x + r * ld;
        part[r] = half ? fma(w[0], load(xr), part[r]) : w[0] * load(xr);
        for (int v = 1; v < 4; v++) part[r] = fma(w[v], load(xr + v * 8), part[r]);
      }
    }
    const V s = scales<SMALL>(scale);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) acc[r] = fma(part[r], s, acc[r]);
  }
};

// Two bytes make a 16-bit integer, and are put together by one unpacking. A row of a is k integers and, behind them, k / 64 scales.
template <>
struct Decoder<false> {
  static constexpr float LARGEST = 16383.f;
  __m256i plane[2];
  float stretch;
  explicit Decoder(const float *code) : stretch(code[0] < 0 ? LARGEST : 12288.f) {
    int16_t rounded[16];
    for (int i = 0; i < 16; i++) rounded[i] = int16_t(std::lrint(code[i] * stretch));
    planes(rounded, plane);
  }
  // Word w of vector v: the high nibbles of bytes 0 to 7 and 16 to 23, of 8 to 15 and 24 to 31, then the low nibbles of the same.
  static int64_t element_at(int64_t i) {
    const int64_t at = i % 64, vector = at / 16, word = at % 16;
    return i - at + (word / 8 * 16 + vector % 2 * 8 + word % 8) * 2 + vector / 2;
  }
  template <class Get>
  static void prepare(float *x, int64_t k, Get &&get) {
    int16_t *numbers = reinterpret_cast<int16_t *>(x);
    float *scale = x + k / 2;
    for (int64_t p = 0; p < k; p += CHUNK) {
      float a[CHUNK];
      for (int64_t i = 0; i < CHUNK; i++) a[i] = get(element_at(p + i));
      V most = zero(), nothing = zero();
      for (int64_t i = 0; i < CHUNK; i += N) {
        most = max(max(load(a + i), zero() - load(a + i)), most);
        nothing = fma(load(a + i), zero(), nothing);
      }
      const float largest = max(most);
      const bool finite = sum(nothing) == 0.f, some = largest > 1e-34f;
      const V factor = set1(finite && some ? LARGEST / largest : 0.f);
      const auto rounded = [&](int64_t i) { return _mm256_cvtps_epi32((load(a + i) * factor).v); };
      for (int64_t i = 0; i < CHUNK; i += 2 * N) {
        const __m256i pair = _mm256_permute4x64_epi64(_mm256_packs_epi32(rounded(i), rounded(i + N)), 0xd8);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(numbers + p + i), pair);
      }
      scale[p / CHUNK] = !finite ? NAN : some ? largest / LARGEST : 0.f;
    }
  }
  template <int R, bool SMALL>
  void chunk(const uint8_t *packed, const float *x, int64_t p, int64_t k, int64_t ld, const float (&scale)[2], V (&acc)[R]) const {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(packed)), mask = _mm256_set1_epi8(15);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask), low = _mm256_and_si256(bytes, mask);
    const __m256i h0 = _mm256_shuffle_epi8(plane[0], high), h1 = _mm256_shuffle_epi8(plane[1], high);
    const __m256i l0 = _mm256_shuffle_epi8(plane[0], low), l1 = _mm256_shuffle_epi8(plane[1], low);
    const __m256i w[4] = {_mm256_unpacklo_epi8(h0, h1), _mm256_unpackhi_epi8(h0, h1), _mm256_unpacklo_epi8(l0, l1),
                          _mm256_unpackhi_epi8(l0, l1)};
    const V s = scales<SMALL>(scale);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const __m256i *numbers = reinterpret_cast<const __m256i *>(reinterpret_cast<const int16_t *>(x + r * ld) + p);
      __m256i product[4];
      for (int v = 0; v < 4; v++) product[v] = _mm256_madd_epi16(w[v], _mm256_loadu_si256(numbers + v));
      const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(product[0], product[1]), _mm256_add_epi32(product[2], product[3]));
      acc[r] = fma(V{_mm256_cvtepi32_ps(sum)}, s * set1(x[r * ld + k / 2 + p / CHUNK]), acc[r]);
    }
  }
};
#else
template <bool EXACT>
struct Decoder {
  static constexpr float stretch = 1.f;
  float pair[256][2];
  explicit Decoder(const float *code) {
    for (int i = 0; i < 256; i++) pair[i][0] = code[i >> 4], pair[i][1] = code[i & 15];
  }
  static int64_t element_at(int64_t i) { return i; }
  template <class Get>
  static void prepare(float *x, int64_t k, Get &&get) {
    widen<Decoder>(x, k, get);
  }
  template <int R, bool SMALL>
  void chunk(const uint8_t *packed, const float *x, int64_t p, int64_t, int64_t ld, const float (&scale)[2], V (&acc)[R]) const {
    x += p;
    for (int half = 0; half < 2; half++, packed += 16, x += 32) {
      float w[32];
      for (int i = 0; i < 16; i++) std::memcpy(w + 2 * i, pair[packed[i]], 8);
      for (int r = 0; r < R; r++) {
        V part = load(w) * load(x + r * ld);
        for (int i = N; i < 32; i += N) part = fma(load(w + i), load(x + r * ld + i), part);
        acc[r] = fma(part, set1(scale[SMALL ? half : 0]), acc[r]);
      }
    }
  }
};
#endif

static inline float element(const char *data, bool is_bf16, int64_t i) {
  return is_bf16 ? to_float(reinterpret_cast<const bf16 *>(data)[i]) : reinterpret_cast<const float *>(data)[i];
}

// Rows [row, row + R) of c, column n.
template <int R, bool SMALL, class C, class D>
static inline void rows(const Nf4Few &g, const D &decoder, int64_t row, int64_t n, int64_t ld) {
  V acc[R];
  for (int r = 0; r < R; r++) acc[r] = zero();
  const float *x = g.workspace + row * ld;
  const uint8_t *packed = g.w.packed + n * g.k / 2;
  for (int64_t p = 0; p < g.k; p += CHUNK, packed += CHUNK / 2) {
    const int64_t first = n * g.k + p;
    const float scale[2] = {scale_of(g.w, first >> g.w.shift), SMALL ? scale_of(g.w, (first + 32) >> g.w.shift) : 0.f};
    decoder.template chunk<R, SMALL>(packed, x, p, g.k, ld, scale, acc);
  }
  for (int r = 0; r < R; r++) {
    float total = sum(acc[r]) / decoder.stretch;
    const float *s = x + r * ld + g.k;
    float update = 0.f;
    if (g.b2_row == 1) {
      V u = zero();
      if (g.b2_bf16) {
        each(g.k2,
             [&](int64_t i, int c) { u = fma(load(s + i), get(reinterpret_cast<const bf16 *>(g.b2) + n * g.b2_col + i, c), u); });
      } else {
        each(g.k2,
             [&](int64_t i, int c) { u = fma(load(s + i), get(reinterpret_cast<const float *>(g.b2) + n * g.b2_col + i, c), u); });
      }
      update = sum(u);
    } else {
      for (int64_t i = 0; i < g.k2; i++) update += s[i] * element(g.b2, g.b2_bf16, i * g.b2_row + n * g.b2_col);
    }
    if (g.k2 > 0) total += update;
    C *c = reinterpret_cast<C *>(g.c) + (row + r) * g.c_row + n;
    from_float(g.accumulate ? to_float(*c) + total : total, c);
  }
}

template <bool SMALL, class C, class D>
static inline void columns(const Nf4Few &g, const D &decoder, int64_t n, int64_t ld) {
  int64_t row = 0;
  for (; row + 4 <= g.m; row += 4) rows<4, SMALL, C>(g, decoder, row, n, ld);
  if (g.m - row == 3) rows<3, SMALL, C>(g, decoder, row, n, ld);
  if (g.m - row == 2) rows<2, SMALL, C>(g, decoder, row, n, ld);
  if (g.m - row == 1) rows<1, SMALL, C>(g, decoder, row, n, ld);
}

template <bool EXACT, class C>
static void product(const Nf4Few &g) {
  using D = Decoder<EXACT>;
  const int64_t padded = (g.k2 + PAD - 1) / PAD * PAD, ld = g.k + padded;
  for (int64_t i = 0; i < g.m; i++) {
    float *x = g.workspace + i * ld;
    D::prepare(x, g.k, [&](int64_t p) { return element(g.a, g.a_bf16, i * g.a_row + p); });
    for (int64_t p = 0; p < padded; p++) x[g.k + p] = p < g.k2 ? element(g.a2, g.a2_bf16, i * g.a2_row + p * g.a2_col) : 0.f;
  }
  constexpr int64_t COLS = 32;
  parallel_for((g.n + COLS - 1) / COLS, [&](int64_t task, int) {
    const D decoder(g.w.code);
    const int64_t end = g.n - task * COLS < COLS ? g.n : (task + 1) * COLS;
    for (int64_t n = task * COLS; n < end; n++) {
      g.w.shift == 5 ? columns<true, C>(g, decoder, n, ld) : columns<false, C>(g, decoder, n, ld);
    }
  });
}

void nf4_few(const Nf4Few &g) {
  if (g.a_bf16) return g.c_bf16 ? product<false, bf16>(g) : product<false, float>(g);
  g.c_bf16 ? product<true, bf16>(g) : product<true, float>(g);
}

}  // namespace EP_ISA
}  // namespace ep

#endif
