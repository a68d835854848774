// The gradients of hidden and of the head from those of logprob and entropy. With p = exp(z - lse) made again,
//
//   g_tv = z'_tv (dlogprob_t (delta_v,y(t) - p_tv) - dentropy_t p_tv (log p_tv + entropy_t))
//   dhidden_t = sum_v g_tv W[v]        dW[v] = sum_t g_tv hidden_t
//
// A task is one block of the vocabulary. It widens the block once and walks over the tokens, ROWS at a time: logits, g, this
// block's part of dhidden, its dW, which is a sum of its own. The parts of dhidden are added in the order of the blocks: `turn`
// counts those that are in. All tasks walk the same way, so they follow each other at a distance and hardly ever wait.
#include "linear_logprob_tile.h"
#include "parallel.h"

#ifndef EP_API

namespace ep {
namespace EP_ISA {

struct BackwardScratch {
  float *block, *sums, *g, *dweight;  // dweight: [k / NR][v][NR]
};

struct RowValues {  // pointers to NR lanes
  const float *minus_dlogprob, *dentropy, *lse, *entropy;
};

// Logits u [v][NR] become g, but for the target's own term.
static inline void gradient_panel(float *u, int64_t count, float cap, bool entropy, const RowValues &row) {
  for (int j = 0; j < NV; j++) {
    const V minus_dlogprob = load(row.minus_dlogprob + j * N), lse = load(row.lse + j * N);
    const V dentropy = load(row.dentropy + j * N), spread = load(row.entropy + j * N);
    float *at = u + j * N;
    for (int64_t v = 0; v < count; v++, at += NR) {
      V slope = set1(1.f), z = load(at);
      if (cap > 0) {
        const V t = tanh_exact(z * set1(1.f / cap));
        z = t * set1(cap);
        slope = fma(zero() - t, t, slope);
      }
      const V log_p = z - lse;
      V factor = minus_dlogprob;
      if (entropy) factor = factor - dentropy * (log_p + spread);
      const V g = exp(log_p) * factor;
      store(at, cap > 0 ? g * slope : g);
    }
  }
}

static inline float slope_of(float u, float cap) {
  if (!(cap > 0)) return 1.f;
  const float t = first(tanh_exact(set1(u * (1.f / cap))));
  return 1.f - t * t;
}

// dweight [k / NR][v][NR] = or += g^T hidden over the tokens of one group.
template <bool ADD>
static inline void outer_sum(int64_t width, int64_t count, int64_t panels, const float *g, const float *lines, float *dweight) {
  for (int64_t k = 0; k < blocks_of(width, NR); k++) {
    const float *b = lines + k * panels * NR * NR;
    for (int64_t v = 0; v < count; v += MR) {
      blocked_micro<NR, ADD>(panels, g + v * NR, BLOCK * NR, b, dweight + (k * BLOCK + v) * NR);
    }
  }
}

static void row_group(const LogprobBackward &a, const BackwardScratch &w, int64_t block, int64_t v0, int64_t count, int64_t group) {
  const LogprobShape &s = a.shape;
  const int64_t r0 = group * ROWS, rows = least(ROWS, s.kept - r0), panels = blocks_of(rows, NR);
  const int64_t deep = round_up(s.width, MR), padded = padded_rows(s.kept);
  logits_of(s.width, count, panels, w.block, a.hidden_panels + r0 * deep, w.g);
  for (int64_t p = 0; p < panels; p++) {
    float own[NR] = {};
    const int64_t r = r0 + p * NR;
    float *g = w.g + p * BLOCK * NR;
    const int lanes = int(least(NR, rows - p * NR));
    auto target = [&](int i) { return s.targets[s.rows[r + i]] - v0; };
    for (int i = 0; i < lanes; i++) {
      const int64_t y = target(i);
      if (y >= 0 && y < count) own[i] = -a.row_values[r + i] * slope_of(g[y * NR + i], s.softcap);
    }
    const float *values = a.row_values + r;
    gradient_panel(g, count, s.softcap, a.dentropy != nullptr, {values, values + padded, values + 2 * padded, values + 3 * padded});
    for (int64_t v = count; v < round_up(count, MR); v++) {
      for (int j = 0; j < NV; j++) store(g + v * NR + j * N, zero());
    }
    for (int i = 0; i < lanes; i++) {
      const int64_t y = target(i);
      if (y >= 0 && y < count) g[y * NR + i] += own[i];
    }
  }
  if (a.dhidden != nullptr) {
    weighted_sum<false>(s.width, count, panels, w.block, w.g, w.sums);
    wait_for_turn(a.turn + group, int32_t(block));
    float *total = a.dhidden_panels + r0 * deep;
    const int64_t size = panels * deep * NR;
    if (block == 0) {
      for (int64_t i = 0; i < size; i += N) store(total + i, load(w.sums + i));
    } else {
      for (int64_t i = 0; i < size; i += N) store(total + i, load(total + i) + load(w.sums + i));
    }
    pass_turn(a.turn + group, int32_t(block + 1));
  }
  if (a.dweight != nullptr) {
    const float *lines = a.hidden_lines + r0 * round_up(s.width, NR);
    group == 0 ? outer_sum<false>(s.width, count, panels, w.g, lines, w.dweight)
               : outer_sum<true>(s.width, count, panels, w.g, lines, w.dweight);
  }
}

template <class T>
static void write_dweight(const LogprobBackward &a, const float *dweight, int64_t v0, int64_t count) {
  T *out = reinterpret_cast<T *>(a.dweight) + v0 * a.dweight_row;
  for (int64_t v = 0; v < count; v++, out += a.dweight_row) {
    each(a.shape.width, [&](int64_t k, int n) { put(out + k, load(dweight + (k / NR * BLOCK + v) * NR + k % NR), n); });
  }
}

template <class T>
static void write_dhidden(const LogprobBackward &a, int64_t panel) {
  const LogprobShape &s = a.shape;
  const int64_t r0 = panel * NR;
  turn_panel(a.dhidden_panels + r0 * round_up(s.width, MR), int(least(NR, s.kept - r0)), s.width,
             [&](int i, int64_t k, V value, int n) {
               put(reinterpret_cast<T *>(a.dhidden) + s.rows[r0 + i] * a.dhidden_row + k, value, n);
             });
}

// Tokens of a panel as lines [k / NR][token][NR] inside their group.
template <class T>
static void pack_lines(const LogprobBackward &a, int64_t panel) {
  const LogprobShape &s = a.shape;
  const int64_t group = panel * NR / ROWS, first_row = group * ROWS;
  const int64_t tokens = round_up(least(ROWS, s.kept - first_row), NR), wide = round_up(s.width, NR);
  for (int64_t r = panel * NR; r < (panel + 1) * NR; r++) {
    const T *line = r < s.kept ? reinterpret_cast<const T *>(s.hidden) + s.rows[r] * s.hidden_row : nullptr;
    for (int64_t k = 0; k < wide; k += N) {
      const int n = int(k < s.width ? least(N, s.width - k) : 0);
      store(a.hidden_lines + first_row * wide + (k / NR * tokens + r - first_row) * NR + k % NR,
            line != nullptr && n > 0 ? get(line + k, n) : zero());
    }
  }
}

void linear_logprob_backward(const LogprobBackward &a) {
  const LogprobShape &s = a.shape;
  const int64_t groups = blocks_of(s.kept, ROWS), deep = round_up(s.width, MR), padded = padded_rows(s.kept);
  const int64_t panels = blocks_of(s.kept, NR), size = backward_scratch(s.kept, s.width);
  for (int64_t i = 0; i < groups; i++) a.turn[i] = 0;
  for (int64_t r = 0; r < padded; r++) {
    const bool real = r < s.kept, entropy = real && a.dentropy != nullptr;
    float *at = a.row_values + r;
    at[0] = real ? -a.dlogprob[s.rows[r]] : 0.f;
    at[padded] = entropy ? a.dentropy[s.rows[r]] : 0.f;
    at[2 * padded] = real ? a.lse[s.rows[r]] : 0.f;
    at[3 * padded] = entropy ? a.entropy[s.rows[r]] : 0.f;
  }
  parallel_for(panels, [&](int64_t p, int) {
    float *panel = a.hidden_panels + p * NR * deep;
    s.hidden_bf16 ? pack_hidden<bf16>(s, p * NR, panel) : pack_hidden<float>(s, p * NR, panel);
    if (a.dweight != nullptr) s.hidden_bf16 ? pack_lines<bf16>(a, p) : pack_lines<float>(a, p);
  });
  parallel_for(blocks_of(s.vocab, BLOCK), [&](int64_t block, int thread) {
    const int64_t v0 = block * BLOCK, count = least(BLOCK, s.vocab - v0), rows = group_rows(s.kept);
    BackwardScratch w;
    w.block = a.scratch + thread * size;
    w.sums = w.block + block_floats(s.width);
    w.g = w.sums + panel_floats(rows, s.width);
    w.dweight = w.g + rows * BLOCK;
    pack_weight(s, v0, count, w.block);
    for (int64_t group = 0; group < groups; group++) row_group(a, w, block, v0, count, group);
    if (a.dweight == nullptr) return;
    s.weight_bf16 ? write_dweight<bf16>(a, w.dweight, v0, count) : write_dweight<float>(a, w.dweight, v0, count);
  });
  if (a.dhidden == nullptr) return;
  parallel_for(panels, [&](int64_t p, int) { s.hidden_bf16 ? write_dhidden<bf16>(a, p) : write_dhidden<float>(a, p); });
}

}  // namespace EP_ISA
}  // namespace ep

#endif
