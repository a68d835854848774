// The arguments of the merge kernels, on the CPU and on the GPU. Numbers that a call returns (totals, counts, the elements seen)
// lie in CPU memory on both; what is called `workspace` is the GPU's.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "enginepost/merge.h"
#include "isa.h"

namespace ep {
constexpr int TILE = 256;             // elements of a sum in eight lanes
constexpr int64_t SUM_BLOCK = 65536;  // elements of a partial sum of inner products
constexpr int RANK_SLOTS = 1024;

struct Piece {
  const char *data;
  unsigned dtype;
};
struct MergeWeightedSum {
  Piece x[EP_MERGE_MAX_INPUTS];
  float weight[EP_MERGE_MAX_INPUTS];
  int count;
  char *out;
  unsigned out_dtype;
  int64_t size;
};
struct MergeGram {
  Piece x[EP_MERGE_MAX_INPUTS], base;
  int count;
  int64_t size;
  double *total;
  void *workspace;
};
struct MergeCounts {
  Piece x, base;
  int64_t size, every;
  int64_t *counts;
  void *workspace;
};
struct MergeWindowCounts {
  Piece x, base;
  int64_t size;
  const int64_t *windows;
  int count;
  int64_t *counts;
  void *workspace;
};
struct MergeNonfinite {
  Piece x;
  int64_t size, *count;
  void *workspace;
};
struct MergeRandom {
  uint64_t key;
  int64_t start, size;
  int32_t *out;
};
struct MergeMaskedSums {
  Piece x, base;
  int64_t size, start, block;
  ep_merge_select *select;
  const int32_t *mask;
  double *total;
  void *workspace;
  int32_t *kept;  // CPU: where the bits of what stays go, or null
};
struct MergeRankMask {
  Piece x, base;
  int64_t size, start, columns;
  float least, step;  // keep where the upper 24 bits of the draw are below least + step * (twice the rank)
  uint64_t key;
  int32_t *mask, *workspace;
  double *total;
};
struct MergeTaskSum {
  Piece x[EP_MERGE_MAX_INPUTS], base;
  const int32_t *mask[EP_MERGE_MAX_INPUTS];
  ep_merge_select *select;
  int count;
  ep_merge_task_params p;
  char *out;
  unsigned out_dtype;
  int64_t size;
  float divisor;  // without election
  int64_t *signs;
  void *workspace;
};
}  // namespace ep

EP_KERNEL(merge_weighted_sum, MergeWeightedSum)
EP_KERNEL(merge_gram, MergeGram)
EP_KERNEL(merge_counts, MergeCounts)
EP_KERNEL(merge_window_counts, MergeWindowCounts)
EP_KERNEL(merge_nonfinite, MergeNonfinite)
EP_KERNEL(merge_random, MergeRandom)
EP_KERNEL(merge_masked_sums, MergeMaskedSums)
EP_KERNEL(merge_rank_mask, MergeRankMask)
EP_KERNEL(merge_task_sum, MergeTaskSum)
EP_CUDA_KERNEL(merge_weighted_sum, MergeWeightedSum)
EP_CUDA_KERNEL(merge_gram, MergeGram)
EP_CUDA_KERNEL(merge_counts, MergeCounts)
EP_CUDA_KERNEL(merge_window_counts, MergeWindowCounts)
EP_CUDA_KERNEL(merge_nonfinite, MergeNonfinite)
EP_CUDA_KERNEL(merge_random, MergeRandom)
EP_CUDA_KERNEL(merge_masked_sums, MergeMaskedSums)
EP_CUDA_KERNEL(merge_rank_mask, MergeRankMask)
EP_CUDA_KERNEL(merge_task_sum, MergeTaskSum)
