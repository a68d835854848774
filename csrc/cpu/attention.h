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
  int64_t page = 0;  // from page to page of a paged cache (pages, page_size, heads, head_dim)
};

struct AttentionShape {
  const int32_t *cu_q, *cu_k, *used_k;  // (S + 1) or null = one query each, (S + 1) or null with pages, (S) or null
  int64_t sequences, tokens, heads, kv_heads, head_dim;
  int64_t window;  // 0 = unlimited
  float softcap, scale;
  bool causal;
  unsigned dtype;                        // F32 or BF16; F16 too on a GPU
  int64_t keys;                          // rows of k; with pages, the most that a row of block_table can hold
  int64_t page_size = 0;                 // keys of a page; 0 = no pages, keys are one stream
  const int32_t *block_table = nullptr;  // (S, max_blocks), rows table_row apart: which pages hold the keys of a sequence
  int64_t table_row = 0, max_blocks = 0;
};

struct AttentionForward {
  AttentionShape shape;
  HeadRows q, k, v, out;
  float *lse;           // (H, T)
  int64_t *first_task;  // (S + 1)
  float *scratch;
  void *workspace;  // what a GPU takes instead of the two before
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
  void *workspace;  // what a GPU takes instead of the five before
  bool ordered;     // dq is summed in one order; a CPU always does
};

// A block of rows is a multiple of every tile height (14, 6, 4).
constexpr int64_t FORWARD_ROWS = 336, FORWARD_KEYS = 256;
constexpr int64_t BACKWARD_ROWS = 84, BACKWARD_KEYS = 256;
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
  int64_t q0, queries, k0, keys;  // k0 only without pages
  int64_t page_size;
  const int32_t *pages;
};

static inline Sequence sequence_of(const AttentionShape &s, int64_t b) {
  Sequence seq;
  seq.q0 = s.cu_q != nullptr ? s.cu_q[b] : b;
  seq.queries = s.cu_q != nullptr ? s.cu_q[b + 1] - s.cu_q[b] : 1;
  seq.k0 = s.page_size > 0 ? 0 : s.cu_k[b];
  seq.keys = s.used_k != nullptr ? s.used_k[b] : s.cu_k[b + 1] - s.cu_k[b];
  seq.pages = s.page_size > 0 ? s.block_table + b * s.table_row : nullptr;
  seq.page_size = s.page_size;
  return seq;
}

// Keys [j, k1) that lie at one stride from key j on: to the end of its page.
static inline int64_t run_of_keys(const Sequence &seq, int64_t j, int64_t k1) {
  if (seq.page_size == 0) return k1 - j;
  const int64_t in_page = seq.page_size - j % seq.page_size;
  return in_page < k1 - j ? in_page : k1 - j;
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
