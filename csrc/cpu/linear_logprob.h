// What the forward and the backward pass of linear_logprob share: the problem and the sizes of its blocks and buffers.
//
// Logits are held turned, a row of a block per vocabulary entry and a lane per token: maximum, sum and exp then run down the lanes
// without a horizontal step, and everything is a panel of NR tokens (MR, NR: the tile of gemm.h).
//
//   hidden panels   [token / NR][k][NR]          packed once
//   weight block    [k / MR][v][MR]              BLOCK entries of the vocabulary, widened; serves u = h W^T and sum_v g_tv W[v]
//   alike logits          [token / NR][v][NR]          ROWS tokens x BLOCK entries sums            [token / NR][k][NR] ROWS tokens
#pragma once

#include "enginepost/linear_logprob.h"
#include "isa.h"
#include "tensor.h"

namespace ep {

struct LogprobShape {
  const char *hidden, *weight;
  int64_t hidden_row, weight_row;  // strides in elements
  bool hidden_bf16, weight_bf16;
  const int64_t *targets;  // (T)
  int64_t *rows;           // (kept): the rows whose target counts, in order
  int64_t tokens, kept, width, vocab;
  float softcap;
  int64_t first = 0;  // the entry that weight begins with
  int64_t end;        // the entry before which it ends
};

struct LogprobForward {
  LogprobShape shape;
  float *logprob, *lse;  // (T)
  float *entropy;        // (T) or null
  float *direction;      // (T, K) or null
  int64_t direction_row;
  const char *target_rows;  // (T, K): weight[targets], where the weight comes in parts, else null
  int64_t target_row;
  float *hidden_panels;
  float *row_max, *row_sum, *row_spread, *target_logit;  // (kept, padded)
  int32_t *turn;                                         // (groups of ROWS): how many splits of the vocabulary are merged
  float *scratch;
};

struct LogprobBackward {
  LogprobShape shape;
  const float *dlogprob, *dentropy, *lse, *entropy;  // (T); dentropy and entropy may be null
  char *dhidden, *dweight;                           // either may be null
  int64_t dhidden_row, dweight_row;
  float *hidden_panels, *hidden_lines;  // lines: [ROWS group][k / NR][token][NR]
  float *dhidden_panels;
  float *row_values;  // (4, kept padded): -dlogprob, dentropy, lse, entropy of the kept rows
  int32_t *turn;
  float *scratch;
};

constexpr int64_t BLOCK = 252;         // a multiple of every tile height (14, 6, 4)
constexpr int64_t SPLIT = 16 * BLOCK;  // entries of the vocabulary of one forward task; the order of summation depends on it
static_assert(SPLIT == EP_LINEAR_LOGPROB_PART, "parts of the weight hold whole splits");
constexpr int64_t ROWS = 256;  // tokens of one task: a multiple of every tile width (32, 16, 8)
constexpr int64_t LANES = 32;  // the widest tile

static inline int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }
// Upper bounds in floats, over all instruction sets.
static inline int64_t padded_rows(int64_t rows) { return blocks_of(rows, LANES) * LANES; }
static inline int64_t panel_floats(int64_t rows, int64_t width) { return padded_rows(rows) * (width + 16); }
static inline int64_t block_floats(int64_t width) { return (width + 16) * (BLOCK + 12); }
static inline int64_t line_floats(int64_t rows, int64_t width) { return padded_rows(rows) * blocks_of(width, LANES) * LANES; }
static inline int64_t group_rows(int64_t rows) { return rows < ROWS ? padded_rows(rows) : ROWS; }
// Per thread.
static inline int64_t forward_scratch(int64_t rows, int64_t width) {
  return block_floats(width) + panel_floats(group_rows(rows), width) + group_rows(rows) * (BLOCK + 3);
}
static inline int64_t backward_scratch(int64_t rows, int64_t width) {
  return block_floats(width) + panel_floats(group_rows(rows), width) + group_rows(rows) * BLOCK +
         BLOCK * blocks_of(width, LANES) * LANES;
}

}  // namespace ep

EP_KERNEL(linear_logprob_forward, LogprobForward)
EP_KERNEL(linear_logprob_backward, LogprobBackward)
