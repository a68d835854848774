// The inner pieces of both passes of linear_logprob: packing and the products between panels (layouts: linear_logprob.h).
#pragma once

#include <sched.h>

#include "gemm.h"
#include "linear_logprob.h"

namespace ep {
namespace EP_ISA {

static_assert(BLOCK % MR == 0 && ROWS % NR == 0 && LANES % NR == 0, "blocks hold whole tiles");
static_assert(MR <= N, "pack_weight stores one vector per line");

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Floats from one panel [v][MR] of a weight block to the next: room for the overhang of a whole vector, and an odd number of cache
// lines, so that the same v of all panels does not fall into one cache set.
static inline int64_t weight_step() {
  const int64_t lines = (BLOCK * MR + N + 15) / 16;
  return (lines | 1) * 16;
}

// Entries [v0, v0 + count) of the weight as panels [k / MR][v][MR]; k and v are filled up with zeros to whole tiles.
template <class T>
static void pack_weight(const T *weight, int64_t row, int64_t count, int64_t width, float *block) {
  const int64_t step = weight_step(), whole = round_up(count, MR);
  constexpr int64_t LINES = 4 * MR;  // short columns of a few lines, so that neither side strides through all of the cache
  for (int64_t v0 = 0; v0 < whole; v0 += LINES) {
    float *out = block + v0 * MR;
    const int64_t v1 = least(v0 + LINES, whole);
    for (int64_t k = 0; k < width; k += MR, out += step) {
      const int n = int(least(N, width - k));
      float *at = out;
      for (int64_t v = v0; v < v1; v++, at += MR) store(at, v < count ? get(weight + v * row + k, n) : zero());
    }
  }
}

static inline void pack_weight(const LogprobShape &s, int64_t v0, int64_t count, float *block) {
  v0 -= s.first;
  if (s.weight_bf16) {
    pack_weight(reinterpret_cast<const bf16 *>(s.weight) + v0 * s.weight_row, s.weight_row, count, s.width, block);
  } else {
    pack_weight(reinterpret_cast<const float *>(s.weight) + v0 * s.weight_row, s.weight_row, count, s.width, block);
  }
}

// Kept rows [r0, r0 + NR) as one panel [k][NR], k filled up with zeros to whole tiles.
template <class T>
static inline void pack_hidden(const LogprobShape &s, int64_t r0, float *panel) {
  const int count = int(least(NR, s.kept - r0));
  auto line = [&](int i) { return reinterpret_cast<const T *>(s.hidden) + s.rows[r0 + i] * s.hidden_row; };
  pack_columns<NR>(line, count, s.width, 1.f, panel);
  for (int64_t i = s.width * NR; i < round_up(s.width, MR) * NR; i += N) store(panel + i, zero());
}

// c (MR, NR) = or += sum over blocks of STEP steps: element (i, p) of a is a[p / STEP * jump + i * STEP + p % STEP], b is [p][NR].
template <int STEP, bool ADD>
static inline void blocked_micro(int64_t blocks, const float *__restrict a, int64_t jump, const float *__restrict b,
                                 float *__restrict c) {
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) acc[i][j] = ADD ? load(c + i * NR + j * N) : zero();
  }
  for (int64_t block = 0; block < blocks; block++, a += jump) {
    // NOTES: unrolled, the steps are interleaved by the compiler until an accumulator no longer fits into the registers.
#pragma GCC unroll 1
    for (int p = 0; p < STEP; p++, b += NR) {
      V bv[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) bv[j] = load(b + j * N);
#pragma GCC unroll 16
      for (int i = 0; i < MR; i++) {
        const V av = set1(a[i * STEP + p]);
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) acc[i][j] = fma(av, bv[j], acc[i][j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) store(c + i * NR + j * N, acc[i][j]);
  }
}

// logits [panel][v][NR] = weight block times hidden panels. k is cut so that a piece of a panel of hidden stays in the first-level
// cache and the weight beside it in the second.
static inline void logits_of(int64_t width, int64_t count, int64_t panels, const float *block, const float *hidden, float *logits) {
  constexpr int64_t DEPTH = 252 / MR;  // panels of the weight
  const int64_t all = blocks_of(width, MR), step = weight_step(), hidden_step = all * MR * NR;
  for (int64_t k = 0; k < all; k += DEPTH) {
    const int64_t depth = least(DEPTH, all - k);
    for (int64_t p = 0; p < panels; p++) {
      const float *b = hidden + p * hidden_step + k * MR * NR;
      float *c = logits + p * BLOCK * NR;
      for (int64_t v = 0; v < count; v += MR) {
        const float *a = block + k * step + v * MR;
        k == 0 ? blocked_micro<MR, false>(depth, a, step, b, c + v * NR) : blocked_micro<MR, true>(depth, a, step, b, c + v * NR);
      }
    }
  }
}

// sums [panel][k][NR] = or += the weight block's entries weighted by g [panel][v][NR].
template <bool ADD>
static inline void weighted_sum(int64_t width, int64_t count, int64_t panels, const float *block, const float *g, float *sums) {
  constexpr int64_t CHUNK = 16;  // panels of the weight that stay in the second-level cache
  const int64_t all = blocks_of(width, MR), step = weight_step();
  for (int64_t k0 = 0; k0 < all; k0 += CHUNK) {
    for (int64_t p = 0; p < panels; p++) {
      for (int64_t k = k0; k < least(k0 + CHUNK, all); k++) {
        micro<1, MR, ADD>(count, block + k * step, g + p * BLOCK * NR, NR, sums + (p * all + k) * MR * NR, NR);
      }
    }
  }
}

// tanh to about 1.5 units in the last place: the series within 0.55 of 0, where 1 - 2 / (e^2x + 1) would cancel, and that beyond.
// Exactly 1 where it saturates, so that 1 - tanh^2 is 0 there.
static inline V tanh_exact(V x) {
  const V edge = set1(0.55f), c = min(edge, max(zero() - edge, x)), q = c * c;
  V p = fma(q, set1(-1.4558343870e-3f), set1(3.5921280366e-3f));
  p = fma(p, q, set1(-8.8632355299e-3f));
  p = fma(p, q, set1(2.1869488536e-2f));
  p = fma(p, q, set1(-5.3968253968e-2f));
  p = fma(p, q, set1(1.3333333333e-1f));
  p = fma(p, q, set1(-3.3333333333e-1f));
  const V near = fma(p * q, c, c);
  const V beyond = min(set1(1.f), max(zero(), (max(x, zero() - x) - edge) * set1(1e30f)));  // 0 or 1, as there is no select
  return fma(beyond, tanh(x) - near, near);
}

static inline float first(V x) {
  float lanes[N];
  store(lanes, x);
  return lanes[0];
}

// out rows (count) += or = the lanes of a panel [k][NR], times a factor per row; row(i) is a pointer to (width).
template <class Row>
static inline void turn_panel(const float *panel, int count, int64_t width, Row &&row) {
  for (int i0 = 0; i0 < count; i0 += N) {
    for (int64_t k = 0; k < width; k += N) {
      const int n = int(least(N, width - k));
      V r[N];
      for (int s = 0; s < N; s++) r[s] = s < n ? load(panel + (k + s) * NR + i0) : zero();
      transpose(r);
      for (int i = 0; i < N && i0 + i < count; i++) row(i0 + i, k, r[i], n);
    }
  }
}

static inline void wait_for_turn(const int32_t *turn, int32_t mine) {
  for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != mine; spins++) {
    if (spins > 100) sched_yield();
  }
}
static inline void pass_turn(int32_t *turn, int32_t next) { __atomic_store_n(turn, next, __ATOMIC_RELEASE); }

}  // namespace EP_ISA
}  // namespace ep
