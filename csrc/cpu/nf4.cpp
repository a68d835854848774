// Quantising to and from 4 bits, after bitsandbytes' default backend.
//
//   absmax_b = max |x| over block b        s = x * (1 / max(absmax_b, 1e-38))        code = number of thresholds below s
//
// A short last block divides instead (s = x / max(absmax, 1e-38)) and stores the clamped absmax. Thresholds are the midpoints of
// the sorted codebook; a tie goes down; NaN counts as above all of them. FP4's codes are then put in the order of its bit patterns.
#include "enginepost/nf4.h"

#include "dispatch.h"
#include "isa.h"
#include "nf4_tile.h"
#include "parallel.h"
#include "simd.h"
#include "tensor.h"

namespace ep {
struct Nf4Quantize {
  const char *x;
  bool bf16;
  int64_t size;
  uint8_t *packed;
  float *absmax;
  int shift;
  const float *thresholds;  // 15
  const uint8_t *order;     // 16: code of each rank
};
struct Nf4Dequantize {
  Nf4 w;
  char *out;
  bool bf16;
};
constexpr int64_t TASK = 1 << 16;          // elements; a multiple of every block size
constexpr int64_t STREAM_BYTES = 8 << 20;  // results from this size on are written past the caches
}  // namespace ep

EP_KERNEL(nf4_quantize, Nf4Quantize)
EP_KERNEL(nf4_dequantize, Nf4Dequantize)

#ifndef EP_API

namespace ep {
namespace EP_ISA {

// Number of thresholds t with !(t >= s).
static inline int rank_of(float s, const float *t) {
  int n = 0;
  for (int i = 0; i < 15; i++) n += !(t[i] >= s);
  return n;
}

#if defined(__AVX512F__)
// Binary search: the sorted thresholds of each of four rounds, looked up by the rank so far.
struct Ranks {
  __m512 first, second, third, fourth;
  explicit Ranks(const float *t) {
    first = _mm512_set1_ps(t[7]);
    second = _mm512_castps128_ps512(_mm_setr_ps(t[3], t[11], 0, 0));
    third = _mm512_castps128_ps512(_mm_setr_ps(t[1], t[5], t[9], t[13]));
    fourth = _mm512_castps256_ps512(_mm256_setr_ps(t[0], t[2], t[4], t[6], t[8], t[10], t[12], t[14]));
  }
  static __m512i add(__m512i rank, __m512 t, __m512 s) {
    const __m512i twice = _mm512_add_epi32(rank, rank);
    return _mm512_mask_add_epi32(twice, _mm512_cmp_ps_mask(t, s, _CMP_NGE_UQ), twice, _mm512_set1_epi32(1));
  }
  __m512i operator()(__m512 s) const {
    __m512i r = add(_mm512_setzero_si512(), first, s);
    r = add(r, _mm512_permutexvar_ps(r, second), s);
    r = add(r, _mm512_permutexvar_ps(r, third), s);
    return add(r, _mm512_permutexvar_ps(r, fourth), s);
  }
};
#elif defined(__AVX2__)
struct Ranks {
  __m256 first, second, third, fourth;
  explicit Ranks(const float *t) {
    first = _mm256_set1_ps(t[7]);
    second = _mm256_setr_ps(t[3], t[11], 0, 0, 0, 0, 0, 0);
    third = _mm256_setr_ps(t[1], t[5], t[9], t[13], 0, 0, 0, 0);
    fourth = _mm256_setr_ps(t[0], t[2], t[4], t[6], t[8], t[10], t[12], t[14]);
  }
  static __m256i add(__m256i rank, __m256 t, __m256 s) {
    return _mm256_sub_epi32(_mm256_add_epi32(rank, rank), _mm256_castps_si256(_mm256_cmp_ps(t, s, _CMP_NGE_UQ)));
  }
  __m256i operator()(__m256 s) const {
    __m256i r = add(_mm256_setzero_si256(), first, s);
    r = add(r, _mm256_permutevar8x32_ps(second, r), s);
    r = add(r, _mm256_permutevar8x32_ps(third, r), s);
    return add(r, _mm256_permutevar8x32_ps(fourth, r), s);
  }
};
#endif

#if defined(__AVX2__)
// 32 ranks, in four vectors of 8, to 16 bytes.
static inline __m128i pack_ranks(const __m256i *r, __m256i order) {
  // packs work within halves: bytes come as r0[0:4] r1[0:4] r2[0:4] r3[0:4] | r0[4:8] ...
  const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(r[0], r[1]), _mm256_packs_epi32(r[2], r[3]));
  const __m256i code = _mm256_shuffle_epi8(order, bytes);
  const __m256i pairs = _mm256_maddubs_epi16(code, _mm256_set1_epi16(0x0110));  // 16 * even + odd
  // 16-bit pairs: r0[0:4] -> 2 pairs, r1, r2, r3 | second halves: interleave the halves by 32 bits, then narrow
  const __m256i both = _mm256_permutevar8x32_epi32(pairs, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  return _mm_packus_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
}
#endif

template <class T>
static void quantize(const Nf4Quantize &a) {
  const T *x = reinterpret_cast<const T *>(a.x);
  const int64_t block_size = int64_t(1) << a.shift;
#if defined(__AVX2__)
  const Ranks ranks(a.thresholds);
  const __m256i order = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(a.order)));
#endif
  parallel_for((a.size + TASK - 1) / TASK, [&](int64_t task, int) {
    const int64_t end = a.size - task * TASK < TASK ? a.size : (task + 1) * TASK;
    for (int64_t from = task * TASK; from < end; from += block_size) {
      const bool whole = a.size - from >= block_size;
      const int64_t count = whole ? block_size : a.size - from;
      float most = magnitude(x + from, count);
      const float divisor = most < 1e-38f ? 1e-38f : most, factor = 1.f / divisor;
      a.absmax[from >> a.shift] = whole ? most : divisor;
      uint8_t *packed = a.packed + from / 2;
      int64_t i = 0;
#if defined(__AVX512F__)
      if (whole) {
        const V f = set1(factor);
        for (; i + 32 <= count; i += 32) {
          const __m512i low = ranks((load(x + from + i) * f).v), high = ranks((load(x + from + i + 16) * f).v);
          const __m256i r[4] = {_mm512_castsi512_si256(low), _mm512_extracti64x4_epi64(low, 1), _mm512_castsi512_si256(high),
                                _mm512_extracti64x4_epi64(high, 1)};
          _mm_storeu_si128(reinterpret_cast<__m128i *>(packed + i / 2), pack_ranks(r, order));
        }
      }
#elif defined(__AVX2__)
      if (whole) {
        const V f = set1(factor);
        for (; i + 32 <= count; i += 32) {
          __m256i r[4];
          for (int k = 0; k < 4; k++) r[k] = ranks((load(x + from + i + k * 8) * f).v);
          _mm_storeu_si128(reinterpret_cast<__m128i *>(packed + i / 2), pack_ranks(r, order));
        }
      }
#endif
      for (; i < count; i += 2) {
        int code[2] = {7, 7};
        for (int k = 0; k < 2; k++) {
          const float v = i + k < count ? to_float(x[from + i + k]) : 0.f;
          code[k] = a.order[rank_of(whole ? v * factor : v / divisor, a.thresholds)];
        }
        packed[i / 2] = uint8_t(code[0] << 4 | code[1]);
      }
    }
  });
}

void nf4_quantize(const Nf4Quantize &a) { a.bf16 ? quantize<bf16>(a) : quantize<float>(a); }

template <class T>
static void dequantize(const Nf4Dequantize &a) {
  T *out = reinterpret_cast<T *>(a.out);
  const bool stream = a.w.size * int64_t(sizeof(T)) >= STREAM_BYTES && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  parallel_for((a.w.size + TASK - 1) / TASK, [&](int64_t task, int) {
    const int64_t from = task * TASK, count = a.w.size - from < TASK ? a.w.size - from : TASK;
    if (!stream) return decode(a.w, from, count, out + from);
    decode<T, true>(a.w, from, count, out + from);
#if defined(__AVX2__)
    _mm_sfence();
#endif
  });
}

void nf4_dequantize(const Nf4Dequantize &a) { a.bf16 ? dequantize<bf16>(a) : dequantize<float>(a); }

}  // namespace EP_ISA
}  // namespace ep

#else

#include "device_nf4.h"

namespace ep {

constexpr unsigned NUMBERS = FLOATS | GPU;

// The quantiles of a normal distribution (Dettmers et al. 2023, QLoRA, arXiv 2305.14314, appendix E), and FP4: sign, two exponent
// bits, one mantissa bit, over 12.
alignas(64) static const float CODE[2][16] = {
    {-1.f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
     -0.09105003625154495f, 0.f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
     0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.f},
    {0.f, 0.0625f / 12, 8.f / 12, 1.f, 4.f / 12, 0.5f, 2.f / 12, 0.25f, 0.f, -0.0625f / 12, -8.f / 12, -1.f, -4.f / 12, -0.5f,
     -2.f / 12, -0.25f}};
static const uint8_t ORDER[2][16] = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
                                     {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3}};

int nf4_shift(int64_t blocksize, const char *fn) {
  for (int shift = 5; shift <= 12; shift++) {
    if (blocksize == int64_t(1) << shift) return shift;
  }
  fail(EP_INVALID_ARGUMENT, "%s: blocksize must be a power of two from 32 to 4096, got %lld", fn, (long long)blocksize);
  return -1;
}

static bool known_type(int type, const char *fn) {
  if (type == EP_NF4 || type == EP_FP4) return true;
  fail(EP_INVALID_ARGUMENT, "%s: type must be EP_NF4 or EP_FP4, got %d", fn, type);
  return false;
}

int nf4_view(Nf4 &out, const ep_nf4_tensor &w, int64_t size, const char *fn) {
  const DLTensor *packed = w.packed, *absmax = w.absmax, *nested_absmax = w.nested_absmax, *nested_code = w.nested_code;
  const int shift = nf4_shift(w.blocksize, fn);
  if (shift < 0 || !known_type(w.type, fn)) return EP_INVALID_ARGUMENT;
  EP_VIEW(pv, packed, 1, U8 | GPU);
  EP_VIEW(av, absmax, 1, F32 | U8 | GPU);
  EP_VIEW_OPTIONAL(nv, nested_absmax, 1, F32 | GPU);
  EP_VIEW_OPTIONAL(cv, nested_code, 1, F32 | GPU);
  const bool nested = av.dtype == U8;
  const int64_t blocks = (size + w.blocksize - 1) / w.blocksize, groups = (blocks + 255) / 256;
  EP_REQUIRE(pv.size == (size + 1) / 2, "%s: %lld elements take %lld packed bytes, got %lld", fn, (long long)size,
             (long long)(size + 1) / 2, (long long)pv.size);
  EP_REQUIRE(av.size == blocks, "%s: %lld elements in blocks of %lld take %lld scales, absmax has %lld", fn, (long long)size,
             (long long)w.blocksize, (long long)blocks, (long long)av.size);
  EP_REQUIRE(nested == (nested_absmax != nullptr) && nested == (nested_code != nullptr),
             "%s: nested_absmax and nested_code belong to a uint8 absmax, and to no other", fn);
  EP_REQUIRE(!nested || (nv.size == groups && cv.size == 256),
             "%s: %lld scales take a nested_absmax of %lld and a nested_code of 256, got %lld and %lld", fn, (long long)blocks,
             (long long)groups, (long long)nv.size, (long long)cv.size);
  if (int status = check_one_device(fn, {&pv, &av, &nv, &cv})) return status;
  out = Nf4{reinterpret_cast<const uint8_t *>(pv.data),
            nested ? nullptr : reinterpret_cast<const float *>(av.data),
            reinterpret_cast<const uint8_t *>(av.data),
            reinterpret_cast<const float *>(nv.data),
            reinterpret_cast<const float *>(cv.data),
            float(w.offset),
            shift,
            CODE[w.type],
            size};
  return EP_OK;
}

}  // namespace ep

using namespace ep;

extern "C" int ep_nf4_quantize(const DLTensor *x, const DLTensor *packed, const DLTensor *absmax, int64_t blocksize, int type,
                               void *stream) {
  const char *fn = "nf4_quantize";
  EP_VIEW(xv, x, 1, NUMBERS);
  EP_VIEW(pv, packed, 1, U8 | GPU);
  EP_VIEW(av, absmax, 1, F32 | GPU);
  const int shift = nf4_shift(blocksize, fn);
  if (shift < 0 || !known_type(type, fn)) return EP_INVALID_ARGUMENT;
  const int64_t size = xv.size, blocks = (size + blocksize - 1) / blocksize;
  EP_REQUIRE(pv.size == (size + 1) / 2 && av.size == blocks, "%s: %lld elements need %lld bytes and %lld scales, got %lld and %lld",
             fn, (long long)size, (long long)(size + 1) / 2, (long long)blocks, (long long)pv.size, (long long)av.size);
  if (size == 0) return EP_OK;
  float thresholds[15];
  for (int i = 0; i < 15; i++) thresholds[i] = (CODE[type][ORDER[type][i]] + CODE[type][ORDER[type][i + 1]]) / 2;
  if (int status = check_one_device(fn, {&xv, &pv, &av})) return status;
#if defined(EP_GPU)
  if (on_gpu(xv.device)) {
    cuda::Nf4Quantize on{
        xv.data, kind_of(xv.dtype), size, reinterpret_cast<uint8_t *>(pv.data), reinterpret_cast<float *>(av.data), shift, {}, {}};
    for (int i = 0; i < 15; i++) on.thresholds[i] = thresholds[i];
    for (int i = 0; i < 16; i++) on.order[i] = ORDER[type][i];
    cuda::UseDevice use(xv.device.device_id);
    return cuda::nf4_quantize(on, stream);
  }
#endif
  (void)stream;
  Nf4Quantize args{xv.data, xv.dtype == BF16, size,       reinterpret_cast<uint8_t *>(pv.data), reinterpret_cast<float *>(av.data),
                   shift,   thresholds,       ORDER[type]};
  EP_RUN(nf4_quantize, args);
  return EP_OK;
}

extern "C" int ep_nf4_dequantize(ep_nf4_tensor w, const DLTensor *out, void *stream) {
  const char *fn = "nf4_dequantize";
  EP_VIEW(ov, out, 1, NUMBERS);
  Nf4Dequantize args{};
  const int status = nf4_view(args.w, w, ov.size, fn);
  if (status != EP_OK) return status;
  if (ov.size == 0) return EP_OK;
#if defined(EP_GPU)
  if (on_gpu(ov.device)) {
    cuda::UseDevice use(ov.device.device_id);
    return cuda::nf4_dequantize({device_nf4(args.w), ov.data, kind_of(ov.dtype)}, stream);
  }
#endif
  (void)stream;
  args.out = ov.data, args.bf16 = ov.dtype == BF16;
  EP_RUN(nf4_dequantize, args);
  return EP_OK;
}

#endif
