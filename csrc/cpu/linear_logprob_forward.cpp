// Log-probabilities and, on request, their gradient in one pass over the vocabulary: flash attention with tokens as queries and the
// head's rows as keys and values (Dao 2023, arXiv 2307.08691, algorithm 1; Milakov and Gimelshein 2018, arXiv 1805.02867, for the
// running softmax).
//
// A task is ROWS tokens and one SPLIT of the vocabulary. It widens a block of the weight, makes its logits, brings the running
// maximum m, sum s = sum exp(z - m) and spread = sum exp(z - m) (z - m) up to date, and adds exp(z - m) z' W to its sums; the block
// is read from memory once for both products. Splits are merged in their order: `turn` says whose turn it is. Tasks of one split
// follow each other, so that its part of the weight is still in the last-level cache, and hardly ever wait.
//
// NOTES: the products are our own because, measured on one Zen 3 core (AVX2, 512 x 896 x 16384), the whole pass runs at 90 GFLOP/s,
// where a float32 product alone by torch (MKL) runs at 91 and its bfloat16 product (no native bf16) at 10 and below.
#include <cmath>

#include "linear_logprob_tile.h"
#include "parallel.h"

#ifndef EP_API

namespace ep {
namespace EP_ISA {

constexpr float LOWEST = -3e38f;  // a finite start, so that differences of maxima are numbers

// Logits u of `count` entries [v][NR]: leaves exp(z - max) z' there and brings the running values of the lanes up to date; returns
// whether a maximum grew, with the factor for earlier sums.
template <bool CAP, bool ENTROPY>
static inline bool softmax_panel(float *u, int64_t count, float cap, float *row_max, float *row_sum, float *row_spread,
                                 V (&rescale)[NV]) {
  bool grew = false;
  const V top = set1(cap), inverse = set1(1.f / cap);
  for (int j = 0; j < NV; j++) {
    float *column = u + j * N;
    V even = set1(LOWEST), odd = even;  // two chains, as max takes several cycles
    auto look = [&](int64_t v, V &high) {
      V x = load(column + v * NR);
      if (CAP) store(column + v * NR, x = tanh_exact(x * inverse));  // t, with z = t c
      high = max(high, x);
    };
    int64_t v = 0;
    for (; v + 2 <= count; v += 2) look(v, even), look(v + 1, odd);
    if (v < count) look(v, even);
    V highest = max(even, odd);
    if (CAP) highest = highest * top;
    const V before = load(row_max + j * N), now = max(before, highest), sum = load(row_sum + j * N);
    V total = zero(), other_total = zero(), spread = zero(), other_spread = zero();
    auto take = [&](int64_t v, V &to, V &spread_to) {
      const V x = load(column + v * NR), d = (CAP ? x * top : x) - now, e = exp(d);
      to = to + e;
      if (ENTROPY) spread_to = fma(e, d, spread_to);
      store(column + v * NR, CAP ? e * fma(zero() - x, x, set1(1.f)) : e);
    };
    for (v = 0; v + 2 <= count; v += 2) take(v, total, spread), take(v + 1, other_total, other_spread);
    if (v < count) take(v, total, spread);
    rescale[j] = exp(before - now);
    store(row_spread + j * N, fma(rescale[j], fma(sum, before - now, load(row_spread + j * N)), spread + other_spread));
    store(row_sum + j * N, fma(sum, rescale[j], total + other_total));
    store(row_max + j * N, now);
    float lanes[N];
    store(lanes, rescale[j]);
    for (int i = 0; i < N; i++) grew |= lanes[i] != 1.f;
  }
  return grew;
}

static inline bool softmax_panel(bool entropy, float *u, int64_t count, float cap, float *row_max, float *row_sum,
                                 float *row_spread, V (&rescale)[NV]) {
  if (cap > 0) {
    return entropy ? softmax_panel<true, true>(u, count, cap, row_max, row_sum, row_spread, rescale)
                   : softmax_panel<true, false>(u, count, cap, row_max, row_sum, row_spread, rescale);
  }
  return entropy ? softmax_panel<false, true>(u, count, cap, row_max, row_sum, row_spread, rescale)
                 : softmax_panel<false, false>(u, count, cap, row_max, row_sum, row_spread, rescale);
}

static inline void scale_panel(float *panel, int64_t width, const V (&factor)[NV]) {
  for (int64_t k = 0; k < width; k++, panel += NR) {
    for (int j = 0; j < NV; j++) store(panel + j * N, load(panel + j * N) * factor[j]);
  }
}

static inline float exp1(float x) { return first(exp(set1(x))); }

struct ForwardScratch {
  float *block, *sums, *logits, *row_max, *row_sum, *row_spread;
};

// One row's part of a split joins what the earlier splits gave. Returns the two factors of the sums.
static inline void merge_row(const LogprobForward &a, int64_t r, float max_, float sum_, float spread_, float &old_factor,
                             float &new_factor) {
  const float before = a.row_max[r], now = before > max_ ? before : max_;
  old_factor = exp1(before - now), new_factor = exp1(max_ - now);
  a.row_spread[r] = old_factor * (a.row_spread[r] + a.row_sum[r] * (before - now)) + new_factor * (spread_ + sum_ * (max_ - now));
  a.row_sum[r] = old_factor * a.row_sum[r] + new_factor * sum_;
  a.row_max[r] = now;
}

template <class W>
static void finish_row(const LogprobForward &a, int64_t r) {
  const LogprobShape &s = a.shape;
  const int64_t row = s.rows[r];
  float z = a.target_logit[r], slope = 1.f;
  if (s.softcap > 0) {
    const float t = first(tanh_exact(set1(z * (1.f / s.softcap))));
    z = t * s.softcap, slope = 1.f - t * t;
  }
  const float sum = a.row_sum[r], log_sum = std::log(sum);
  a.lse[row] = a.row_max[r] + log_sum;
  a.logprob[row] = (z - a.row_max[r]) - log_sum;
  if (a.entropy != nullptr) a.entropy[row] = log_sum - a.row_spread[r] / sum;
  if (a.direction == nullptr) return;
  float *direction = a.direction + row * a.direction_row;
  const W *w = a.target_rows != nullptr ? reinterpret_cast<const W *>(a.target_rows) + row * a.target_row
                                        : reinterpret_cast<const W *>(s.weight) + s.targets[row] * s.weight_row;
  const V slope_v = set1(slope), factor = set1(-1.f / sum);
  each(s.width, [&](int64_t k, int n) { put(direction + k, fma(get(direction + k, n), factor, slope_v * get(w + k, n)), n); });
}

static void forward_task(const LogprobForward &a, const ForwardScratch &w, int64_t group, int64_t split) {
  const LogprobShape &s = a.shape;
  const int64_t r0 = group * ROWS, rows = least(ROWS, s.kept - r0), panels = blocks_of(rows, NR);
  const int64_t deep = round_up(s.width, MR), v_end = least((split + 1) * SPLIT, s.vocab);
  const float *hidden = a.hidden_panels + r0 * deep;
  for (int64_t i = 0; i < panels * NR; i++) w.row_max[i] = LOWEST, w.row_sum[i] = w.row_spread[i] = 0.f;
  for (int64_t v0 = split * SPLIT; v0 < v_end; v0 += BLOCK) {
    const int64_t count = least(BLOCK, v_end - v0);
    const bool fresh = v0 == split * SPLIT;
    pack_weight(s, v0, count, w.block);
    logits_of(s.width, count, panels, w.block, hidden, w.logits);
    for (int64_t i = 0; i < rows; i++) {
      const int64_t y = s.targets[s.rows[r0 + i]] - v0;
      if (y >= 0 && y < count) a.target_logit[r0 + i] = w.logits[(i / NR * BLOCK + y) * NR + i % NR];
    }
    for (int64_t p = 0; p < panels; p++) {
      V rescale[NV];
      const int64_t i = p * NR;
      const bool grew = softmax_panel(a.entropy != nullptr, w.logits + p * BLOCK * NR, count, s.softcap, w.row_max + i,
                                      w.row_sum + i, w.row_spread + i, rescale);
      if (a.direction != nullptr && grew && !fresh) scale_panel(w.sums + p * deep * NR, deep, rescale);
    }
    if (a.direction == nullptr) continue;
    fresh ? weighted_sum<false>(s.width, count, panels, w.block, w.logits, w.sums)
          : weighted_sum<true>(s.width, count, panels, w.block, w.logits, w.sums);
  }

  wait_for_turn(a.turn + group, int32_t(split));
  for (int64_t p = 0; p < panels; p++) {
    const int64_t i0 = p * NR;
    const int count = int(least(NR, rows - i0));
    float old_factor[NR], new_factor[NR];
    for (int i = 0; i < count; i++) {
      merge_row(a, r0 + i0 + i, w.row_max[i0 + i], w.row_sum[i0 + i], w.row_spread[i0 + i], old_factor[i], new_factor[i]);
    }
    if (a.direction == nullptr) continue;
    turn_panel(w.sums + p * deep * NR, count, s.width, [&](int i, int64_t k, V value, int n) {
      float *at = a.direction + s.rows[r0 + i0 + i] * a.direction_row + k;
      value = value * set1(new_factor[i]);
      put(at, split == 0 ? value : fma(get(at, n), set1(old_factor[i]), value), n);
    });
  }
  if (v_end == s.vocab) {
    for (int64_t r = r0; r < r0 + rows; r++) s.weight_bf16 ? finish_row<bf16>(a, r) : finish_row<float>(a, r);
  }
  pass_turn(a.turn + group, int32_t(split + 1));
}

void linear_logprob_forward(const LogprobForward &a) {
  const LogprobShape &s = a.shape;
  const int64_t groups = blocks_of(s.kept, ROWS), deep = round_up(s.width, MR), size = forward_scratch(s.kept, s.width);
  const int64_t first_split = s.first / SPLIT, splits = blocks_of(s.end, SPLIT) - first_split;
  for (int64_t i = 0; i < groups; i++) a.turn[i] = int32_t(first_split);
  for (int64_t r = 0; r < s.kept && s.first == 0; r++) a.row_max[r] = LOWEST, a.row_sum[r] = a.row_spread[r] = 0.f;
  parallel_for(blocks_of(s.kept, NR), [&](int64_t p, int) {
    float *panel = a.hidden_panels + p * NR * deep;
    s.hidden_bf16 ? pack_hidden<bf16>(s, p * NR, panel) : pack_hidden<float>(s, p * NR, panel);
  });
  parallel_for(groups * splits, [&](int64_t task, int thread) {
    const int64_t rows = group_rows(s.kept);
    ForwardScratch w;
    w.block = a.scratch + thread * size;
    w.sums = w.block + block_floats(s.width);
    w.logits = w.sums + panel_floats(rows, s.width);
    w.row_max = w.logits + rows * BLOCK;
    w.row_sum = w.row_max + rows;
    w.row_spread = w.row_sum + rows;
    forward_task(a, w, task % groups, first_split + task / groups);
  });
}

}  // namespace EP_ISA
}  // namespace ep

#endif
