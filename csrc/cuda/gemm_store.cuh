// What becomes of the accumulators of a product: rounded into c, or, where the depth is cut into slices, left as float32 partial
// sums that a second kernel adds in the order of the slices.
#pragma once

#include "gemm.cuh"
#include "matmul.h"

namespace ep {
namespace gemm {

struct Target {
  char *c;
  int64_t row;  // stride in elements
  Kind kind;
  bool accumulate, aligned;  // aligned: rows begin at multiples of 16 bytes
  const float *alpha;
  float *partial;  // [slice][m][n] instead of c, or null
};

template <class C>
__device__ __forceinline__ void put_one(const Target &t, int64_t at, float v) {
  C *c = reinterpret_cast<C *>(t.c) + at;
  *c = from_float<C>(t.accumulate ? to_float(*c) + v : v);
}
__device__ __forceinline__ void put(const Target &t, int row, int column, float v) {
  const int64_t at = row * t.row + column;
  t.kind == Kind::f32 ? put_one<float>(t, at, v) : t.kind == Kind::bf16 ? put_one<bf16>(t, at, v) : put_one<fp16>(t, at, v);
}

struct Store {
  Target target;

  template <class T, class TILE>
  __device__ __forceinline__ void operator()(const Problem &g, float (&acc)[TILE::MB][TILE::NB][4], int m, int n, int rows) const {
    const int lane = int(threadIdx.x) % 32;
    if (target.partial != nullptr) {
      float *partial = target.partial + int64_t(blockIdx.y) * g.m * g.n;
      each<TILE>(acc, m, n, [&](int row, int column, float &v) {
        if (row < rows && column < g.n) partial[int64_t(row) * g.n + column] = v;
      });
      return;
    }
    if (target.alpha != nullptr) {
      const float alpha = *target.alpha;
      each<TILE>(acc, m, n, [&](int, int, float &v) { v *= alpha; });
    }
    if (target.aligned && !target.accumulate && n + TILE::WN <= g.n && target.kind != Kind::f32) {
      return target.kind == Kind::bf16 ? wide<bf16, TILE>(acc, m, n, rows, lane) : wide<fp16, TILE>(acc, m, n, rows, lane);
    }
    target.kind == Kind::f32    ? narrow<float, TILE>(g, acc, m, n, rows)
    : target.kind == Kind::bf16 ? narrow<bf16, TILE>(g, acc, m, n, rows)
                                : narrow<fp16, TILE>(g, acc, m, n, rows);
  }

  template <class C, class TILE>
  __device__ __forceinline__ void narrow(const Problem &g, float (&acc)[TILE::MB][TILE::NB][4], int m, int n, int rows) const {
    each<TILE>(acc, m, n, [&](int row, int column, float &v) {
      if (row < rows && column < g.n) put_one<C>(target, row * target.row + column, v);
    });
  }

  template <class TILE, class Body>
  static __device__ __forceinline__ void each(float (&acc)[TILE::MB][TILE::NB][4], int m, int n, Body &&body) {
    const int lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < TILE::MB; i++) {
#pragma unroll
      for (int j = 0; j < TILE::NB; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) body(m + i * 16 + lane / 4 + e / 2 * 8, n + j * 8 + lane % 4 * 2 + e % 2, acc[i][j][e]);
      }
    }
  }

  // 16 bytes at a time: the four lanes of a row exchange their pairs, so that lane q holds all eight columns of block q of four.
  template <class C, class TILE>
  __device__ __forceinline__ void wide(float (&acc)[TILE::MB][TILE::NB][4], int m, int n, int rows, int lane) const {
    const int q = lane % 4;
#pragma unroll
    for (int i = 0; i < TILE::MB; i++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = m + i * 16 + half * 8 + lane / 4;
#pragma unroll
        for (int j = 0; j < TILE::NB; j += 4) {
          uint32_t r[4];
#pragma unroll
          for (int p = 0; p < 4; p++) r[p] = pack<C>(acc[i][j + p][half * 2], acc[i][j + p][half * 2 + 1]);
          const uint4 chunk = chunk_of(r);
          if (row < rows) {
            uint16_t *c = reinterpret_cast<uint16_t *>(target.c) + row * target.row + n + (j + q) * 8;
            *reinterpret_cast<uint4 *>(c) = chunk;
          }
        }
      }
    }
  }
};

namespace {

// c from the partial sums of all slices; rows from *m_limit - row0 on are left alone.
__global__ void add_slices(const Target target, int m, int n, int slices, const int *m_limit, int row0) {
  int rows = m;
  if (m_limit != nullptr && *m_limit - row0 < rows) rows = *m_limit - row0;
  const float alpha = target.alpha == nullptr ? 1.f : *target.alpha;
  const int64_t size = int64_t(m) * n, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < int64_t(rows) * n; i += step) {
    float sum = target.partial[i];
    for (int s = 1; s < slices; s++) sum += target.partial[s * size + i];
    put(target, int(i / n), int(i % n), alpha * sum);
  }
}

}  // namespace

}  // namespace gemm
}  // namespace ep
