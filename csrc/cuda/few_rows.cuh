// c (m, n) = x (m, k) W^T for a few rows of x (generation): bound by the reading of W, so W goes from memory to the operands of the
// tensor core without a stop in shared memory.
//
//   grid     a block per 32 rows of W (4 blocks of 8 columns of c); its 8 warps each take every eighth chunk of the depth
//   chunk    lane = 4 g + q holds 16 bytes of row g of each block, those of depth UNIT q ..., UNIT = 8 numbers, or 32 of 4 bits
//
// mma sums over its depth in any order as long as x and W agree, so the four numbers at 4 s of a lane's UNIT are its share of
// product s, where the instruction would have numbers 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 of sixteen. Both operands are then read as
// they lie, 16 bytes at a time.
//
//   depth        0 ........ UNIT ....... 2 UNIT ..... 3 UNIT ..... 4 UNIT = a chunk
//   lane         q = 0        q = 1        q = 2        q = 3
//   product s    4s..4s+3     4s..4s+3     4s..4s+3     4s..4s+3     of each
//
// The eight partial sums are added in the order of the warps, then a low-rank update in plain float32.
#pragma once

#include "gemm_store.cuh"

namespace ep {
namespace gemm {

struct Update {  // + a (m, r) b (r, n): rank r = 0 when there is none
  Operand a, b;
  int rank;
};

__device__ __forceinline__ float number_at(const Operand &x, int64_t row, int64_t column) {
  const int64_t at = row * x.row + column * x.col;
  if (x.kind == Kind::f32) return reinterpret_cast<const float *>(x.data)[at];
  if (x.kind == Kind::bf16) return to_float(reinterpret_cast<const bf16 *>(x.data)[at]);
  return to_float(reinterpret_cast<const fp16 *>(x.data)[at]);
}

// W as it is: rows of k numbers of 16 bits at stride `row`, 16-byte aligned.
template <class T>
struct Dense {
  static constexpr int UNIT = 8, SHARED_BYTES = 0;
  const uint16_t *data;
  int64_t row;

  struct Held {
    uint4 bits;
  };
  __device__ __forceinline__ Dense prepare() const { return *this; }  // by all threads
  __device__ __forceinline__ Held load(int64_t n, int64_t k) const {
    return {ptx::load_once(reinterpret_cast<const uint4 *>(data + n * row + k))};
  }
  __device__ __forceinline__ static Held none() { return {make_uint4(0, 0, 0, 0)}; }
  // The operands of product s.
  __device__ __forceinline__ void operands(const Held &h, int s, uint32_t &b0, uint32_t &b1) const {
    b0 = s == 0 ? h.bits.x : h.bits.z;
    b1 = s == 0 ? h.bits.y : h.bits.w;
  }
};

constexpr int FEW_WARPS = 8, FEW_COLUMNS = 32;

// MB: blocks of 16 rows of x. x: rows at stride x_row, 16-byte aligned; k is a multiple of W's UNIT.
template <class T, class WEIGHT, int MB>
__global__ void __launch_bounds__(FEW_WARPS * 32) few_rows(const uint16_t *x, int64_t x_row, int m, int n, int64_t k,
                                                           const WEIGHT weight, const Update update, const Target target) {
  constexpr int NB = FEW_COLUMNS / 8, UNIT = WEIGHT::UNIT, CHUNK = 4 * UNIT;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, g = lane / 4, q = lane % 4;
  const int n0 = int(blockIdx.x) * FEW_COLUMNS;
  const auto reader = weight.prepare();
  float acc[MB][NB][4];
#pragma unroll
  for (int i = 0; i < MB; i++) {
#pragma unroll
    for (int j = 0; j < NB; j++) {
#pragma unroll
      for (int e = 0; e < 4; e++) acc[i][j][e] = 0.f;
    }
  }
  const auto fetch = [&](typename WEIGHT::Held(&held)[NB], int64_t at) {
#pragma unroll
    for (int j = 0; j < NB; j++) {
      const int row = n0 + j * 8 + g;
      held[j] = row < n && at < k ? reader.load(row, at) : WEIGHT::none();
    }
  };
  typename WEIGHT::Held next[NB];
  int64_t at = int64_t(warp) * CHUNK + q * UNIT;
  fetch(next, at);
#pragma unroll 1
  for (; at - q * UNIT < k; at += FEW_WARPS * CHUNK) {
    typename WEIGHT::Held held[NB];
#pragma unroll
    for (int j = 0; j < NB; j++) held[j] = next[j];
    fetch(next, at + FEW_WARPS * CHUNK);
#pragma unroll
    for (int part = 0; part < UNIT / 8; part++) {
      uint4 a[MB][2];
#pragma unroll
      for (int i = 0; i < MB; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int row = i * 16 + half * 8 + g;
          a[i][half] =
              row < m && at < k ? *reinterpret_cast<const uint4 *>(x + row * x_row + at + part * 8) : make_uint4(0, 0, 0, 0);
        }
      }
#pragma unroll
      for (int s = 0; s < 2; s++) {
#pragma unroll
        for (int j = 0; j < NB; j++) {
          uint32_t b0, b1;
          reader.operands(held[j], part * 2 + s, b0, b1);
#pragma unroll
          for (int i = 0; i < MB; i++) {
            const uint4 &low = a[i][0], &high = a[i][1];
            const uint32_t af[4] = {s ? low.z : low.x, s ? high.z : high.x, s ? low.w : low.y, s ? high.w : high.y};
            ptx::mma_m16n8k16<T>(acc[i][j], af, b0, b1);
          }
        }
      }
    }
  }
  float *sums = reinterpret_cast<float *>(shared_memory<unsigned char>() + WEIGHT::SHARED_BYTES);  // [warp][16][FEW_COLUMNS]
#pragma unroll
  for (int i = 0; i < MB; i++) {
    if (i > 0) __syncthreads();
#pragma unroll
    for (int j = 0; j < NB; j++) {
#pragma unroll
      for (int e = 0; e < 4; e++) sums[(warp * 16 + g + e / 2 * 8) * FEW_COLUMNS + j * 8 + q * 2 + e % 2] = acc[i][j][e];
    }
    __syncthreads();
    for (int at = int(threadIdx.x); at < 16 * FEW_COLUMNS; at += FEW_WARPS * 32) {
      const int row = i * 16 + at / FEW_COLUMNS, column = n0 + at % FEW_COLUMNS;
      if (row >= m || column >= n) continue;
      float sum = sums[at];
      for (int w = 1; w < FEW_WARPS; w++) sum += sums[w * 16 * FEW_COLUMNS + at];
      for (int r = 0; r < update.rank; r++) sum = fmaf(number_at(update.a, row, r), number_at(update.b, r, column), sum);
      put(target, row, column, sum);
    }
  }
}

constexpr int FEW_SUMS_BYTES = FEW_WARPS * 16 * FEW_COLUMNS * 4;  // 16 KB

}  // namespace gemm
}  // namespace ep
