// The matrix product that matmul, nf4, lora and linear_logprob share: sum over segments of a_s b_s, float32 accumulation.
//
//   grid     one block a tile of c, BM x BN; blockIdx.y cuts the depth into slices
//   stage    A tile [BM][32] (a contiguous along k) or [32][BM], B tile [BN][32] or [32][BN], 2 bytes an element
//
//        global --cp.async, STAGES - 1 tiles ahead--> shared, in chunks of 16 bytes --ldmatrix--> registers --mma--> acc
//
// Shared memory is swizzled: chunk c of row r lies at c ^ (r / R mod C), C = chunks of a row (8 at most), R = 8 / C, so that the
// eight rows that an ldmatrix reads at one chunk lie in the 32 banks once each, whichever way the operand lies.
//
//   [BM][32], 64 bytes a row             [32][BM], 256 bytes a row (k across, as it lies in memory)
//   row 0   c0 c1 c2 c3                  row 0   c0 c1 c2 c3 c4 c5 c6 c7 | c8 ...
//   row 1   c0 c1 c2 c3                  row 1   c1 c0 c3 c2 c5 c4 c7 c6 | c9 ...
//   row 2   c1 c0 c3 c2                  row 2   c2 c3 c0 c1 c6 c7 c4 c5 | c10 ...
//   row 4   c2 c3 c0 c1                  row 7   c7 c6 c5 c4 c3 c2 c1 c0 | c15 ...
//
// NOTES: a segment is one pair of operands with a depth of its own. A low-rank update S B^T is a second segment into the same
// accumulators, so it costs a step of 32 or two and no pass over c; a float32 operand is a few segments, one for each pair of its
// 16-bit parts (matmul.cu). Beyond an edge of a matrix tiles are filled with zeros, by cp.async itself, so depth, rows and columns
// may be anything; operands whose rows are not 16-byte aligned are read element by element.
//
// Every element of c is summed in an order that depends on the depth, the step of 32 and the slices alone.
#pragma once

#include <cstdint>

#include "launch.cuh"

namespace ep {
namespace gemm {

constexpr int BK = 32, MAX_SEGMENTS = 12;

struct Segment {
  const uint16_t *a, *b;
  int64_t lda, ldb;  // elements between lines of the stored matrix, whichever way it lies
  int k;
  bool a_aligned, b_aligned;  // all lines begin at a multiple of 16 bytes
};

struct Problem {
  Segment segment[MAX_SEGMENTS];
  int segments, m, n;
  int row0;
  const int *m_limit;  // in device memory, or null: rows of a from *m_limit - row0 on do not exist, and blocks of such rows return
  const int *k_limit;  // the same for the depth of the first segment
};

template <int BM_, int BN_, int WM_, int WN_, int STAGES_>
struct Tile {
  static constexpr int BM = BM_, BN = BN_, WM = WM_, WN = WN_, STAGES = STAGES_;
  static constexpr int WARPS_N = BN / WN, WARPS = BM / WM * WARPS_N, THREADS = WARPS * 32;
  static constexpr int MB = WM / 16, NB = WN / 8;
  static constexpr int STAGE_ELEMENTS = (BM + BN) * BK;
  static constexpr int SHARED_BYTES = STAGES * STAGE_ELEMENTS * 2;
};
using Large = Tile<128, 128, 64, 64, 3>;  // 48 KB
using Small = Tile<64, 64, 32, 32, 4>;    // 32 KB

// Where chunk `chunk` of row `row` lies in a tile whose rows have COLS elements, in bytes.
template <int COLS>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  constexpr int CHUNKS = COLS / 8, WIDTH = CHUNKS < 8 ? CHUNKS : 8, ROWS = 8 / WIDTH;
  static_assert((WIDTH & (WIDTH - 1)) == 0, "a power of two");
  return row * COLS * 2 + (chunk ^ (row / ROWS % WIDTH)) * 16;
}

// A tile [ROWS][COLS] from a matrix with COLS contiguous, to the shared address `tile`; `rows` and `cols` of it exist, the rest is
// zero.
template <int ROWS, int COLS, int THREADS>
__device__ __forceinline__ void load_tile(uint32_t tile, const uint16_t *source, int64_t ld, int rows, int cols, bool aligned) {
  constexpr int CHUNKS = COLS / 8, STEP = THREADS / CHUNKS;
  static_assert(THREADS % CHUNKS == 0 && ROWS % STEP == 0, "whole steps");
  const int chunk = int(threadIdx.x) % CHUNKS, first = int(threadIdx.x) / CHUNKS;
  const int left = cols - chunk * 8, count = left < 0 ? 0 : left > 8 ? 8 : left;
  const uint16_t *from = source + first * ld + chunk * 8;
  if (aligned) {
#pragma unroll
    for (int row = first; row < ROWS; row += STEP, from += STEP * ld) {
      const bool some = row < rows && count > 0;
      ptx::cp_async_16_first(tile + swizzled<COLS>(row, chunk), some ? from : source, some ? count * 2 : 0);
    }
    return;
  }
  unsigned char *shared = shared_memory<unsigned char>();
  const uint32_t origin = ptx::shared_address(shared);
#pragma unroll 1
  for (int row = first; row < ROWS; row += STEP, from += STEP * ld) {
    uint16_t *to = reinterpret_cast<uint16_t *>(shared + (tile - origin) + swizzled<COLS>(row, chunk));
#pragma unroll 1
    for (int i = 0; i < 8; i++) to[i] = row < rows && i < count ? from[i] : uint16_t(0);
  }
}

// The addresses at which a lane takes part in the ldmatrix of a warp's BLOCKS blocks of 16 lines (rows of a, columns of b), by step
// k of 16. ACROSS: the tile lies [k][LINES], so ldmatrix transposes.
template <bool SIDE_A, bool ACROSS, int LINES, int BLOCKS>
struct Reader {
  uint32_t at[ACROSS ? BLOCKS : BK / 16];

  __device__ __forceinline__ Reader(int line0, int lane) {
    constexpr bool BY_HALVES = SIDE_A != ACROSS;  // matrices 0, 1 are the two halves of the lines (a) or of k (b across)
    const int row = (BY_HALVES ? lane / 8 % 2 : lane / 16) * 8 + lane % 8, chunk = BY_HALVES ? lane / 16 : lane / 8 % 2;
    if (ACROSS) {
#pragma unroll
      for (int i = 0; i < BLOCKS; i++) at[ACROSS ? i : 0] = uint32_t(swizzled<LINES>(row, line0 / 8 + 2 * i + chunk));
    } else {
#pragma unroll
      for (int k = 0; k < BK / 16; k++) at[ACROSS ? 0 : k] = uint32_t(swizzled<BK>(line0 + row, 2 * k + chunk));
    }
  }
  __device__ __forceinline__ void read(uint32_t (&r)[4], uint32_t tile, int block, int k) const {
    if (ACROSS) {
      ptx::ldmatrix_x4_trans(r, tile + at[ACROSS ? block : 0] + uint32_t(k * 16 * LINES * 2));
    } else {
      ptx::ldmatrix_x4(r, tile + at[ACROSS ? 0 : k] + uint32_t(block * 16 * BK * 2));
    }
  }
};

// Tile number `id` of c: groups of 8 tile rows, down the rows first, so that blocks that run together share tiles of a and b in L2.
struct Place {
  int m0, n0;
};
template <class TILE>
__device__ __forceinline__ Place place_of(const Problem &g, int id) {
  constexpr int GROUP = 8;
  const int rows = (g.m + TILE::BM - 1) / TILE::BM, cols = (g.n + TILE::BN - 1) / TILE::BN;
  const int group = id / (GROUP * cols), first = group * GROUP;
  const int high = rows - first < GROUP ? rows - first : GROUP, at = id - group * GROUP * cols;
  return {(first + at % high) * TILE::BM, at / high * TILE::BN};
}

// EPILOGUE: operator()<T, TILE>(problem, acc, m, n, rows) for each warp. Element acc[i][j][e] of a thread is row
// m + 16 i + lane / 4 + e / 2 * 8, column n + 8 j + lane % 4 * 2 + e % 2; rows of c from `rows` on do not exist.
template <class T, class TILE, bool A_ACROSS, bool B_ACROSS, class EPILOGUE>
__global__ void __launch_bounds__(TILE::THREADS, 2) product(const Problem g, const EPILOGUE epilogue) {
  constexpr int STAGES = TILE::STAGES, MB = TILE::MB, NB = TILE::NB;
  const Place at = place_of<TILE>(g, int(blockIdx.x));
  int rows = g.m;
  if (g.m_limit != nullptr && *g.m_limit - g.row0 < rows) rows = *g.m_limit - g.row0;
  if (at.m0 >= rows) return;
  int first_depth = g.segment[0].k;
  if (g.k_limit != nullptr && *g.k_limit < first_depth) first_depth = *g.k_limit;
  const auto depth_of = [&](int segment) { return segment == 0 ? first_depth : g.segment[segment].k; };
  const auto steps_of = [&](int segment) { return (depth_of(segment) + BK - 1) / BK; };

  // This slice's steps.
  int total = 0;
  for (int s = 0; s < g.segments; s++) total += steps_of(s);
  const int slice = (total + int(gridDim.y) - 1) / int(gridDim.y), begin = slice * int(blockIdx.y);
  const int steps = total - begin < slice ? total - begin : slice;
  int segment = 0, step = begin;  // what is loaded next
  while (segment < g.segments && step >= steps_of(segment)) step -= steps_of(segment++);

  const uint32_t shared = ptx::shared_address(shared_memory<unsigned char>());
  const auto load = [&](int stage) {
    const Segment &s = g.segment[segment];
    const int k0 = step * BK, depth = depth_of(segment) - k0;
    const uint32_t a = shared + uint32_t(stage * TILE::STAGE_ELEMENTS * 2), b = a + TILE::BM * BK * 2;
    if (A_ACROSS) {
      load_tile<BK, TILE::BM, TILE::THREADS>(a, s.a + k0 * s.lda + at.m0, s.lda, depth, rows - at.m0, s.a_aligned);
    } else {
      load_tile<TILE::BM, BK, TILE::THREADS>(a, s.a + at.m0 * s.lda + k0, s.lda, rows - at.m0, depth, s.a_aligned);
    }
    if (B_ACROSS) {
      load_tile<BK, TILE::BN, TILE::THREADS>(b, s.b + k0 * s.ldb + at.n0, s.ldb, depth, g.n - at.n0, s.b_aligned);
    } else {
      load_tile<TILE::BN, BK, TILE::THREADS>(b, s.b + at.n0 * s.ldb + k0, s.ldb, g.n - at.n0, depth, s.b_aligned);
    }
    step++;
    while (segment < g.segments && step >= steps_of(segment)) segment++, step = 0;
  };

  float acc[MB][NB][4];
#pragma unroll
  for (int i = 0; i < MB; i++) {
#pragma unroll
    for (int j = 0; j < NB; j++) {
#pragma unroll
      for (int e = 0; e < 4; e++) acc[i][j][e] = 0.f;
    }
  }
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int m = warp / TILE::WARPS_N * TILE::WM, n = warp % TILE::WARPS_N * TILE::WN;
  const Reader<true, A_ACROSS, TILE::BM, MB> a_reader(m, lane);
  const Reader<false, B_ACROSS, TILE::BN, NB / 2> b_reader(n, lane);

#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < steps) load(s);
    ptx::cp_async_commit();
  }
  int stage = 0, filling = STAGES - 1;
#pragma unroll 1
  for (int t = 0; t < steps; t++) {
    ptx::cp_async_wait<STAGES - 2>();
    __syncthreads();  // step t has arrived for all, and all are done with the stage that is filled next
    if (t + STAGES - 1 < steps) load(filling);
    ptx::cp_async_commit();
    filling = filling == STAGES - 1 ? 0 : filling + 1;
    const uint32_t a = shared + uint32_t(stage * TILE::STAGE_ELEMENTS * 2), b = a + TILE::BM * BK * 2;
    stage = stage == STAGES - 1 ? 0 : stage + 1;
#pragma unroll
    for (int k = 0; k < BK / 16; k++) {
      uint32_t af[MB][4], bf[NB / 2][4];
#pragma unroll
      for (int i = 0; i < MB; i++) a_reader.read(af[i], a, i, k);
#pragma unroll
      for (int j = 0; j < NB / 2; j++) b_reader.read(bf[j], b, j, k);
#pragma unroll
      for (int i = 0; i < MB; i++) {
#pragma unroll
        for (int j = 0; j < NB; j++) ptx::mma_m16n8k16<T>(acc[i][j], af[i], bf[j / 2][j % 2 * 2], bf[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
  ptx::cp_async_wait<0>();
  epilogue.template operator()<T, TILE>(g, acc, at.m0 + m, at.n0 + n, rows);
}

// A warp's 32 pairs of columns of a row become 4 chunks of 16 bytes: the lanes of a row exchange pairs, so that lane q of the four
// holds all of block q of the four blocks that start at j.
__device__ __forceinline__ uint4 chunk_of(uint32_t (&r)[4]) {
  const int q = int(threadIdx.x) % 4;
#pragma unroll
  for (int p = 0; p < 4; p += 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, q & 1 ? r[p] : r[p + 1], 1);
    q & 1 ? r[p] = other : r[p + 1] = other;
  }
#pragma unroll
  for (int p = 0; p < 2; p++) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, q & 2 ? r[p] : r[p + 2], 2);
    q & 2 ? r[p] = other : r[p + 2] = other;
  }
  return make_uint4(r[0], r[1], r[2], r[3]);
}

}  // namespace gemm
}  // namespace ep
