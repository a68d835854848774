// Merging on the GPU: weighted sums, inner products, counts of magnitudes, random draws; see csrc/cpu/merge.cpp. Masks and task
// vectors: merge_select.cu. Bits are those of the CPU (merge.cuh).
#include "merge.h"

#include <memory>
#include <new>

#include "merge.cuh"

namespace ep {
namespace cuda {
namespace {

__global__ void __launch_bounds__(THREADS) weighted_sum(const MergeWeightedSum a) {
  int n;
  const int64_t at = run_of(a.size, n);
  if (n == 0) return;
  float total[RUN], x[RUN];
  load_piece(a.x[0], at, n, total);
#pragma unroll
  for (int e = 0; e < RUN; e++) total[e] = __fmul_rn(total[e], a.weight[0]);
  for (int i = 1; i < a.count; i++) {
    load_piece(a.x[i], at, n, x);
#pragma unroll
    for (int e = 0; e < RUN; e++) total[e] = __fadd_rn(total[e], __fmul_rn(x[e], a.weight[i]));
  }
  store_piece(a.out, a.out_dtype, at, n, total);
}

// Inner products of ROWS inputs from `row` on with COLUMNS from `column` on (DIAGONAL: with themselves, each pair once), for a
// block of SUM_BLOCK elements: partial[block][i * count + j]. What lies beyond the last input is the last one again, and not kept.
template <int ROWS, int COLUMNS, bool DIAGONAL>
__global__ void __launch_bounds__(THREADS) inner_products(const MergeGram a, double *partial, int row, int column) {
  constexpr int N = DIAGONAL ? ROWS * (ROWS + 1) / 2 : ROWS * COLUMNS;
  const int64_t from = int64_t(blockIdx.x) * SUM_BLOCK, end = min(a.size, from + SUM_BLOCK);
  const double total = sum_in_order<N>(from, end, shared_memory<double>(), [&](int64_t i, double (&sum)[N]) {
    double x[ROWS], y[COLUMNS];
    const float b = a.base.data == nullptr ? 0.f : load_one(a.base, i);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float v = load_one(a.x[min(row + r, a.count - 1)], i);
      x[r] = double(a.base.data == nullptr ? v : __fsub_rn(v, b));
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
      if constexpr (DIAGONAL) {
        y[c] = x[c];
      } else {
        const float v = load_one(a.x[min(column + c, a.count - 1)], i);
        y[c] = double(a.base.data == nullptr ? v : __fsub_rn(v, b));
      }
    }
    int k = 0;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
      for (int c = 0; c < (DIAGONAL ? r + 1 : COLUMNS); c++) {
        sum[k] = fma(x[r], y[c], sum[k]);  // the product is exact: with a rounding of its own it would be the same
        k++;
      }
    }
  });
  int k = 0;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
#pragma unroll
    for (int c = 0; c < (DIAGONAL ? r + 1 : COLUMNS); c++) {
      const int i = row + r, j = column + c;
      if (int(threadIdx.x) == k && i < a.count && j < a.count)
        partial[int64_t(blockIdx.x) * a.count * a.count + i * a.count + j] = total;
      k++;
    }
  }
}

template <int ROWS, int COLUMNS, bool DIAGONAL>
int products_of(const MergeGram &a, double *partial, int row, int column, void *stream) {
  constexpr int N = DIAGONAL ? ROWS * (ROWS + 1) / 2 : ROWS * COLUMNS;
  return launch(&inner_products<ROWS, COLUMNS, DIAGONAL>, dim3(unsigned(ceil_div(a.size, SUM_BLOCK))), THREADS,
                N * GROUPS * sizeof(double), stream, a, partial, row, column);
}

__global__ void __launch_bounds__(THREADS)
    count_magnitudes(const Piece x, const Piece base, int64_t size, int64_t every, unsigned long long *counts) {
  const int64_t run = int64_t(blockIdx.x) * THREADS + threadIdx.x;  // of the tiles that are looked at
  const int64_t at = run / (TILE / RUN) * TILE * every + run % (TILE / RUN) * RUN;
  const int n = int(max(int64_t(0), min(int64_t(RUN), size - at)));
  if (n == 0) return;
  float d[RUN];
  load_delta(x, base, at, n, d);
#pragma unroll
  for (int e = 0; e < RUN; e++) {
    if (e < n) atomicAdd(counts + (magnitude(d[e]) >> 15), 1ull);
  }
}

struct Windows {
  int count;
  int64_t low[EP_MERGE_MAX_WINDOWS], width[EP_MERGE_MAX_WINDOWS];
};
__global__ void __launch_bounds__(THREADS)
    count_windows(const Piece x, const Piece base, int64_t size, const Windows w, long long *counts) {
  int n;
  const int64_t at = run_of(size, n);
  float d[RUN];
  if (n > 0) load_delta(x, base, at, n, d);
#pragma unroll
  for (int i = 0; i < EP_MERGE_MAX_WINDOWS; i++) {
    if (i >= w.count) continue;
    int below = 0;
#pragma unroll
    for (int e = 0; e < RUN; e++) {
      if (e >= n) continue;
      const int64_t bits = magnitude(d[e]);
      below += bits < w.low[i];
      if (bits >= w.low[i] && bits - w.low[i] < w.width[i]) {
        atomicAdd(reinterpret_cast<unsigned long long *>(counts + 1 + bits - w.low[i]), 1ull);
      }
    }
    add_counts(counts, below);
    counts += 1 + w.width[i];
  }
}

__global__ void __launch_bounds__(THREADS) count_nonfinite(const Piece x, int64_t size, long long *count) {
  int n;
  const int64_t at = run_of(size, n);
  float v[RUN];
  if (n > 0) load_piece(x, at, n, v);
  int found = 0;
#pragma unroll
  for (int e = 0; e < RUN; e++) found += e < n && magnitude(v[e]) >= 0x7f800000;
  add_counts(count, found);
}

__global__ void __launch_bounds__(THREADS) random(uint64_t key, int64_t start, int64_t size, int *out) {
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i < size) out[i] = int(Draws(key, start + i)(start + i));
}

// counts[i] += what the GPU has counted.
int add_fetched(int64_t *counts, const void *from, int64_t size, void *stream) {
  std::unique_ptr<long long[]> read(new (std::nothrow) long long[size_t(size)]);
  if (!read) return fail(EP_OUT_OF_MEMORY, "merge: no memory for %lld counts", static_cast<long long>(size));
  if (const int status = fetch(read.get(), from, size * 8, stream)) return status;
  for (int64_t i = 0; i < size; i++) counts[i] += read[size_t(i)];
  return EP_OK;
}

}  // namespace

int merge_weighted_sum(const MergeWeightedSum &a, void *stream) {
  if (a.size == 0) return EP_OK;
  return launch(&weighted_sum, run_blocks(a.size), THREADS, 0, stream, a);
}

int merge_gram(const MergeGram &a, void *stream) {
  if (a.size == 0) return EP_OK;
  double *partial = static_cast<double *>(a.workspace);
  int status = EP_OK;
  if (a.count == 1) status = products_of<1, 1, true>(a, partial, 0, 0, stream);
  if (a.count == 2) status = products_of<2, 2, true>(a, partial, 0, 0, stream);
  for (int row = 0; a.count > 2 && row < a.count && status == EP_OK; row += 4) {
    status = products_of<4, 4, true>(a, partial, row, row, stream);
    for (int column = 0; column < row && status == EP_OK; column += 4)
      status = products_of<4, 4, false>(a, partial, row, column, stream);
  }
  if (status != EP_OK) return status;
  const int64_t pairs = int64_t(a.count) * a.count, blocks = ceil_div(a.size, SUM_BLOCK);
  std::unique_ptr<double[]> part(new (std::nothrow) double[size_t(blocks * pairs)]);
  if (!part) return fail(EP_OUT_OF_MEMORY, "merge_gram: no memory for %lld sums", static_cast<long long>(blocks * pairs));
  if ((status = fetch(part.get(), partial, blocks * pairs * 8, stream)) != EP_OK) return status;
  for (int64_t block = 0; block < blocks; block++) {
    for (int i = 0; i < a.count; i++) {
      for (int j = 0; j <= i; j++) {
        const double sum = part[size_t(block * pairs + i * a.count + j)];
        a.total[i * a.count + j] += sum;
        if (i != j) a.total[j * a.count + i] += sum;
      }
    }
  }
  return EP_OK;
}

int merge_counts(const MergeCounts &a, void *stream) {
  if (a.size == 0) return EP_OK;
  if (const int status = clear(a.workspace, 65536 * 8, stream)) return status;
  const int64_t tiles = ceil_div(ceil_div(a.size, TILE), a.every);
  const dim3 grid(unsigned(ceil_div(tiles * (TILE / RUN), THREADS)));
  auto *counts = static_cast<unsigned long long *>(a.workspace);
  if (const int status = launch(&count_magnitudes, grid, THREADS, 0, stream, a.x, a.base, a.size, a.every, counts)) return status;
  return add_fetched(a.counts, counts, 65536, stream);
}

int merge_window_counts(const MergeWindowCounts &a, void *stream) {
  if (a.size == 0) return EP_OK;
  Windows w = {};
  int64_t numbers = 0;
  w.count = a.count;
  for (int i = 0; i < a.count; i++) {
    w.low[i] = a.windows[2 * i], w.width[i] = a.windows[2 * i + 1];
    numbers += 1 + w.width[i];
  }
  auto *counts = static_cast<long long *>(a.workspace);
  if (const int status = clear(counts, numbers * 8, stream)) return status;
  if (const int status = launch(&count_windows, run_blocks(a.size), THREADS, 0, stream, a.x, a.base, a.size, w, counts))
    return status;
  return add_fetched(a.counts, counts, numbers, stream);
}

int merge_nonfinite(const MergeNonfinite &a, void *stream) {
  *a.count = 0;
  if (a.size == 0) return EP_OK;
  auto *count = static_cast<long long *>(a.workspace);
  if (const int status = clear(count, 8, stream)) return status;
  if (const int status = launch(&count_nonfinite, run_blocks(a.size), THREADS, 0, stream, a.x, a.size, count)) return status;
  return add_fetched(a.count, count, 1, stream);
}

int merge_random(const MergeRandom &a, void *stream) {
  if (a.size == 0) return EP_OK;
  return launch(&random, dim3(unsigned(ceil_div(a.size, THREADS))), THREADS, 0, stream, a.key, a.start, a.size,
                reinterpret_cast<int *>(a.out));
}

}  // namespace cuda
}  // namespace ep
