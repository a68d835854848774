// AVX-512 on a machine without it: the intrinsics that csrc/cpu takes, as loops over lanes, so that the kernels' AVX-512 paths can
// be tested anywhere. The build with ENGINEPOST_EMULATE_AVX512=ON includes this file before every other in the sources that are
// compiled for AVX-512 (CMakeLists.txt); what is not listed here does not compile, and is to be added. Semantics: Intel's
// Intrinsics Guide.
//
// Lanes that an instruction leaves undefined are filled with ones, which are NaN and -1: code that relies on them fails.
#pragma once

#include <immintrin.h>  // before the macros below: it must not see __AVX512F__

#include <cmath>
#include <cstdint>
#include <cstring>

namespace avx512_emulated {

typedef int32_t Ints __attribute__((vector_size(64)));

template <class To, class From>
static inline To cast(const From &x) {
  To to;
  std::memset(&to, 0xff, sizeof to);
  std::memcpy(&to, &x, sizeof x < sizeof to ? sizeof x : sizeof to);
  return to;
}
template <class To, class Lane>
static inline To make(Lane &&lane) {  // To's lanes (float, int32_t, ...) from lane(i)
  decltype(lane(0)) lanes[sizeof(To) / sizeof(lane(0))];
  for (int i = 0; i < int(sizeof(To) / sizeof(lane(0))); i++) lanes[i] = lane(i);
  return cast<To>(lanes);
}
template <class Lane, class From>
static inline Lane at(const From &x, int i) {
  Lane lane;
  std::memcpy(&lane, reinterpret_cast<const char *>(&x) + size_t(i) * sizeof lane, sizeof lane);
  return lane;
}
template <class Lane>
static inline __m512 floats(Lane &&lane) {
  return make<__m512>([&](int i) { return float(lane(i)); });
}
template <class Lane>
static inline __m512i ints(Lane &&lane) {
  return make<__m512i>([&](int i) { return int32_t(lane(i)); });
}
template <class Test>
static inline __mmask16 mask(Test &&test) {
  unsigned bits = 0;
  for (int i = 0; i < 16; i++) bits |= unsigned(test(i)) << i;
  return __mmask16(bits);
}
static inline bool in(__mmask16 k, int i) { return (k >> i & 1) != 0; }
// NOTES: not (c ? a : b)[i] on vectors, which GCC 12 gets wrong where UndefinedBehaviorSanitizer checks the index.
static inline float f32(const __m512 &x, int i) { return at<float>(x, i); }
static inline int32_t i32(const __m512i &x, int i) { return at<int32_t>(x, i); }
static inline uint32_t u32(const __m512i &x, int i) { return at<uint32_t>(x, i); }

// float32
static inline __m512 set1_ps(float x) { return __m512{} + x; }
static inline __m512 setzero_ps() { return __m512{}; }
static inline __m512 loadu_ps(const void *p) {
  return make<__m512>([&](int i) { return static_cast<const float *>(p)[i]; });
}
static inline void storeu_ps(void *p, __m512 a) { std::memcpy(p, &a, 64); }
static inline __m512 maskz_loadu_ps(__mmask16 k, const float *p) {
  return floats([&](int i) { return in(k, i) ? p[i] : 0.f; });
}
static inline void mask_storeu_ps(float *p, __mmask16 k, __m512 a) {
  for (int i = 0; i < 16; i++) {
    if (in(k, i)) p[i] = a[i];
  }
}
static inline __m512 add_ps(__m512 a, __m512 b) { return a + b; }
static inline __m512 sub_ps(__m512 a, __m512 b) { return a - b; }
static inline __m512 mul_ps(__m512 a, __m512 b) { return a * b; }
static inline __m512 div_ps(__m512 a, __m512 b) { return a / b; }
static inline __m512 min_ps(__m512 a, __m512 b) { return a < b ? a : b; }  // b where one is NaN
static inline __m512 max_ps(__m512 a, __m512 b) { return a > b ? a : b; }
static inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  __m256 half[2];
  for (int h = 0; h < 2; h++) half[h] = _mm256_fmadd_ps(at<__m256>(a, h), at<__m256>(b, h), at<__m256>(c, h));
  return cast<__m512>(half);
}
static inline __m512 sqrt_ps(__m512 a) {
  const __m256 half[2] = {_mm256_sqrt_ps(at<__m256>(a, 0)), _mm256_sqrt_ps(at<__m256>(a, 1))};
  return cast<__m512>(half);
}
static inline __m512 abs_ps(__m512 a) {
  return floats([&](int i) { return std::fabs(a[i]); });
}
static inline __m512 roundscale_ps(__m512 a, int mode) {
  if (mode != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) __builtin_trap();
  return floats([&](int i) { return std::nearbyint(a[i]); });
}
static inline __m512 scalef_ps(__m512 a, __m512 n) {  // a * 2^floor(n), rounded once
  return floats([&](int i) {
    if (n[i] != n[i]) return n[i];
    return std::ldexp(a[i], int(std::floor(n[i] > 1000.f ? 1000.f : n[i] < -1000.f ? -1000.f : n[i])));
  });
}
static inline float reduce_add_ps(__m512 a) {  // halves, as GCC's header does
  for (int n = 8; n > 0; n /= 2) {
    for (int i = 0; i < n; i++) a[i] += a[i + n];
  }
  return a[0];
}
static inline float reduce_max_ps(__m512 a) {
  for (int i = 1; i < 16; i++) a[0] = a[0] > a[i] ? a[0] : a[i];
  return a[0];
}
static inline __m512 unpack_ps(__m512 a, __m512 b, int from) {
  return floats([&](int i) { return f32(i % 2 ? b : a, i / 4 * 4 + from + i % 4 / 2); });
}
static inline __m512 unpacklo_ps(__m512 a, __m512 b) { return unpack_ps(a, b, 0); }
static inline __m512 unpackhi_ps(__m512 a, __m512 b) { return unpack_ps(a, b, 2); }
static inline __m512 shuffle_ps(__m512 a, __m512 b, int by) {
  return floats([&](int i) { return f32(i % 4 < 2 ? a : b, i / 4 * 4 + (by >> 2 * (i % 4) & 3)); });
}
static inline __m512 shuffle_f32x4(__m512 a, __m512 b, int by) {
  return floats([&](int i) { return f32(i < 8 ? a : b, (by >> 2 * (i / 4) & 3) * 4 + i % 4); });
}
static inline __m512 permutexvar_ps(__m512i index, __m512 a) {
  return floats([&](int i) { return a[i32(index, i) & 15]; });
}
static inline __m512 i32gather_ps(__m512i index, const void *base, int scale) {
  return floats([&](int i) { return at<float>(*(static_cast<const char *>(base) + int64_t(i32(index, i)) * scale), 0); });
}
static inline __m512 broadcast_f32x8(__m256 a) {
  return floats([&](int i) { return a[i % 8]; });
}
static inline __m512 castps128_ps512(__m128 a) { return cast<__m512>(a); }
static inline __m512 castps256_ps512(__m256 a) { return cast<__m512>(a); }
static inline __mmask16 cmp_ps_mask(__m512 a, __m512 b, int what) {
  return mask([&](int i) {
    const float x = a[i], y = b[i];
    switch (what) {
      case _CMP_UNORD_Q: return x != x || y != y;
      case _CMP_ORD_Q: return x == x && y == y;
      case _CMP_GT_OQ: return x > y;
      case _CMP_EQ_OQ: return x == y;
      case _CMP_NGE_UQ: return !(x >= y);
      default: __builtin_trap();
    }
  });
}
static inline __m512 mask_blend_ps(__mmask16 k, __m512 a, __m512 b) {
  return floats([&](int i) { return in(k, i) ? b[i] : a[i]; });
}
static inline __m512 maskz_mov_ps(__mmask16 k, __m512 a) {
  return floats([&](int i) { return in(k, i) ? a[i] : 0.f; });
}

// int32
static inline __m512i castps_si512(__m512 a) { return cast<__m512i>(a); }
static inline __m512 castsi512_ps(__m512i a) { return cast<__m512>(a); }
static inline __m256i castsi512_si256(__m512i a) { return at<__m256i>(a, 0); }
static inline __m256i extracti64x4_epi64(__m512i a, int half) { return at<__m256i>(a, half); }
static inline __m512i set1_epi32(int32_t x) { return __m512i(Ints{} + x); }
static inline __m512i setzero_si512() { return __m512i{}; }
static inline __m512i loadu_si512(const void *p) {
  return make<__m512i>([&](int i) { return static_cast<const int32_t *>(p)[i]; });
}
static inline void storeu_si512(void *p, __m512i a) { std::memcpy(p, &a, 64); }
static inline void stream_si512(__m512i *p, __m512i a) {
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) __builtin_trap();
  std::memcpy(p, &a, 64);
}
static inline __m512i and_si512(__m512i a, __m512i b) { return a & b; }
static inline __m512i xor_si512(__m512i a, __m512i b) { return a ^ b; }
static inline __m512i add_epi32(__m512i a, __m512i b) {
  return ints([&](int i) { return u32(a, i) + u32(b, i); });
}
static inline __m512i min_epu32(__m512i a, __m512i b) {
  return ints([&](int i) { return u32(a, i) < u32(b, i) ? u32(a, i) : u32(b, i); });
}
static inline __m512i slli_epi32(__m512i a, unsigned by) {
  return ints([&](int i) { return by > 31 ? 0u : u32(a, i) << by; });
}
static inline __m512i srli_epi32(__m512i a, unsigned by) {
  return ints([&](int i) { return by > 31 ? 0u : u32(a, i) >> by; });
}
static inline __m512i mask_add_epi32(__m512i other, __mmask16 k, __m512i a, __m512i b) {
  return ints([&](int i) { return in(k, i) ? u32(a, i) + u32(b, i) : u32(other, i); });
}
static inline __m512i mask_or_epi32(__m512i other, __mmask16 k, __m512i a, __m512i b) {
  return ints([&](int i) { return in(k, i) ? u32(a, i) | u32(b, i) : u32(other, i); });
}
static inline __mmask16 cmpgt_epi32_mask(__m512i a, __m512i b) {
  return mask([&](int i) { return i32(a, i) > i32(b, i); });
}
static inline __mmask16 cmpeq_epi32_mask(__m512i a, __m512i b) {
  return mask([&](int i) { return i32(a, i) == i32(b, i); });
}
static inline __m512 cvtepi32_ps(__m512i a) {
  return floats([&](int i) { return float(i32(a, i)); });
}
static inline __m512i cvtepu8_epi32(__m128i a) {
  return ints([&](int i) { return at<uint8_t>(a, i); });
}
static inline __m512i cvtepu16_epi32(__m256i a) {
  return ints([&](int i) { return at<uint16_t>(a, i); });
}
static inline __m512i cvtepu8_epi16(__m256i a) {
  return make<__m512i>([&](int i) { return uint16_t(at<uint8_t>(a, i)); });
}
static inline __m256i cvtepi32_epi16(__m512i a) {
  return make<__m256i>([&](int i) { return uint16_t(u32(a, i)); });
}
static inline __m128i cvtepi32_epi8(__m512i a) {
  return make<__m128i>([&](int i) { return uint8_t(u32(a, i)); });
}
static inline __m128i cvtsepi32_epi8(__m512i a) {
  return make<__m128i>([&](int i) { return int8_t(i32(a, i) > 127 ? 127 : i32(a, i) < -128 ? -128 : i32(a, i)); });
}
static inline __m512i broadcast_i32x4(__m128i a) {
  return ints([&](int i) { return at<int32_t>(a, i % 4); });
}
static inline __m512i broadcast_i32x8(__m256i a) {
  return ints([&](int i) { return at<int32_t>(a, i % 8); });
}
static inline __m512i broadcast_i64x4(__m256i a) { return broadcast_i32x8(a); }
static inline __m512i permutexvar_epi32(__m512i index, __m512i a) {
  return ints([&](int i) { return i32(a, i32(index, i) & 15); });
}
static inline __m512i permutexvar_epi16(__m512i index, __m512i a) {
  return make<__m512i>([&](int i) { return at<uint16_t>(a, at<uint16_t>(index, i) & 31); });
}
static inline __m512i shuffle_epi8(__m512i a, __m512i index) {
  return make<__m512i>([&](int i) {
    const uint8_t from = at<uint8_t>(index, i);
    return from & 0x80 ? uint8_t(0) : at<uint8_t>(a, i / 16 * 16 + (from & 15));
  });
}

// The masked halves of 16 bits (AVX-512BW and VL).
static inline __m256i maskz_loadu_epi16(__mmask16 k, const void *p) {
  return make<__m256i>([&](int i) { return in(k, i) ? static_cast<const uint16_t *>(p)[i] : uint16_t(0); });
}
static inline void mask_storeu_epi16(void *p, __mmask16 k, __m256i a) {
  for (int i = 0; i < 16; i++) {
    if (in(k, i)) static_cast<uint16_t *>(p)[i] = at<uint16_t>(a, i);
  }
}

}  // namespace avx512_emulated

#define __AVX512F__ 1
#define _mm512_abs_ps avx512_emulated::abs_ps
#define _mm512_add_epi32 avx512_emulated::add_epi32
#define _mm512_add_ps avx512_emulated::add_ps
#define _mm512_and_si512 avx512_emulated::and_si512
#define _mm512_broadcast_f32x8 avx512_emulated::broadcast_f32x8
#define _mm512_broadcast_i32x4 avx512_emulated::broadcast_i32x4
#define _mm512_broadcast_i32x8 avx512_emulated::broadcast_i32x8
#define _mm512_broadcast_i64x4 avx512_emulated::broadcast_i64x4
#define _mm512_castps128_ps512 avx512_emulated::castps128_ps512
#define _mm512_castps256_ps512 avx512_emulated::castps256_ps512
#define _mm512_castps_si512 avx512_emulated::castps_si512
#define _mm512_castsi512_ps avx512_emulated::castsi512_ps
#define _mm512_castsi512_si256 avx512_emulated::castsi512_si256
#define _mm512_cmp_ps_mask avx512_emulated::cmp_ps_mask
#define _mm512_cmpeq_epi32_mask avx512_emulated::cmpeq_epi32_mask
#define _mm512_cmpgt_epi32_mask avx512_emulated::cmpgt_epi32_mask
#define _mm512_cvtepi32_epi16 avx512_emulated::cvtepi32_epi16
#define _mm512_cvtepi32_epi8 avx512_emulated::cvtepi32_epi8
#define _mm512_cvtepi32_ps avx512_emulated::cvtepi32_ps
#define _mm512_cvtepu16_epi32 avx512_emulated::cvtepu16_epi32
#define _mm512_cvtepu8_epi16 avx512_emulated::cvtepu8_epi16
#define _mm512_cvtepu8_epi32 avx512_emulated::cvtepu8_epi32
#define _mm512_cvtsepi32_epi8 avx512_emulated::cvtsepi32_epi8
#define _mm512_div_ps avx512_emulated::div_ps
#define _mm512_extracti64x4_epi64 avx512_emulated::extracti64x4_epi64
#define _mm512_fmadd_ps avx512_emulated::fmadd_ps
#define _mm512_i32gather_ps avx512_emulated::i32gather_ps
#define _mm512_loadu_ps avx512_emulated::loadu_ps
#define _mm512_loadu_si512 avx512_emulated::loadu_si512
#define _mm512_maskz_mov_ps avx512_emulated::maskz_mov_ps
#define _mm512_mask_add_epi32 avx512_emulated::mask_add_epi32
#define _mm512_mask_blend_ps avx512_emulated::mask_blend_ps
#define _mm512_mask_or_epi32 avx512_emulated::mask_or_epi32
#define _mm512_mask_storeu_ps avx512_emulated::mask_storeu_ps
#define _mm512_maskz_loadu_ps avx512_emulated::maskz_loadu_ps
#define _mm512_max_ps avx512_emulated::max_ps
#define _mm512_min_epu32 avx512_emulated::min_epu32
#define _mm512_min_ps avx512_emulated::min_ps
#define _mm512_mul_ps avx512_emulated::mul_ps
#define _mm512_permutexvar_epi16 avx512_emulated::permutexvar_epi16
#define _mm512_permutexvar_epi32 avx512_emulated::permutexvar_epi32
#define _mm512_permutexvar_ps avx512_emulated::permutexvar_ps
#define _mm512_reduce_add_ps avx512_emulated::reduce_add_ps
#define _mm512_reduce_max_ps avx512_emulated::reduce_max_ps
#define _mm512_roundscale_ps avx512_emulated::roundscale_ps
#define _mm512_scalef_ps avx512_emulated::scalef_ps
#define _mm512_set1_epi32 avx512_emulated::set1_epi32
#define _mm512_set1_ps avx512_emulated::set1_ps
#define _mm512_setzero_ps avx512_emulated::setzero_ps
#define _mm512_setzero_si512 avx512_emulated::setzero_si512
#define _mm512_shuffle_epi8 avx512_emulated::shuffle_epi8
#define _mm512_shuffle_f32x4 avx512_emulated::shuffle_f32x4
#define _mm512_shuffle_ps avx512_emulated::shuffle_ps
#define _mm512_slli_epi32 avx512_emulated::slli_epi32
#define _mm512_sqrt_ps avx512_emulated::sqrt_ps
#define _mm512_srli_epi32 avx512_emulated::srli_epi32
#define _mm512_storeu_ps avx512_emulated::storeu_ps
#define _mm512_storeu_si512 avx512_emulated::storeu_si512
#define _mm512_stream_si512 avx512_emulated::stream_si512
#define _mm512_sub_ps avx512_emulated::sub_ps
#define _mm512_unpackhi_ps avx512_emulated::unpackhi_ps
#define _mm512_unpacklo_ps avx512_emulated::unpacklo_ps
#define _mm512_xor_si512 avx512_emulated::xor_si512
#define _mm256_maskz_loadu_epi16 avx512_emulated::maskz_loadu_epi16
#define _mm256_mask_storeu_epi16 avx512_emulated::mask_storeu_epi16
