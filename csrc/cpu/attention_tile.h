// The inner pieces that both passes of attention use. Scores are held in units of log2: q is packed with scale * log2(e) inside, so
// that exp is one exp2 of a difference.
#pragma once

#include "attention.h"
#include "gemm.h"

namespace ep {
namespace EP_ISA {

constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.693147180559945309f;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
static inline int64_t round_down(int64_t n, int64_t step) { return n / step * step; }

// 2^x for x <= 128: x = n + r, a polynomial on |r| <= 1/2 (minimax, relative error 2e-9 before rounding), times 2^n. NaN stays NaN.
static inline V exp2(V x) {
  const V c = max(set1(-200.f), x), n = round(c), r = c - n;
  V p = set1(1.535336225e-4f);
  p = fma(p, r, set1(1.339887474e-3f));
  p = fma(p, r, set1(9.618437359e-3f));
  p = fma(p, r, set1(5.55033247e-2f));
  p = fma(p, r, set1(2.402264791e-1f));
  p = fma(p, r, set1(6.931472029e-1f));
  return scale2(fma(p, r, set1(1.f)), n);
}

// Row r of the stack of a sequence's query heads that share key head `kv_head`.
template <class T>
static inline T *stacked_row(const HeadRows &x, const Sequence &seq, int64_t kv_head, int64_t group, int64_t r) {
  return reinterpret_cast<T *>(x.data) + (seq.q0 + r / group) * x.token + (kv_head * group + r % group) * x.head;
}

template <class T>
static inline const T *key_row(const HeadRows &x, const Sequence &seq, int64_t kv_head, int64_t j) {
  const T *head = reinterpret_cast<const T *>(x.data) + kv_head * x.head;
  if (seq.page_size == 0) return head + (seq.k0 + j) * x.token;
  return head + seq.pages[j / seq.page_size] * x.page + j % seq.page_size * x.token;
}

// lines[j - k0] = key j of [k0, k1).
template <class T>
static inline void key_rows(const HeadRows &x, const Sequence &seq, int64_t kv_head, int64_t k0, int64_t k1, const T **lines) {
  for (int64_t run; k0 < k1; k0 += run) {
    run = run_of_keys(seq, k0, k1);
    const T *first = key_row<T>(x, seq, kv_head, k0);
    for (int64_t i = 0; i < run; i++) *lines++ = first + i * x.token;
  }
}

// Rows [r0, r1) of the stack as panels (D, MR), times `scale`.
template <class T>
static inline void pack_stack_panels(const HeadRows &x, const Sequence &seq, const AttentionShape &s, int64_t kv_head, int64_t r0,
                                     int64_t r1, float scale, float *panels) {
  const int64_t group = s.heads / s.kv_heads;
  for (; r0 < r1; r0 += MR, panels += s.head_dim * MR) {
    const int count = int(least(MR, r1 - r0));
    const T *lines[MR];
    for (int i = 0; i < count; i++) lines[i] = stacked_row<const T>(x, seq, kv_head, group, r0 + i);
    pack_columns<MR>([&](int i) { return lines[i]; }, count, s.head_dim, scale, panels);
  }
}

// Keys [k0, k1) as panels (D, NR).
template <class T>
static inline void pack_key_panels(const HeadRows &x, const Sequence &seq, int64_t head_dim, int64_t kv_head, int64_t k0,
                                   int64_t k1, float *panels) {
  for (; k0 < k1; k0 += NR, panels += head_dim * NR) {
    const int64_t end = least(k0 + NR, k1);
    const T *lines[NR];
    key_rows(x, seq, kv_head, k0, end, lines);
    pack_columns<NR>([&](int i) { return lines[i]; }, int(end - k0), head_dim, 1.f, panels);
  }
}

// Keys [k0, k1), widened, as panels (height, NR).
template <class T>
static inline void pack_key_rows(const HeadRows &x, const Sequence &seq, int64_t head_dim, int64_t kv_head, int64_t k0, int64_t k1,
                                 int64_t height, float *out) {
  for (int64_t run; k0 < k1; k0 += run, out += run * NR) {
    run = run_of_keys(seq, k0, k1);
    const T *first = key_row<T>(x, seq, kv_head, k0);
    pack_row_panels([&](int64_t i) { return first + i * x.token; }, run, head_dim, height, out);
  }
}

// tile (MR, SCORES), columns [c0, c1) = a panel (D, MR)^T times panels (D, NR); c0 and c1 are multiples of NR.
static inline void panel_product(int64_t head_dim, const float *a, const float *panels, int64_t c0, int64_t c1, float *tile) {
  for (int64_t c = c0; c < c1; c += NR) micro<1, MR, false>(head_dim, a, panels + c * head_dim, NR, tile + c, SCORES);
}

static inline void fill(float *p, int64_t begin, int64_t end, float value) {
  for (int64_t i = begin; i < end; i++) p[i] = value;
}

}  // namespace EP_ISA
}  // namespace ep
