// Forward attention after Dao 2023 (FlashAttention-2, arXiv 2307.08691, algorithm 1).
//
// A task is one block of stacked rows of one (sequence, key head). It packs its rows of q once, then walks over blocks of keys: the
// block is packed (K transposed, V as it lies, both widened to float32), and each panel of MR rows makes its scores, their running
// softmax and its part of the output while the scores are still in the first-level cache. Tiles in which no row of the panel sees a
// key are skipped.
//
// A sequence with few rows (generation: one query, many keys) is bound by the reading of K and V, so it does not pack at all.
//
// Keys and values may lie in pages (Kwon et al. 2023, PagedAttention, arXiv 2309.06180): both ways of reading then go from page to
// page and do the same arithmetic, to the last bit.
#include "attention_tile.h"
#include "parallel.h"

#ifndef EP_API

namespace ep {
namespace EP_ISA {

constexpr float MINUS_INFINITY = -__builtin_inff();
constexpr int64_t FEW_ROWS = 8;

struct ForwardScratch {
  float *k, *v, *q, *out, *scores, *row_max, *row_sum;
  int64_t ld;  // floats from row to row of out
};

// s: scores of one row, columns [c0, c1), of which [begin, end) are seen; both c0 and c1 are multiples of N. Leaves 2^(s - max)
// there and returns what the earlier part of the row has to be multiplied by.
static inline float softmax_row(float *s, int64_t c0, int64_t c1, int64_t begin, int64_t end, float cap, float &row_max,
                                float &row_sum) {
  if (begin >= end) {
    fill(s, c0, c1, 0.f);
    return 1.f;
  }
  if (cap > 0) {
    const V top = set1(cap * LOG2E);
    for (int64_t c = c0; c < c1; c += N) store(s + c, tanh(load(s + c)) * top);
  }
  fill(s, c0, begin, MINUS_INFINITY);
  fill(s, end, c1, MINUS_INFINITY);
  V high = set1(row_max);
  for (int64_t c = c0; c < c1; c += N) high = max(high, load(s + c));
  const float now = max(high), rescale = row_max == now ? 1.f : std::exp2(row_max - now);
  const V shift = set1(now);
  V total = zero();
  for (int64_t c = c0; c < c1; c += N) {
    const V p = exp2(load(s + c) - shift);
    total = total + p;
    store(s + c, p);
  }
  row_max = now;
  row_sum = row_sum * rescale + sum(total);
  return rescale;
}

static inline void scale_row(float *out, int64_t width, float factor) {
  const V f = set1(factor);
  for (int64_t d = 0; d < width; d += N) store(out + d, load(out + d) * f);
}

template <class T>
static void write_row(const AttentionForward &a, const Sequence &seq, int64_t kv_head, int64_t row, const float *sum_of_v,
                      float row_max, float row_sum) {
  const int64_t group = a.shape.heads / a.shape.kv_heads;
  T *out = stacked_row<T>(a.out, seq, kv_head, group, row);
  const bool blind = row_max == MINUS_INFINITY && row_sum == 0.f;
  const V factor = set1(blind ? 0.f : 1.f / row_sum);
  each(a.shape.head_dim, [&](int64_t d, int n) { put(out + d, blind ? zero() : get(sum_of_v + d, n) * factor, n); });
  a.lse[(kv_head * group + row % group) * a.shape.tokens + seq.q0 + row / group] =
      blind ? MINUS_INFINITY : row_max * LN2 + std::log(row_sum);
}

static inline float score_scale(const AttentionShape &s) { return s.softcap > 0 ? s.scale / s.softcap : s.scale * LOG2E; }

template <class T>
static void packed_block(const AttentionForward &a, const ForwardScratch &w, const Sequence &seq, int64_t kv_head, int64_t r0,
                         int64_t r1) {
  const AttentionShape &s = a.shape;
  const int64_t group = s.heads / s.kv_heads, rows = r1 - r0, depth = s.head_dim;
  pack_stack_panels<T>(a.q, seq, s, kv_head, r0, r1, score_scale(s), w.q);
  for (int64_t i = 0; i < rows; i++) w.row_max[i] = MINUS_INFINITY, w.row_sum[i] = 0.f;
  const int64_t first_key = round_down(visible(s, seq, r0 / group).begin, FORWARD_KEYS),
                last_key = visible(s, seq, (r1 - 1) / group).end;
  bool fresh = true;
  for (int64_t k0 = first_key; k0 < last_key; k0 += FORWARD_KEYS, fresh = false) {
    const int64_t k1 = least(k0 + FORWARD_KEYS, last_key);
    pack_key_panels<T>(a.k, seq, depth, kv_head, k0, k1, w.k);
    pack_key_rows<T>(a.v, seq, depth, kv_head, k0, k1, FORWARD_KEYS, w.v);
    for (int64_t i0 = 0; i0 < rows; i0 += MR) {
      const int64_t i1 = least(i0 + MR, rows);
      const int64_t begin = most(visible(s, seq, (r0 + i0) / group).begin - k0, 0);
      const int64_t end = least(visible(s, seq, (r0 + i1 - 1) / group).end, k1) - k0;
      float *out = w.out + i0 * w.ld;
      if (begin >= end) {
        if (fresh) fill(out, 0, MR * w.ld, 0.f);
        continue;
      }
      const int64_t c0 = round_down(begin, NR), c1 = round_up(end, NR);
      panel_product(depth, w.q + i0 * depth, w.k, c0, c1, w.scores);
      for (int64_t i = i0; i < i1; i++) {
        const Span span = visible(s, seq, (r0 + i) / group);
        const float rescale = softmax_row(w.scores + (i - i0) * SCORES, c0, c1, most(span.begin - k0, c0), least(span.end, k1) - k0,
                                          s.softcap, w.row_max[i], w.row_sum[i]);
        if (!fresh && rescale != 1.f) scale_row(w.out + i * w.ld, w.ld, rescale);
      }
      for (int64_t d = 0; d < w.ld; d += NR) {
        const float *p = w.scores + begin, *v = w.v + d * FORWARD_KEYS + begin * NR;
        fresh ? micro<SCORES, 1, false>(end - begin, p, v, NR, out + d, w.ld)
              : micro<SCORES, 1, true>(end - begin, p, v, NR, out + d, w.ld);
      }
    }
  }
  if (fresh) fill(w.out, 0, rows * w.ld, 0.f);
  for (int64_t i = 0; i < rows; i++) write_row<T>(a, seq, kv_head, r0 + i, w.out + i * w.ld, w.row_max[i], w.row_sum[i]);
}

// scores (R, SCORES) = q (R, ld) times keys as they lie.
template <int R, class T>
static inline void few_scores(const float *q, int64_t ld, const T *k, int64_t k_step, int64_t keys, int64_t depth, float *scores) {
  for (int64_t j = 0; j < keys; j++, k += k_step) {
    V acc[R];
    for (int i = 0; i < R; i++) acc[i] = zero();
    each(depth, [&](int64_t d, int n) {
      const V kv = get(k + d, n);
      for (int i = 0; i < R; i++) acc[i] = fma(kv, load(q + i * ld + d), acc[i]);
    });
    for (int i = 0; i < R; i++) scores[i * SCORES + j] = sum(acc[i]);
  }
}

// out (R, ld) += p (R, SCORES) times values as they lie.
template <int R, class T>
static inline void few_values(const float *p, const T *v, int64_t v_step, int64_t keys, int64_t depth, float *out, int64_t ld) {
  constexpr int W = 4;
  int64_t d = 0;
  for (; d + W * N <= depth; d += W * N) {
    V acc[R][W];
    for (int i = 0; i < R; i++) {
      for (int w = 0; w < W; w++) acc[i][w] = load(out + i * ld + d + w * N);
    }
    const T *at = v + d;
    for (int64_t j = 0; j < keys; j++, at += v_step) {
      for (int w = 0; w < W; w++) {
        const V value = load(at + w * N);
        for (int i = 0; i < R; i++) acc[i][w] = fma(set1(p[i * SCORES + j]), value, acc[i][w]);
      }
    }
    for (int i = 0; i < R; i++) {
      for (int w = 0; w < W; w++) store(out + i * ld + d + w * N, acc[i][w]);
    }
  }
  for (; d < depth; d += N) {
    const int n = int(least(N, depth - d));
    V acc[R];
    for (int i = 0; i < R; i++) acc[i] = load(out + i * ld + d);
    const T *at = v + d;
    for (int64_t j = 0; j < keys; j++, at += v_step) {
      const V value = get(at, n);
      for (int i = 0; i < R; i++) acc[i] = fma(set1(p[i * SCORES + j]), value, acc[i]);
    }
    for (int i = 0; i < R; i++) store(out + i * ld + d, acc[i]);
  }
}

template <int R, class T>
static void few_rows(const AttentionForward &a, const ForwardScratch &w, const Sequence &seq, int64_t kv_head, int64_t r0) {
  const AttentionShape &s = a.shape;
  const int64_t group = s.heads / s.kv_heads;
  pack_rows([&](int64_t i) { return stacked_row<const T>(a.q, seq, kv_head, group, r0 + i); }, R, s.head_dim, w.ld, w.q);
  for (int i = 0; i < R; i++) {
    scale_row(w.q + i * w.ld, w.ld, score_scale(s));
    w.row_max[i] = MINUS_INFINITY, w.row_sum[i] = 0.f;
  }
  fill(w.out, 0, R * w.ld, 0.f);
  const int64_t first_key = visible(s, seq, r0 / group).begin, last_key = visible(s, seq, (r0 + R - 1) / group).end;
  for (int64_t k0 = first_key; k0 < last_key; k0 += FORWARD_KEYS) {
    const int64_t k1 = least(k0 + FORWARD_KEYS, last_key), width = round_up(k1 - k0, N);
    for (int64_t j = k0, run; j < k1; j += run) {
      run = run_of_keys(seq, j, k1);
      few_scores<R>(w.q, w.ld, key_row<T>(a.k, seq, kv_head, j), a.k.token, run, s.head_dim, w.scores + (j - k0));
    }
    for (int i = 0; i < R; i++) {
      const Span span = visible(s, seq, (r0 + i) / group);
      float *scores = w.scores + i * SCORES;
      fill(scores, k1 - k0, width, 0.f);
      const float rescale =
          softmax_row(scores, 0, width, most(span.begin - k0, 0), least(span.end, k1) - k0, s.softcap, w.row_max[i], w.row_sum[i]);
      if (rescale != 1.f) scale_row(w.out + i * w.ld, w.ld, rescale);
    }
    for (int64_t j = k0, run; j < k1; j += run) {
      run = run_of_keys(seq, j, k1);
      few_values<R>(w.scores + (j - k0), key_row<T>(a.v, seq, kv_head, j), a.v.token, run, s.head_dim, w.out, w.ld);
    }
  }
  for (int i = 0; i < R; i++) write_row<T>(a, seq, kv_head, r0 + i, w.out + i * w.ld, w.row_max[i], w.row_sum[i]);
}

template <class T>
static void block(const AttentionForward &a, const ForwardScratch &w, const Sequence &seq, int64_t kv_head, int64_t r0,
                  int64_t r1) {
  if (seq.queries * (a.shape.heads / a.shape.kv_heads) > FEW_ROWS) return packed_block<T>(a, w, seq, kv_head, r0, r1);
  for (; r1 - r0 >= 4; r0 += 4) few_rows<4, T>(a, w, seq, kv_head, r0);
  if (r1 - r0 == 3) few_rows<3, T>(a, w, seq, kv_head, r0);
  if (r1 - r0 == 2) few_rows<2, T>(a, w, seq, kv_head, r0);
  if (r1 - r0 == 1) few_rows<1, T>(a, w, seq, kv_head, r0);
}

void attention_forward(const AttentionForward &a) {
  const AttentionShape &s = a.shape;
  const int64_t group = s.heads / s.kv_heads, size = forward_scratch(s.head_dim);
  for (int64_t b = 0, tasks = 0; b <= s.sequences; b++) {
    a.first_task[b] = tasks;
    if (b < s.sequences) tasks += blocks_of(sequence_of(s, b).queries * group, FORWARD_ROWS) * s.kv_heads;
  }
  parallel_for(a.first_task[s.sequences], [&](int64_t task, int thread) {
    const int64_t b = find_sequence(a.first_task, s.sequences, task);
    const Sequence seq = sequence_of(s, b);
    const int64_t local = task - a.first_task[b], rows = seq.queries * group;
    const int64_t kv_head = local % s.kv_heads;
    const int64_t r0 = (blocks_of(rows, FORWARD_ROWS) - 1 - local / s.kv_heads) * FORWARD_ROWS;  // the longest rows first
    ForwardScratch w;
    const int64_t dim = padded_dim(s.head_dim);
    w.ld = round_up(s.head_dim, NR);
    w.k = a.scratch + thread * size;
    w.v = w.k + FORWARD_KEYS * dim;
    w.q = w.v + FORWARD_KEYS * dim;
    w.out = w.q + FORWARD_ROWS * dim;
    w.scores = w.out + FORWARD_ROWS * dim;
    w.row_max = w.scores + MAX_MR * SCORES;
    w.row_sum = w.row_max + FORWARD_ROWS;
    const int64_t r1 = least(r0 + FORWARD_ROWS, rows);
    s.dtype == BF16 ? block<bf16>(a, w, seq, kv_head, r0, r1) : block<float>(a, w, seq, kv_head, r0, r1);
  });
}

}  // namespace EP_ISA
}  // namespace ep

#endif
