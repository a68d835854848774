// Merging: sums of a run of elements and their products, counts of magnitudes, random draws. Task vectors: merge_select.cpp.
#include "merge_tile.h"

#ifndef EP_API

namespace ep {
namespace EP_ISA {

// Inputs and output of one dtype. With COUNT inputs, known when this is compiled; 0: any number.
template <int COUNT, class T>
static inline void sum_of(const MergeWeightedSum &a) {
  const int count = COUNT > 0 ? COUNT : a.count;
  T *out = reinterpret_cast<T *>(a.out);
  each(a.size, [&](int64_t j, int m) {
    V total = get(reinterpret_cast<const T *>(a.x[0].data) + j, m) * set1(a.weight[0]);
    for (int i = 1; i < count; i++) total = total + get(reinterpret_cast<const T *>(a.x[i].data) + j, m) * set1(a.weight[i]);
    put(out + j, total, m);
  });
}
template <class T>
static void sum_of(const MergeWeightedSum &a) {
  if (a.count == 2) return sum_of<2, T>(a);
  if (a.count == 3) return sum_of<3, T>(a);
  sum_of<0, T>(a);
}

void merge_weighted_sum(const MergeWeightedSum &a) {
  bool alike = true;
  for (int i = 0; i < a.count; i++) alike = alike && a.x[i].dtype == a.out_dtype;
  if (alike && a.out_dtype == BF16) return sum_of<bf16>(a);
  if (alike && a.out_dtype == F32) return sum_of<float>(a);
  float x[TILE], total[TILE];
  for (int64_t at = 0; at < a.size; at += TILE) {
    const int n = int(a.size - at < TILE ? a.size - at : TILE);
    load_tile(a.x[0], at, n, total);
    for (int j = 0; j < TILE; j++) total[j] *= a.weight[0];
    for (int i = 1; i < a.count; i++) {
      const float w = a.weight[i];
      load_tile(a.x[i], at, n, x);
      for (int j = 0; j < TILE; j++) total[j] += x[j] * w;
    }
    store_tile(a.out, a.out_dtype, at, n, total);
  }
}

#if defined(__AVX2__)
static inline double sum_of_lanes(__m256d low, __m256d high) {
  double half[4];
  _mm256_storeu_pd(half, _mm256_add_pd(low, high));
  return (half[0] + half[2]) + (half[1] + half[3]);
}
#endif

// sum of x y over a tile: eight lanes of double. Products of floats are exact in double, so that fma gives the same bits.
static inline double dot_tile(const float *x, const float *y) {
#if defined(__AVX2__)
  __m256d low = _mm256_setzero_pd(), high = low;
  for (int j = 0; j < TILE; j += 8) {
    low = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm_loadu_ps(x + j)), _mm256_cvtps_pd(_mm_loadu_ps(y + j)), low);
    high = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm_loadu_ps(x + j + 4)), _mm256_cvtps_pd(_mm_loadu_ps(y + j + 4)), high);
  }
  return sum_of_lanes(low, high);
#else
  double lane[8] = {};
  for (int j = 0; j < TILE; j += 8) {
    for (int l = 0; l < 8; l++) lane[l] += double(x[j + l]) * double(y[j + l]);
  }
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
#endif
}

// part[0] += x x, part[2] += y x, part[3] += y y over a tile, each widened once.
static inline void dots_of_two(const float *x, const float *y, double *part) {
#if defined(__AVX2__)
  const __m256d zero = _mm256_setzero_pd();
  __m256d xx[2] = {zero, zero}, xy[2] = {zero, zero}, yy[2] = {zero, zero};
  for (int j = 0; j < TILE; j += 8) {
    for (int h = 0; h < 2; h++) {
      const __m256d u = _mm256_cvtps_pd(_mm_loadu_ps(x + j + 4 * h)), v = _mm256_cvtps_pd(_mm_loadu_ps(y + j + 4 * h));
      xx[h] = _mm256_fmadd_pd(u, u, xx[h]), xy[h] = _mm256_fmadd_pd(u, v, xy[h]), yy[h] = _mm256_fmadd_pd(v, v, yy[h]);
    }
  }
  part[0] += sum_of_lanes(xx[0], xx[1]);
  part[2] += sum_of_lanes(xy[0], xy[1]);
  part[3] += sum_of_lanes(yy[0], yy[1]);
#else
  part[0] += dot_tile(x, x), part[2] += dot_tile(y, x), part[3] += dot_tile(y, y);
#endif
}

void merge_gram(const MergeGram &a) {
  float d[EP_MERGE_MAX_INPUTS][TILE];
  double part[EP_MERGE_MAX_INPUTS * EP_MERGE_MAX_INPUTS];
  for (int64_t block = 0; block < a.size; block += SUM_BLOCK) {
    const int64_t end = a.size - block < SUM_BLOCK ? a.size : block + SUM_BLOCK;
    for (int i = 0; i < a.count * a.count; i++) part[i] = 0;
    for (int64_t at = block; at < end; at += TILE) {
      const int n = int(end - at < TILE ? end - at : TILE);
      if (a.count == 2) {
        load_delta(a.x[0], a.base, at, n, d[0]);
        load_delta(a.x[1], a.base, at, n, d[1]);
        dots_of_two(d[0], d[1], part);
        continue;
      }
      for (int i = 0; i < a.count; i++) {
        load_delta(a.x[i], a.base, at, n, d[i]);
        for (int j = 0; j <= i; j++) part[i * a.count + j] += dot_tile(d[i], d[j]);
      }
    }
    for (int i = 0; i < a.count; i++) {
      for (int j = 0; j <= i; j++) {
        a.total[i * a.count + j] += part[i * a.count + j];
        if (i != j) a.total[j * a.count + i] += part[i * a.count + j];
      }
    }
  }
}

void merge_counts(const MergeCounts &a) {
  float d[TILE];
  int32_t bits[TILE];
  int64_t *even = a.counts, *odd = a.counts + 65536;
  for (int64_t at = 0; at < a.size; at += TILE * a.every) {
    const int n = int(a.size - at < TILE ? a.size - at : TILE);
    load_delta(a.x, a.base, at, n, d);
    magnitude_bits(d, bits);
    int j = 0;
    for (; j + 2 <= n; j += 2) {
      even[bits[j] >> 15]++;
      odd[bits[j + 1] >> 15]++;
    }
    if (j < n) even[bits[j] >> 15]++;
  }
}

// Which of 32 numbers are in [low, low + width), the first in the lowest bit; below: so much less for each that is below.
static inline uint32_t within(const int32_t *bits, int32_t low, uint32_t width, int32_t *below) {
  uint32_t word = 0;
#if defined(__AVX2__)
  const __m256i least = _mm256_set1_epi32(low), last = _mm256_set1_epi32(int32_t(width - 1));
  __m256i sum = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(below));
  for (int j = 0; j < 32; j += 8) {
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(bits + j)), at = _mm256_sub_epi32(b, least);
    sum = _mm256_add_epi32(sum, _mm256_cmpgt_epi32(least, b));
    const __m256i in = _mm256_cmpeq_epi32(_mm256_min_epu32(at, last), at);  // at <= last, without signs
    word |= uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(in))) << j;
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(below), sum);
#else
  for (int j = 0; j < 32; j++) {
    below[j & 7] -= bits[j] < low;
    word |= uint32_t(uint32_t(bits[j] - low) < width) << j;
  }
#endif
  return word;
}

void merge_window_counts(const MergeWindowCounts &a) {
  int32_t bits[TILE];
  for (int64_t at = 0; at < a.size; at += TILE) {
    const int n = int(a.size - at < TILE ? a.size - at : TILE);
    const int32_t most = load_bits(a.x, a.base, at, n, bits);
    int64_t *counts = a.counts;
    for (int w = 0; w < a.count; w++) {
      const int32_t low = int32_t(a.windows[2 * w]);
      const uint32_t width = uint32_t(a.windows[2 * w + 1]);
      if (most < low) {  // as good as always in a window that only infinity reaches
        counts[0] += n;
      } else {
        int32_t below[8] = {};
        for (int from = 0; from < TILE; from += 32) {
          uint32_t hits = within(bits + from, low, width, below);
          if (n - from < 32) hits &= n > from ? (1u << (n - from)) - 1 : 0;
          for (; hits != 0; hits &= hits - 1) counts[1 + bits[from + __builtin_ctz(hits)] - low]++;
        }
        for (int l = 0; l < 8; l++) counts[0] -= below[l];
        counts[0] -= low > 0 ? TILE - n : 0;  // the padding is zero and not there
      }
      counts += 1 + int64_t(width);
    }
  }
}

void merge_nonfinite(const MergeNonfinite &a) {
  int64_t total = 0;
  for (int64_t from = 0; from < a.size; from += 4096) {
    const int64_t count = a.size - from < 4096 ? a.size - from : 4096;
    if (a.x.dtype == BF16) {
      const uint16_t *x = reinterpret_cast<const uint16_t *>(a.x.data) + from;
      uint16_t found = 0;  // as wide as an element, so that a vector holds as many
      for (int64_t j = 0; j < count; j++) found = uint16_t(found + ((x[j] & 0x7f80) == 0x7f80));
      total += found;
    } else {
      const uint32_t *x = reinterpret_cast<const uint32_t *>(a.x.data) + from;
      int32_t found = 0;
      for (int64_t j = 0; j < count; j++) found += (x[j] & 0x7f800000u) == 0x7f800000u;
      total += found;
    }
  }
  *a.count = total;
}

void merge_random(const MergeRandom &a) {
  for (int64_t at = 0; at < a.size; at += TILE) {
    const int n = int(a.size - at < TILE ? a.size - at : TILE);
    random_tile(a.key, a.start + at, n, reinterpret_cast<uint32_t *>(a.out) + at);
  }
}

}  // namespace EP_ISA
}  // namespace ep

#else

using namespace ep;

extern "C" int64_t ep_merge_workspace_bytes(int64_t size, int count, int64_t numbers) {
  const int64_t sums = (size + SUM_BLOCK - 1) / SUM_BLOCK * count * count, spans = (size + 8191) / 8192 * count;
  return 8 * (numbers + sums + spans) + 256 * (int64_t(count) + 1);
}

extern "C" int ep_merge_weighted_sum(const DLTensor *const *x, const double *weights, int count, const DLTensor *out,
                                     void *stream) {
  const char *fn = "merge_weighted_sum";
  MergeWeightedSum a{};
  Tensor at;
  a.size = pieces(a.x, x, count, fn, at);
  if (a.size < 0) return EP_INVALID_ARGUMENT;
  Piece o;
  if (!piece(o, out, fn, "out", a.size, at)) return EP_INVALID_ARGUMENT;
  EP_REQUIRE(weights != nullptr, "%s: weights is missing", fn);
  a.count = count;
  a.out = const_cast<char *>(o.data);
  a.out_dtype = o.dtype;
  for (int i = 0; i < count; i++) a.weight[i] = float(weights[i]);
  EP_DISPATCH(merge_weighted_sum, a, stream, fn, &at);
}

extern "C" int ep_merge_gram(const DLTensor *const *x, int count, const DLTensor *base, double *total, void *workspace,
                             void *stream) {
  const char *fn = "merge_gram";
  MergeGram a{};
  Tensor at;
  a.size = pieces(a.x, x, count, fn, at);
  if (a.size < 0) return EP_INVALID_ARGUMENT;
  if (base != nullptr && !piece(a.base, base, fn, "base", a.size, at)) return EP_INVALID_ARGUMENT;
  EP_REQUIRE(total != nullptr, "%s: total is missing", fn);
  a.count = count;
  if (!workspace_of(workspace, at, fn)) return EP_INVALID_ARGUMENT;
  a.workspace = workspace;
  a.total = total;
  EP_DISPATCH(merge_gram, a, stream, fn, &at);
}

extern "C" int ep_merge_magnitude_counts(const DLTensor *x, const DLTensor *base, int64_t every, int64_t *counts, void *workspace,
                                         void *stream) {
  const char *fn = "merge_magnitude_counts";
  MergeCounts a{};
  Tensor at;
  a.size = pieces(&a.x, &x, 1, fn, at);
  if (a.size < 0) return EP_INVALID_ARGUMENT;
  if (base != nullptr && !piece(a.base, base, fn, "base", a.size, at)) return EP_INVALID_ARGUMENT;
  EP_REQUIRE(every >= 1 && every <= 65536, "%s: every is %lld; 1 to 65536 are taken", fn, (long long)every);
  EP_REQUIRE(counts != nullptr, "%s: counts is missing", fn);
  a.every = every;
  if (!workspace_of(workspace, at, fn)) return EP_INVALID_ARGUMENT;
  a.workspace = workspace;
  a.counts = counts;
  EP_DISPATCH(merge_counts, a, stream, fn, &at);
}

extern "C" int ep_merge_window_counts(const DLTensor *x, const DLTensor *base, const int64_t *windows, int count, int64_t *counts,
                                      void *workspace, void *stream) {
  const char *fn = "merge_window_counts";
  MergeWindowCounts a{};
  Tensor at;
  a.size = pieces(&a.x, &x, 1, fn, at);
  if (a.size < 0) return EP_INVALID_ARGUMENT;
  if (base != nullptr && !piece(a.base, base, fn, "base", a.size, at)) return EP_INVALID_ARGUMENT;
  EP_REQUIRE(count >= 1 && count <= EP_MERGE_MAX_WINDOWS, "%s: %d windows; 1 to %d are taken", fn, count,
             int(EP_MERGE_MAX_WINDOWS));
  EP_REQUIRE(windows != nullptr && counts != nullptr, "%s: %s is missing", fn, windows == nullptr ? "windows" : "counts");
  for (int i = 0; i < count; i++) {
    const int64_t low = windows[2 * i], width = windows[2 * i + 1], most = int64_t(1) << 31;
    EP_REQUIRE(low >= 0 && width >= 1 && low < most && width <= most,
               "%s: window %d begins at %lld and is %lld wide; bits go from 0 to 2^31", fn, i, (long long)low, (long long)width);
  }
  a.windows = windows;
  a.count = count;
  if (!workspace_of(workspace, at, fn)) return EP_INVALID_ARGUMENT;
  a.workspace = workspace;
  a.counts = counts;
  EP_DISPATCH(merge_window_counts, a, stream, fn, &at);
}

extern "C" int ep_merge_nonfinite(const DLTensor *x, int64_t *count, void *workspace, void *stream) {
  const char *fn = "merge_nonfinite";
  MergeNonfinite a{};
  Tensor at;
  a.size = pieces(&a.x, &x, 1, fn, at);
  if (a.size < 0) return EP_INVALID_ARGUMENT;
  EP_REQUIRE(count != nullptr, "%s: count is missing", fn);
  if (!workspace_of(workspace, at, fn)) return EP_INVALID_ARGUMENT;
  a.workspace = workspace;
  a.count = count;
  EP_DISPATCH(merge_nonfinite, a, stream, fn, &at);
}

extern "C" int ep_merge_random(uint64_t key, int64_t start, const DLTensor *out, void *stream) {
  const char *fn = "merge_random";
  EP_VIEW(ov, out, 1, I32 | GPU);
  if (!start_of(start, fn)) return EP_INVALID_ARGUMENT;
  MergeRandom a{key, start, ov.size, reinterpret_cast<int32_t *>(ov.data)};
  EP_DISPATCH(merge_random, a, stream, fn, &ov);
}

#endif
