// Backward attention after Dao 2023 (FlashAttention-2, arXiv 2307.08691, algorithm 2). With P = exp(S - lse) made again:
//
//   delta_i = dout_i . out_i        dP = dout V^T        dS = P (dP - delta) (1 - tanh^2 where there is a softcap)
//   dV = P^T dout        dK = scale dS^T Q        dQ = scale dS K
//
// A task is one block of keys of one (sequence, key head): it packs its keys and values once and walks over the blocks of stacked
// rows that see them, so dK and dV are sums of its own. dQ of a block of rows is the sum over the blocks of keys, and must be added
// in one order: `turn` counts the parts that are in, and a task waits for its turn. Tasks are dealt out in order and rows are
// walked from the last to the first, so the tasks of one sequence follow each other at a distance of one block of rows and hardly
// ever wait.
#include <sched.h>

#include "attention_tile.h"
#include "parallel.h"

#ifndef EP_API

namespace ep {
namespace EP_ISA {

struct BackwardScratch {
  float *k_panels, *v_panels, *k, *dk, *dv;                // one block of keys
  float *q_panels, *dout_panels, *q, *dout, *lse, *delta;  // one block of rows
  float *p, *ds, *dq;
  int64_t ld;  // floats from row to row of dk, dv and dq; k, q and dout are panels (keys or rows of a block, NR)
};

struct KeyBlock {
  Sequence seq;
  int64_t kv_head, k0, k1, index;
};

// s: scores of one row, dp: dout . v, columns [c0, c1), of which [begin, end) are seen. Leaves P in s and dS / scale in dp, zero
// where nothing is seen, also for MR columns on either side: the products over rows read whole panels of MR keys.
static inline void gradient_row(float *s, float *dp, int64_t c0, int64_t c1, int64_t begin, int64_t end, float cap, float lse,
                                float delta) {
  const int64_t left = most(c0 - MR, 0), right = least(c1 + MR, SCORES);
  if (begin >= end) {
    fill(s, left, right, 0.f);
    fill(dp, left, right, 0.f);
    return;
  }
  const V shift = set1(lse), offset = set1(delta);
  if (cap > 0) {
    const V top = set1(cap * LOG2E);
    for (int64_t c = c0; c < c1; c += N) {
      const V t = tanh(load(s + c)), p = exp2(fma(t, top, zero() - shift));
      store(s + c, p);
      store(dp + c, p * (load(dp + c) - offset) * fma(zero() - t, t, set1(1.f)));
    }
  } else {
    for (int64_t c = c0; c < c1; c += N) {
      const V p = exp2(load(s + c) - shift);
      store(s + c, p);
      store(dp + c, p * (load(dp + c) - offset));
    }
  }
  fill(s, left, begin, 0.f);
  fill(dp, left, begin, 0.f);
  fill(s, end, right, 0.f);
  fill(dp, end, right, 0.f);
}

// The keys of a sequence that rows [r0, r1) see, as blocks [begin, end).
static inline Span key_blocks(const AttentionShape &s, const Sequence &seq, int64_t r0, int64_t r1) {
  const int64_t group = s.heads / s.kv_heads;
  const int64_t begin = visible(s, seq, r0 / group).begin, end = visible(s, seq, (r1 - 1) / group).end;
  if (begin >= end) return {0, 0};
  return {begin / BACKWARD_KEYS, (end - 1) / BACKWARD_KEYS + 1};
}

template <class T>
static void pack_rows_of_block(const AttentionBackward &a, const BackwardScratch &w, const KeyBlock &block, int64_t r0,
                               int64_t r1) {
  const AttentionShape &s = a.shape;
  const int64_t group = s.heads / s.kv_heads;
  const float score_scale = s.softcap > 0 ? s.scale / s.softcap : s.scale * LOG2E;
  pack_stack_panels<T>(a.q, block.seq, s, block.kv_head, r0, r1, score_scale, w.q_panels);
  pack_stack_panels<T>(a.dout, block.seq, s, block.kv_head, r0, r1, 1.f, w.dout_panels);
  const auto pack = [&](const HeadRows &x, float *out) {
    pack_row_panels([&](int64_t i) { return stacked_row<const T>(x, block.seq, block.kv_head, group, r0 + i); }, r1 - r0,
                    s.head_dim, BACKWARD_ROWS, out);
  };
  pack(a.q, w.q), pack(a.dout, w.dout);
  for (int64_t r = r0; r < r1; r++) {
    const T *out = stacked_row<const T>(a.out, block.seq, block.kv_head, group, r);
    V dot = zero();
    each(s.head_dim, [&](int64_t d, int n) {
      dot = fma(get(out + d, n), load(w.dout + d / NR * NR * BACKWARD_ROWS + (r - r0) * NR + d % NR), dot);
    });
    w.delta[r - r0] = sum(dot);
    w.lse[r - r0] = a.lse[(block.kv_head * group + r % group) * s.tokens + block.seq.q0 + r / group] * LOG2E;
  }
}

// tile (MR, ld) is this block's part of dq of rows [r0, r1): written when it is the only part, added up in dq_sum otherwise.
template <class T>
static void put_dq(const AttentionBackward &a, const KeyBlock &block, int64_t r0, int64_t r1, bool first, bool last,
                   const float *tile, int64_t ld) {
  const AttentionShape &s = a.shape;
  const int64_t group = s.heads / s.kv_heads;
  const V scale = set1(s.scale);
  for (int64_t r = r0; r < r1; r++, tile += ld) {
    const int64_t token = block.seq.q0 + r / group, head = block.kv_head * group + r % group;
    float *total = a.dq_sum + (token * s.heads + head) * s.head_dim;
    T *dq = stacked_row<T>(a.dq, block.seq, block.kv_head, group, r);
    each(s.head_dim, [&](int64_t d, int n) {
      V value = load(tile + d);
      if (!first) value = get(total + d, n) + value;
      if (last) {
        put(dq + d, value * scale, n);
      } else {
        put(total + d, value, n);
      }
    });
  }
}

static inline void wait_for_turn(const int32_t *turn, int32_t mine) {
  for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != mine; spins++) {
    if (spins > 100) sched_yield();
  }
}

// One block of keys against rows [r0, r1): adds to dk and dv, gives this block's part of dq.
template <class T>
static void row_block(const AttentionBackward &a, const BackwardScratch &w, const KeyBlock &block, int64_t r0, int64_t r1,
                      Span parts, int32_t *turn) {
  const AttentionShape &s = a.shape;
  const Sequence &seq = block.seq;
  const int64_t group = s.heads / s.kv_heads, depth = s.head_dim, rows = r1 - r0, keys = block.k1 - block.k0;
  pack_rows_of_block<T>(a, w, block, r0, r1);
  auto panel_keys = [&](int64_t i0) {
    const int64_t i1 = least(i0 + MR, rows);
    return Span{most(visible(s, seq, (r0 + i0) / group).begin - block.k0, 0),
                least(visible(s, seq, (r0 + i1 - 1) / group).end, block.k1) - block.k0};
  };
  for (int64_t i0 = 0; i0 < rows; i0 += MR) {
    const Span span = panel_keys(i0);
    if (span.begin >= span.end) continue;
    const int64_t c0 = round_down(span.begin, NR), c1 = round_up(span.end, NR);
    float *p = w.p + i0 * SCORES, *ds = w.ds + i0 * SCORES;
    panel_product(depth, w.q_panels + i0 * depth, w.k_panels, c0, c1, p);
    panel_product(depth, w.dout_panels + i0 * depth, w.v_panels, c0, c1, ds);
    for (int64_t i = i0; i < i0 + MR && i < rows; i++) {
      const Span seen = visible(s, seq, (r0 + i) / group);
      gradient_row(w.p + i * SCORES, w.ds + i * SCORES, c0, c1, most(seen.begin - block.k0, c0),
                   least(seen.end, block.k1) - block.k0, s.softcap, w.lse[i], w.delta[i]);
    }
  }

  const bool first = block.index == parts.begin, last = block.index == parts.end - 1;
  if (!first) wait_for_turn(turn, int32_t(block.index - parts.begin));
  for (int64_t i0 = 0; i0 < rows; i0 += MR) {
    const Span span = panel_keys(i0);
    if (span.begin >= span.end) {
      fill(w.dq, 0, MR * w.ld, 0.f);
    } else {
      for (int64_t d = 0; d < w.ld; d += NR) {
        micro<SCORES, 1, false>(span.end - span.begin, w.ds + i0 * SCORES + span.begin, w.k + d * BACKWARD_KEYS + span.begin * NR,
                                NR, w.dq + d, w.ld);
      }
    }
    put_dq<T>(a, block, r0 + i0, least(r0 + i0 + MR, r1), first, last, w.dq, w.ld);
  }
  if (!last) __atomic_store_n(turn, int32_t(block.index - parts.begin + 1), __ATOMIC_RELEASE);

  int64_t begin = 0, end = 0;  // rows that see a panel of keys: both ends grow with the keys
  for (int64_t j0 = 0; j0 < keys; j0 += MR) {
    const int64_t key = block.k0 + j0, key_end = least(key + MR, block.k1);
    while (begin < rows && visible(s, seq, (r0 + begin) / group).end <= key) begin++;
    while (end < rows && visible(s, seq, (r0 + end) / group).begin < key_end) end++;
    if (begin >= end) continue;
    for (int64_t d = 0; d < w.ld; d += NR) {
      const int64_t rows_at = d * BACKWARD_ROWS + begin * NR;
      micro<1, SCORES, true>(end - begin, w.p + begin * SCORES + j0, w.dout + rows_at, NR, w.dv + j0 * w.ld + d, w.ld);
      micro<1, SCORES, true>(end - begin, w.ds + begin * SCORES + j0, w.q + rows_at, NR, w.dk + j0 * w.ld + d, w.ld);
    }
  }
}

// dq of rows that no block of keys reaches, dk and dv of keys in the slot but not in use.
template <class T>
static void clear_unseen(const AttentionBackward &a, const Sequence &seq, int64_t kv_head, int64_t slot) {
  const AttentionShape &s = a.shape;
  const int64_t group = s.heads / s.kv_heads, rows = seq.queries * group;
  auto clear = [&](T *p) { each(s.head_dim, [&](int64_t d, int n) { put(p + d, zero(), n); }); };
  for (int64_t r0 = 0; r0 < rows; r0 += BACKWARD_ROWS) {
    const int64_t r1 = least(r0 + BACKWARD_ROWS, rows);
    const Span parts = key_blocks(s, seq, r0, r1);
    if (parts.begin < parts.end) continue;
    for (int64_t r = r0; r < r1; r++) clear(stacked_row<T>(a.dq, seq, kv_head, group, r));
  }
  for (int64_t j = seq.keys; j < slot; j++) {
    clear(const_cast<T *>(key_row<T>(a.dk, seq, kv_head, j)));
    clear(const_cast<T *>(key_row<T>(a.dv, seq, kv_head, j)));
  }
}

template <class T>
static void key_block(const AttentionBackward &a, const BackwardScratch &w, const KeyBlock &block, int32_t *turn) {
  const AttentionShape &s = a.shape;
  const Sequence &seq = block.seq;
  const int64_t rows = seq.queries * (s.heads / s.kv_heads), keys = block.k1 - block.k0, depth = s.head_dim;
  pack_key_panels<T>(a.k, seq, depth, block.kv_head, block.k0, block.k1, w.k_panels);
  pack_key_panels<T>(a.v, seq, depth, block.kv_head, block.k0, block.k1, w.v_panels);
  pack_key_rows<T>(a.k, seq, depth, block.kv_head, block.k0, block.k1, BACKWARD_KEYS, w.k);
  fill(w.dk, 0, round_up(keys, MR) * w.ld, 0.f);
  fill(w.dv, 0, round_up(keys, MR) * w.ld, 0.f);
  for (int64_t i = blocks_of(rows, BACKWARD_ROWS) - 1; i >= 0; i--) {
    const int64_t r0 = i * BACKWARD_ROWS, r1 = least(r0 + BACKWARD_ROWS, rows);
    const Span parts = key_blocks(s, seq, r0, r1);
    if (parts.begin <= block.index && block.index < parts.end) row_block<T>(a, w, block, r0, r1, parts, turn + i);
  }
  const V scale = set1(s.scale);
  for (int64_t j = 0; j < keys; j++) {
    T *dk = const_cast<T *>(key_row<T>(a.dk, seq, block.kv_head, block.k0 + j));
    T *dv = const_cast<T *>(key_row<T>(a.dv, seq, block.kv_head, block.k0 + j));
    each(depth, [&](int64_t d, int n) {
      put(dk + d, load(w.dk + j * w.ld + d) * scale, n);
      put(dv + d, load(w.dv + j * w.ld + d), n);
    });
  }
}

static BackwardScratch carve(float *at, int64_t head_dim) {
  const int64_t dim = padded_dim(head_dim), keys = (BACKWARD_KEYS + 32) * dim, rows = BACKWARD_ROWS * dim;
  BackwardScratch w;
  float **parts[] = {&w.k_panels, &w.v_panels, &w.k, &w.dk, &w.dv, &w.q_panels, &w.dout_panels, &w.q, &w.dout};
  for (int i = 0; i < 9; i++) {
    *parts[i] = at;
    at += i < 5 ? keys : rows;
  }
  w.dq = at, at += MAX_MR * dim;
  w.p = at, at += (BACKWARD_ROWS + 1) * SCORES;
  w.ds = at, at += (BACKWARD_ROWS + 1) * SCORES;
  w.lse = at, at += BACKWARD_ROWS;
  w.delta = at;
  w.ld = round_up(head_dim, NR);
  return w;
}

void attention_backward(const AttentionBackward &a) {
  const AttentionShape &s = a.shape;
  const int64_t group = s.heads / s.kv_heads, size = backward_scratch(s.head_dim);
  int64_t tasks = 0, turns = 0;
  for (int64_t b = 0; b <= s.sequences; b++) {
    a.first_task[b] = tasks;
    a.first_turn[b] = turns;
    if (b == s.sequences) break;
    const Sequence seq = sequence_of(s, b);
    tasks += most(blocks_of(seq.keys, BACKWARD_KEYS), 1) * s.kv_heads;  // at least one, to clear what nothing reaches
    turns += blocks_of(seq.queries * group, BACKWARD_ROWS) * s.kv_heads;
  }
  for (int64_t i = 0; i < turns; i++) a.turn[i] = 0;
  parallel_for(tasks, [&](int64_t task, int thread) {
    const int64_t b = find_sequence(a.first_task, s.sequences, task), local = task - a.first_task[b];
    const Sequence seq = sequence_of(s, b);
    const int64_t index = local / s.kv_heads, kv_head = local % s.kv_heads, slot = s.cu_k[b + 1] - s.cu_k[b];
    const KeyBlock block{seq, kv_head, index * BACKWARD_KEYS, least((index + 1) * BACKWARD_KEYS, seq.keys), index};
    const BackwardScratch w = carve(a.scratch + thread * size, s.head_dim);
    int32_t *turn = a.turn + a.first_turn[b] + kv_head * blocks_of(seq.queries * group, BACKWARD_ROWS);
    if (index == 0) s.dtype == BF16 ? clear_unseen<bf16>(a, seq, kv_head, slot) : clear_unseen<float>(a, seq, kv_head, slot);
    s.dtype == BF16 ? key_block<bf16>(a, w, block, turn) : key_block<float>(a, w, block, turn);
  });
}

}  // namespace EP_ISA
}  // namespace ep

#endif
