// What the attention kernels share on the device: which rows and keys a block works on, who sees whom, tiles in shared memory,
// fragments.
//
// A tile in shared memory is (rows, W) of 16-bit elements in chunks of 16 bytes. Chunk c of row r lies at chunk c ^ (r % 8) of its
// group of eight, so that the eight rows that ldmatrix reads at once lie in eight different sets of banks. Where W is 32 mod 64 a
// row begins in the middle of the banks, and c ^ (r / 2 % 4) of a group of four does the same.
//
// Fragments of mma.m16n8k16, by lane g = lane / 4, t = lane % 4: A has rows g and g + 8, columns 2t and 2t + 8 (and the next one
// each); B the same columns as its k, n = g; the accumulator rows g (elements 0, 1) and g + 8 (2, 3), columns 2t and 2t + 1.
#pragma once

#include "attention.h"
#include "launch.cuh"

namespace ep {
namespace cuda {

constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.693147180559945309f;
#define EP_INFINITY __int_as_float(0x7f800000)

// ---- rows and keys
// ----------------------------------------------------------------------------------------------------------------

struct Sequence {
  int b, q0, queries, k0, keys, slot;  // slot: keys that there is room for, of which `keys` count
  const int32_t *pages;
};

__device__ __forceinline__ Sequence sequence_of(const Problem &s, int b) {
  Sequence seq;
  seq.b = b;
  seq.q0 = s.cu_q != nullptr ? s.cu_q[b] : b;
  seq.queries = s.cu_q != nullptr ? s.cu_q[b + 1] - seq.q0 : 1;
  const int32_t *cu_k = s.cu_k != nullptr ? s.cu_k : s.cu_q;
  seq.k0 = s.page_size > 0 ? 0 : cu_k[b];
  seq.slot = s.page_size > 0 ? int(s.keys) : cu_k[b + 1] - seq.k0;
  seq.keys = s.used_k != nullptr ? min(s.used_k[b], seq.slot) : seq.slot;
  seq.pages = s.block_table + b * s.table_row;
  return seq;
}

// The sequence that tile number `tile` may belong to, and which of its tiles it is (see attention.h).
__device__ __forceinline__ int find_sequence(const int32_t *starts, int sequences, int group, int rows, int tile, int &local) {
  int low = 0, high = sequences;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    const int first = (starts != nullptr ? starts[middle] : middle) * group / rows + middle;
    (first <= tile ? low : high) = middle;
  }
  local = tile - ((starts != nullptr ? starts[low] : low) * group / rows + low);
  return low;
}

struct Span {  // keys [begin, end); both ends grow with the query token, and end <= begin where nothing is seen
  int begin, end;
};

__device__ __forceinline__ Span visible(const Problem &s, const Sequence &seq, int token) {
  const int diagonal = token + seq.keys - seq.queries;
  const int begin = s.window > 0 ? max(diagonal - s.window + 1, 0) : 0;
  return {begin, s.causal ? min(diagonal + 1, seq.keys) : seq.keys};
}

// ---- global memory to shared memory
// -------------------------------------------------------------------------------------------------

template <int W>
__device__ __forceinline__ int row_mix(int row) {
  return W % 64 == 0 ? row & 7 : (row >> 1) & 3;
}
// Bytes from the beginning of a row to its chunk c + step, for a lane whose c < 2 and whose mixed = c ^ row_mix; `step` is even,
// and known to the compiler, so that few sums are made while the kernel runs.
template <int W>
__device__ __forceinline__ int chunk_bytes(int mixed, int step) {
  constexpr int GROUP = W % 64 == 0 ? 7 : 3;
  return ((step & ~GROUP) + (mixed ^ (step & GROUP))) * 16;
}

template <class T>
struct StackedRows {  // rows from r0 on of the stack of query heads that share a key head
  T *head;
  int64_t token, step;
  int group, r0;
  __device__ __forceinline__ T *operator()(int i) const {
    const int r = r0 + i, of = r / group;
    return head + of * token + (r - of * group) * step;
  }
};
template <class T>
__device__ __forceinline__ StackedRows<T> stacked_rows(const Rows &x, const Problem &s, const Sequence &seq, int kv_head, int r0) {
  return {static_cast<T *>(x.data) + seq.q0 * x.token + kv_head * s.group * x.head, x.token, x.head, s.group, r0};
}

template <class T>
struct KeyRows {  // keys from k0 on
  T *head;
  int64_t token, page;
  const int32_t *pages;
  int page_size, k0;
  __device__ __forceinline__ T *operator()(int i) const {
    const int j = k0 + i;
    if (page_size == 0) return head + j * token;
    const int of = j / page_size;
    return head + pages[of] * page + (j - of * page_size) * token;
  }
};
template <class T>
__device__ __forceinline__ KeyRows<T> key_rows(const Rows &x, const Problem &s, const Sequence &seq, int kv_head, int k0) {
  return {static_cast<T *>(x.data) + seq.k0 * x.token + kv_head * x.head, x.token, x.page, seq.pages, s.page_size, k0};
}

// Where a thread's part of a tile is: ACROSS chunks of a row lie side by side in a warp, and it goes down STEP rows at a time.
template <int W, int THREADS>
struct Share {
  static constexpr int ACROSS = W % 64 == 0 ? 8 : 4, STEP = THREADS / ACROSS;
  static_assert(THREADS % ACROSS == 0, "whole rows");
  int column, row;
  __device__ __forceinline__ explicit Share(int thread) : column(thread % ACROSS), row(thread / ACROSS) {}
  __device__ __forceinline__ int at(int r) const { return r * W + (column ^ row_mix<W>(r)) * 8; }  // in elements
};

// Rows [0, count) of what `row_at` gives, and zeros up to ROWS, into a tile of width W; elements from `width` on are zeros.
// cp.async, which the caller commits and waits for: every row must begin at a multiple of 16 bytes.
template <int W, int ROWS, int THREADS, class T, class RowAt>
__device__ __forceinline__ void load_rows(T *tile, const RowAt &row_at, int count, int width, int thread) {
  using S = Share<W, THREADS>;
  const S mine(thread);
  const uint32_t to = ptx::shared_address(tile);
#pragma unroll 1
  for (int i = 0; i < (ROWS + S::STEP - 1) / S::STEP; i++) {
    const int row = mine.row + i * S::STEP;
    if (ROWS % S::STEP != 0 && row >= ROWS) break;
    const bool inside = row < count;
    const T *from = row_at(inside ? row : 0) + mine.column * 8;
#pragma unroll
    for (int j = 0; j < W / 8; j += S::ACROSS) {
      ptx::cp_async_16(to + (mine.at(row) + j * 8) * 2, from + j * 8, inside && (mine.column + j) * 8 < width);
    }
  }
}

// The same for rows at one stride: no row's address is worked out anew.
template <int W, int ROWS, int THREADS, class T>
__device__ __forceinline__ void load_strided_rows(T *tile, const T *rows, int64_t stride, int count, int width, int thread) {
  using S = Share<W, THREADS>;
  const S mine(thread);
  const uint32_t to = ptx::shared_address(tile);
  const T *from = rows + mine.row * stride + mine.column * 8;
#pragma unroll
  for (int i = 0; i < (ROWS + S::STEP - 1) / S::STEP; i++) {
    const int row = mine.row + i * S::STEP;
    if (ROWS % S::STEP != 0 && row >= ROWS) break;
#pragma unroll
    for (int j = 0; j < W / 8; j += S::ACROSS) {
      ptx::cp_async_16(to + (mine.at(row) + j * 8) * 2, from + j * 8, row < count && (mine.column + j) * 8 < width);
    }
    from += S::STEP * stride;
  }
}

// The same for rows of any alignment and width, by plain loads and stores.
template <int W, int ROWS, int THREADS, class T, class RowAt>
__device__ __forceinline__ void load_loose_rows(T *tile, const RowAt &row_at, int count, int width, int thread) {
  using S = Share<W, THREADS>;
  const S mine(thread);
#pragma unroll 1
  for (int row = mine.row; row < ROWS; row += S::STEP) {
    const bool inside = row < count;
    const uint16_t *from = reinterpret_cast<const uint16_t *>(row_at(inside ? row : 0)) + mine.column * 8;
#pragma unroll 1
    for (int j = 0; j < W / 8; j += S::ACROSS) {
      const int left = inside ? width - (mine.column + j) * 8 : 0;
      uint32_t words[4];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const uint32_t low = 2 * k < left ? from[j * 8 + 2 * k] : 0, high = 2 * k + 1 < left ? from[j * 8 + 2 * k + 1] : 0;
        words[k] = low | high << 16;
      }
      *reinterpret_cast<uint4 *>(tile + mine.at(row) + j * 8) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// ROWS keys from k0 on, of which the sequence has `count`.
template <int W, int ROWS, int THREADS, class T>
__device__ __forceinline__ void load_keys(T *tile, const Rows &x, const Problem &s, const Sequence &seq, int kv_head, int k0,
                                          int count, int thread) {
  const KeyRows<T> rows = key_rows<T>(x, s, seq, kv_head, k0);
  if (!x.vector) {
    load_loose_rows<W, ROWS, THREADS>(tile, rows, count, s.head_dim, thread);
  } else if (s.page_size == 0) {
    load_strided_rows<W, ROWS, THREADS, T>(tile, rows.head + k0 * rows.token, rows.token, count, s.head_dim, thread);
  } else {
    load_rows<W, ROWS, THREADS>(tile, rows, count, s.head_dim, thread);
  }
}

// ROWS stacked rows from r0 on, of which the sequence has `count`.
template <int W, int ROWS, int THREADS, class T>
__device__ __forceinline__ void load_stack(T *tile, const Rows &x, const Problem &s, const Sequence &seq, int kv_head, int r0,
                                           int count, int thread) {
  const StackedRows<T> rows = stacked_rows<T>(x, s, seq, kv_head, r0);
  if (!x.vector) {
    load_loose_rows<W, ROWS, THREADS>(tile, rows, count, s.head_dim, thread);
  } else {
    load_rows<W, ROWS, THREADS>(tile, rows, count, s.head_dim, thread);
  }
}

// ---- shared memory to registers
// -----------------------------------------------------------------------------------------------------

// This lane's row in the pieces, 16 rows by two chunks, that ldmatrix.x4 takes from a tile. Its four matrices are (rows 0-7, chunk
// 0), (8-15, 0), (0-7, 1), (8-15, 1), one order for every operand, so that all tiles of a width share the lane's part of the
// address:
//   A as it lies: a = r                             A of a tile (k, m), transposed: a = (r0, r2, r1, r3)
//   B of a tile (n, k): b of columns 0-7 is (r0, r2), of 8-15 (r1, r3)       B of a tile (k, n), transposed: (r0, r1) and (r2, r3)
template <int W>
struct Pieces {
  uint32_t row;
  int mixed;
  template <class T>
  __device__ __forceinline__ Pieces(const T *tile, int lane)
      : row(ptx::shared_address(tile) + lane % 16 * W * 2), mixed((lane / 16) ^ row_mix<W>(lane % 16)) {}
  __device__ __forceinline__ uint32_t at(int i, int chunk) const { return row + i * 16 * W * 2 + chunk_bytes<W>(mixed, chunk); }
};

// ---- scores
// -----------------------------------------------------------------------------------------------------------------------

// 1 - 2 / (1 + e^2x): the error is absolute, 1e-7, and the exponential saturates at both ends.
__device__ __forceinline__ float tanh_of(float x) { return 1.f - 2.f * ptx::reciprocal(1.f + ptx::exp2(x * (2 * LOG2E))); }

template <int COLUMNS>
__device__ __forceinline__ void transform(float (&p)[COLUMNS][4], const ScoreScale &scale) {
  if (scale.kind == ScoreScale::CAPPED) {
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) p[n][e] = scale.cap * tanh_of(p[n][e] * scale.before);
    }
  } else if (scale.kind == ScoreScale::SCALED) {
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) p[n][e] *= scale.before;
    }
  }
}

// Scores of the lane's rows g and g + 8 outside [begin, end), counted from the tile's first column, become minus infinity.
template <int COLUMNS>
__device__ __forceinline__ void mask_row(float (&p)[COLUMNS][4], int h, int begin, int end, int lane) {
  begin -= lane % 4 * 2, end -= lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < COLUMNS; n++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      if (n * 8 + e < begin || n * 8 + e >= end) p[n][2 * h + e] = -EP_INFINITY;
    }
  }
}

// One step of the running softmax of 16 rows: scores become weights 2^(score - max), row_sum, which is of this lane's columns, is
// brought to the new maximum, and `rescale` says what the output has to be multiplied by.
template <int COLUMNS>
__device__ __forceinline__ void softmax_step(float (&p)[COLUMNS][4], float after, float (&row_max)[2], float (&row_sum)[2],
                                             float (&rescale)[2]) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float high = row_max[h];
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) high = fmaxf(high, fmaxf(p[n][2 * h], p[n][2 * h + 1]));
    high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
    high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
    const float shift = high == -EP_INFINITY ? 0.f : high * after;  // a row that has seen nothing yet
    rescale[h] = ptx::exp2(row_max[h] * after - shift);
    row_max[h] = high;
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        p[n][2 * h + e] = ptx::exp2(p[n][2 * h + e] * after - shift);
        sum += p[n][2 * h + e];
      }
    }
    row_sum[h] = row_sum[h] * rescale[h] + sum;
  }
}

template <int DEPTH>
__device__ __forceinline__ void rescale_rows(float (&out)[DEPTH][4], const float (&rescale)[2]) {
#pragma unroll
  for (int d = 0; d < DEPTH; d++) {
#pragma unroll
    for (int e = 0; e < 4; e++) out[d][e] *= rescale[e / 2];
  }
}

// The sum over the four lanes that share a row.
__device__ __forceinline__ float row_total(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Accumulators of 16 rows by 16 columns as an operand A.
template <class T, int COLUMNS>
__device__ __forceinline__ void as_operand(uint32_t (&a)[4], const float (&p)[COLUMNS][4], int kk) {
#pragma unroll
  for (int e = 0; e < 4; e++) a[e] = pack<T>(p[2 * kk + e / 2][e % 2 * 2], p[2 * kk + e / 2][e % 2 * 2 + 1]);
}

template <int COUNT>
__device__ __forceinline__ void clear(float (&x)[COUNT][4]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
#pragma unroll
    for (int e = 0; e < 4; e++) x[i][e] = 0.f;
  }
}

// ---- registers to global memory
// -----------------------------------------------------------------------------------------------------

// Elements `column` and the next of a row whose width is `width`; `paired`: pairs are aligned.
template <class T>
__device__ __forceinline__ void store_pair(T *row, int column, int width, bool paired, float a, float b) {
  if (paired && column + 1 < width) {
    *reinterpret_cast<uint32_t *>(row + column) = pack<T>(a, b);
  } else {
    const uint32_t both = pack<T>(a, b);
    if (column < width) reinterpret_cast<uint16_t *>(row)[column] = uint16_t(both);
    if (column + 1 < width) reinterpret_cast<uint16_t *>(row)[column + 1] = uint16_t(both >> 16);
  }
}

}  // namespace cuda
}  // namespace ep
