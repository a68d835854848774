// 4-bit codes to numbers, shared by the kernels that read quantised weights. A block's scale is multiplied into the 16-entry
// codebook once (the product is the one that each element would take), and elements are then looked up: AVX-512 holds the table in
// one register, AVX2 in two (float32) or as two byte planes for a shuffle (bfloat16).
#pragma once

#include "enginepost/nf4.h"
#include "simd.h"
#include "tensor.h"

namespace ep {

// A view of an ep_nf4_tensor that has been checked.
struct Nf4 {
  const uint8_t *packed;
  const float *absmax;  // NULL when nested
  const uint8_t *absmax8;
  const float *nested_absmax, *nested_code;
  float offset;
  int shift;          // blocksize = 1 << shift
  const float *code;  // 16
  int64_t size;
};
constexpr int NESTED_SHIFT = 8;

// Fills the view for `size` elements or writes an error and returns a status.
int nf4_view(Nf4 &out, const ep_nf4_tensor &w, int64_t size, const char *fn);
// log2 of a block size, or an error (-1).
int nf4_shift(int64_t blocksize, const char *fn);

}  // namespace ep

#ifdef EP_ISA
namespace ep {
namespace EP_ISA {

static inline float scale_of(const Nf4 &w, int64_t block) {
  if (w.absmax != nullptr) return w.absmax[block];
  return w.nested_code[w.absmax8[block]] * w.nested_absmax[block >> NESTED_SHIFT] + w.offset;
}

// The codebook times a scale, in the form that `decode` looks up. RUN codes (RUN / 2 bytes)
// are decoded at a time.
template <class T>
struct Lut;

#if defined(__AVX2__)
// 16 codes of 8 bytes, or 32 of 16, in order, one a byte.
static inline __m128i nibbles16(const uint8_t *packed) {
  const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(packed)), mask = _mm_set1_epi8(15);
  return _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(b, 4), mask), _mm_and_si128(b, mask));
}
static inline __m256i nibbles32(const uint8_t *packed) {
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i *>(packed)), mask = _mm_set1_epi8(15);
  const __m128i high = _mm_and_si128(_mm_srli_epi16(b, 4), mask), low = _mm_and_si128(b, mask);
  return _mm256_set_m128i(_mm_unpackhi_epi8(high, low), _mm_unpacklo_epi8(high, low));
}
#endif

#if defined(__AVX2__)
// STREAM: past the caches, to memory that is aligned and will not be read soon.
template <bool STREAM>
static inline void write(void *out, __m256i bits) {
  STREAM ? _mm256_stream_si256(static_cast<__m256i *>(out), bits) : _mm256_storeu_si256(static_cast<__m256i *>(out), bits);
}
#endif
#if defined(__AVX512F__)
template <bool STREAM>
static inline void write(void *out, __m512i bits) {
  STREAM ? _mm512_stream_si512(static_cast<__m512i *>(out), bits) : _mm512_storeu_si512(out, bits);
}

template <>
struct Lut<float> {
  static constexpr int RUN = 16;
  V table;
  Lut(const float *code, float scale) : table(load(code) * set1(scale)) {}
  template <bool STREAM>
  void decode(const uint8_t *packed, float *out) const {
    write<STREAM>(out, _mm512_castps_si512(_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(nibbles16(packed)), table.v)));
  }
};
template <>
struct Lut<bf16> {
  static constexpr int RUN = 32;
  __m512i table;
  Lut(const float *code, float scale) : table(_mm512_broadcast_i64x4(narrow(load(code) * set1(scale)))) {}
  template <bool STREAM>
  void decode(const uint8_t *packed, bf16 *out) const {
    write<STREAM>(out, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(nibbles32(packed)), table));
  }
};
#elif defined(__AVX2__)
template <>
struct Lut<float> {
  static constexpr int RUN = 16;
  V low, high;
  Lut(const float *code, float scale) : low(load(code) * set1(scale)), high(load(code + 8) * set1(scale)) {}
  template <bool STREAM>
  void decode(const uint8_t *packed, float *out) const {
    const __m128i c = nibbles16(packed);
    for (int i = 0; i < 2; i++) {
      const __m256i at = _mm256_cvtepu8_epi32(i ? _mm_srli_si128(c, 8) : c);
      const __m256 a = _mm256_permutevar8x32_ps(low.v, at), b = _mm256_permutevar8x32_ps(high.v, at);
      const __m256 value = _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
      write<STREAM>(out + i * 8, _mm256_castps_si256(value));
    }
  }
};
template <>
struct Lut<bf16> {
  static constexpr int RUN = 32;
  __m256i low, high;  // the low and the high byte of each entry, in both halves
  Lut(const float *code, float scale) {
    const V s = set1(scale);
    const __m128i a = narrow(load(code) * s), b = narrow(load(code + 8) * s), mask = _mm_set1_epi16(255);
    low = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(a, mask), _mm_and_si128(b, mask)));
    high = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
  }
  template <bool STREAM>
  void decode(const uint8_t *packed, bf16 *out) const {
    const __m256i c = _mm256_permute4x64_epi64(nibbles32(packed), 0xd8);  // so that the unpacking below keeps the order
    const __m256i l = _mm256_shuffle_epi8(low, c), h = _mm256_shuffle_epi8(high, c);
    write<STREAM>(out, _mm256_unpacklo_epi8(l, h));
    write<STREAM>(out + 16, _mm256_unpackhi_epi8(l, h));
  }
};
#else
template <class T>
struct Lut {
  static constexpr int RUN = 2;
  T table[16];
  Lut(const float *code, float scale) {
    for (int i = 0; i < 16; i++) from_float(code[i] * scale, table + i);
  }
  template <bool>
  void decode(const uint8_t *packed, T *out) const {
    out[0] = table[*packed >> 4];
    out[1] = table[*packed & 15];
  }
};
#endif

// max |x| of up to a block; the bit patterns of magnitudes are ordered like the magnitudes, NaN above all.
template <class T>
static inline float magnitude(const T *x, int64_t count) {
  int32_t best = 0;
  int64_t i = 0;
#if defined(__AVX2__)
  __m256i most = _mm256_setzero_si256();
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  for (; i + 8 <= count; i += 8) {
    __m256i bits;
    if constexpr (sizeof(T) == 4) {
      bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x + i));
    } else {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(x + i));
      bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
    }
    most = _mm256_max_epi32(most, _mm256_and_si256(bits, mask));
  }
  int32_t lane[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(lane), most);
  for (int k = 0; k < 8; k++) best = lane[k] > best ? lane[k] : best;
#endif
  for (; i < count; i++) {
    const float v = to_float(x[i]);
    int32_t bits;
    std::memcpy(&bits, &v, 4);
    bits &= 0x7fffffff;
    best = bits > best ? bits : best;
  }
  float m;
  std::memcpy(&m, &best, 4);
  return m;
}

// out = elements [start, start + count) of the flat tensor. STREAM: out is 64-byte aligned and start begins a block.
template <class T, bool STREAM = false>
static inline void decode(const Nf4 &w, int64_t start, int64_t count, T *out) {
  while (count > 0) {
    const int64_t block = start >> w.shift, end = (block + 1) << w.shift;
    int64_t run = end - start < count ? end - start : count;
    start += run, count -= run;
    int64_t i = start - run;
    const float scale = scale_of(w, block);
    if (i & 1) {
      from_float(w.code[w.packed[i >> 1] & 15] * scale, out++);
      i++, run--;
    }
    const uint8_t *p = w.packed + (i >> 1);
    constexpr int RUN = Lut<T>::RUN;
    if (run >= RUN) {
      const Lut<T> lut(w.code, scale);
      for (; run >= RUN; run -= RUN, p += RUN / 2, out += RUN) lut.template decode<STREAM>(p, out);
    }
    for (; run >= 2; run -= 2, p++, out += 2) {
      from_float(w.code[*p >> 4] * scale, out);
      from_float(w.code[*p & 15] * scale, out + 1);
    }
    if (run) from_float(w.code[*p >> 4] * scale, out++);
  }
}

}  // namespace EP_ISA
}  // namespace ep
#endif
