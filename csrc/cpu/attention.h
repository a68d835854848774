// What the forward and the backward pass of attention share: the problem, who sees whom, and the work buffers' sizes.
//
// The query heads of one key head are stacked: row r of a sequence is query token r / group, head r % group of the group. All of
// them read the same packed keys and values, and what a row sees grows with r.
#pragma once

#include "isa.h"
#include "tensor.h"

namespace ep {

struct HeadRows {  // (tokens, heads, head_dim), strides in elements
  char *data;
  int64_t token, head;
};

struct AttentionShape {
  const int32_t *cu_q, *cu_k, *used_k;  // (S + 1), (S + 1), (S) or null
  int64_t sequences, tokens, heads, kv_heads, head_dim;
  int64_t window;  // 0 = unlimited
  float softcap, scale;
  bool causal, bf16;
};

struct AttentionForward {
  AttentionShape shape;
  HeadRows q, k, v, out;
  float *lse;           // (H, T)
  int64_t *first_task;  // (S + 1)
  float *scratch;
};

struct AttentionBackward {
  AttentionShape shape;
  HeadRows dout, q, k, v, out, dq, dk, dv;
  const float *lse;
  int64_t *first_task;
  int64_t *first_turn;  // (S + 1): where a sequence's entries of `turn` begin
  int32_t *turn;        // per (sequence, key head, block of rows): key blocks whose part of dq is in
  float *dq_sum;        // (T, H, D), for sequences of more than one key block
  float *scratch;
};

// A block of rows is a multiple of every tile height (14, 6, 4).
constexpr int64_t FORWARD_ROWS = 336, FORWARD_KEYS = 256;
constexpr int64_t BACKWARD_ROWS = 168, BACKWARD_KEYS = 256;
constexpr int64_t SCORES = 256 + 16;  // floats from row to row of a tile of scores; the odd line keeps rows out of one cache set
constexpr int64_t MAX_MR = 14;

static inline int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }
static inline int64_t padded_dim(int64_t head_dim) { return (head_dim + 31) / 32 * 32; }
// Floats per thread.
static inline int64_t forward_scratch(int64_t head_dim) {
  return (2 * FORWARD_KEYS + 2 * FORWARD_ROWS) * padded_dim(head_dim) + MAX_MR * SCORES + 2 * FORWARD_ROWS;
}
static inline int64_t backward_scratch(int64_t head_dim) {
  return (5 * (BACKWARD_KEYS + 32) + 4 * BACKWARD_ROWS + MAX_MR) * padded_dim(head_dim) + 2 * (BACKWARD_ROWS + 1) * SCORES +
         2 * BACKWARD_ROWS;
}

struct Sequence {
  int64_t q0, queries, k0, keys;
};

static inline Sequence sequence_of(const AttentionShape &s, int64_t b) {
  return {s.cu_q[b], s.cu_q[b + 1] - s.cu_q[b], s.cu_k[b], s.used_k != nullptr ? s.used_k[b] : s.cu_k[b + 1] - s.cu_k[b]};
}

struct Span {  // keys [begin, end); both ends grow with the query token, and end <= begin where nothing is seen
  int64_t begin, end;
};

static inline Span visible(const AttentionShape &s, const Sequence &seq, int64_t token) {
  const int64_t diagonal = token + seq.keys - seq.queries;
  const int64_t begin = s.window > 0 ? diagonal - s.window + 1 : 0;
  const int64_t end = s.causal ? diagonal + 1 : seq.keys;
  return {begin > 0 ? begin : 0, end < seq.keys ? end : seq.keys};
}

// The sequence that a task belongs to: the last b with first[b] <= task.
static inline int64_t find_sequence(const int64_t *first, int64_t sequences, int64_t task) {
  int64_t low = 0, high = sequences;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first[middle] <= task ? low : high) = middle;
  }
  return low;
}

}  // namespace ep

EP_KERNEL(attention_forward, AttentionForward)
EP_KERNEL(attention_backward, AttentionBackward)
