/* Merging: sums, inner products and task vectors of a run of elements. See enginepost/kernels/merge.py for the formulas.
 *
 * Inputs are 1-D pieces of tensors, float32 or bfloat16 (on a GPU also float16), all of one length and on one device; results are
 * too. On the CPU every function runs on the calling thread alone. The bits of a result depend neither on the instruction set nor
 * on the device.
 *
 * Numbers (double *, int64_t *, the selections) are in CPU memory. On a GPU the functions that give some wait for `stream`; they
 * work in `workspace`, GPU memory of ep_merge_workspace_bytes(), which the CPU does not look at (but for ep_merge_rank_mask). */
#ifndef ENGINEPOST_MERGE_H_
#define ENGINEPOST_MERGE_H_

#include "enginepost/core.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { EP_MERGE_MAX_INPUTS = 64 };
enum { EP_SELECT_ALL = 0, EP_SELECT_NONE = 1, EP_SELECT_MAGNITUDE = 2, EP_SELECT_RANDOM = 3, EP_SELECT_BITS = 4 };

/* Which elements of a task vector stay. MAGNITUDE: bits of |d| strictly between low and high; of those equal to low all but the
 * first low_skip, of those equal to high the first high_keep; seen_low and seen_high count on from call to call, while they matter.
 * RANDOM: where the element's draw is below limit. BITS: where the bit of `mask` is set (int32 words, bit i of the piece in word
 * i / 32). For the other kinds `mask` is NULL; on the CPU ep_merge_masked_sums may have one, and writes their bits there. */
typedef struct {
  int32_t kind, low, high;
  int64_t low_skip, high_keep, seen_low, seen_high;
  uint64_t key, limit;
  float scale, weight;
  const DLTensor *mask;
} ep_merge_select;

/* `numbers`: 65536 for magnitude_counts, the length of `counts` for window_counts, two for every block or row that masked_sums and
 * rank_mask add up, else 0. */
EP_EXPORT int64_t ep_merge_workspace_bytes(int64_t size, int count, int64_t numbers);

/* out = sum weights[i] x[i] */
EP_EXPORT int ep_merge_weighted_sum(const DLTensor *const *x, const double *weights, int count, const DLTensor *out, void *stream);

/* total[i * count + j] += sum (x[i] - base)(x[j] - base), in double; base may be NULL. */
EP_EXPORT int ep_merge_gram(const DLTensor *const *x, int count, const DLTensor *base, double *total, void *workspace,
                            void *stream);

/* Counts the bits of |x - base|, 31 of them, by the upper 16: counts has 2 x 65536, over which elements are spread and which the
 * caller adds. Looks at one run of 256 elements in `every`. base may be NULL. */
EP_EXPORT int ep_merge_magnitude_counts(const DLTensor *x, const DLTensor *base, int64_t every, int64_t *counts, void *workspace,
                                        void *stream);

/* Counts the bits of |x - base| in windows, each (low, width) in `windows`: of its 1 + width numbers in `counts`, which follow one
 * another, [0] += those below low and [1 + i] += those equal to low + i. base may be NULL. */
enum { EP_MERGE_MAX_WINDOWS = 2 };
EP_EXPORT int ep_merge_window_counts(const DLTensor *x, const DLTensor *base, const int64_t *windows, int count, int64_t *counts,
                                     void *workspace, void *stream);

/* total[0] += sum |d|, total[1] += sum |masked d|, in double, in blocks of `block` elements; start: index of the first element. */
EP_EXPORT int ep_merge_masked_sums(const DLTensor *x, const DLTensor *base, ep_merge_select *select, int64_t start, int64_t block,
                                   double *total, void *workspace, void *stream);

/* DELLA's draw: an element stays with a probability that grows from density - epsilon to density + epsilon with the rank of
 * |x - base| in its row of `columns`. Magnitudes that agree in exponent and 6 bits of the fraction are equal, and so are all below
 * 2^-16 of the row's largest; equal ones share the mean of their ranks. start: index of the first element. mask (ceil(n / 32))
 * int32 is written; total, which may be NULL, as in ep_merge_masked_sums, row by row. */
typedef struct {
  int64_t columns, start;
  double density, epsilon;
  uint64_t key;
} ep_merge_rank_params;
/* On the CPU; on a GPU ep_merge_workspace_bytes. */
EP_EXPORT int64_t ep_merge_rank_mask_workspace_bytes(int64_t columns);
EP_EXPORT int ep_merge_rank_mask(const DLTensor *x, const DLTensor *base, ep_merge_rank_params params, const DLTensor *mask,
                                 double *total, void *workspace, void *stream);

/* out = base + scale * (masked, weighted and elected sum of x[i] - base); *signs, which may be NULL, = sum of the elected signs. */
typedef struct {
  int elect, normalize, zero_sign;
  float scale;
  int64_t start;
} ep_merge_task_params;
EP_EXPORT int ep_merge_task_sum(const DLTensor *base, const DLTensor *const *x, ep_merge_select *selects, int count,
                                ep_merge_task_params params, const DLTensor *out, int64_t *signs, void *workspace, void *stream);

/* *count = number of NaN and infinite elements. */
EP_EXPORT int ep_merge_nonfinite(const DLTensor *x, int64_t *count, void *workspace, void *stream);

/* out (n) int32: the draws of elements start, start + 1, ... as uint32. */
EP_EXPORT int ep_merge_random(uint64_t key, int64_t start, const DLTensor *out, void *stream);

#ifdef __cplusplus
}
#endif
#endif
