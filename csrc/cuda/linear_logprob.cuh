// What the two passes of linear_logprob share: the list of rows that count, their hidden states side by side, the arithmetic of a
// logit.
//
// Which rows count is known on the device alone (targets != -100), and nothing waits for it: kernels are launched for all rows,
// look at the count, and blocks that have nothing to do return.
#pragma once

#include "device.h"
#include "gemm_wgmma.cuh"
#include "linear_logprob.h"

#define EP_TRY(call)                          \
  do {                                        \
    if (int status_ = (call)) return status_; \
  } while (0)

namespace ep {
namespace cuda {

constexpr int64_t SKIPPED = -100;
constexpr float LOG2E = 1.44269504f, LOG2E_REST = 1.92596303e-8f;  // their sum is log2 e to 48 bits
constexpr float LN2 = 0.693147182f, LN2_REST = -1.90465421e-9f;
constexpr float NOTHING = -1e30f;  // the reference of a span without a column
using LogitTile = gemm::Large;

inline int64_t rounded(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Parts of a workspace, each at a multiple of 256 bytes. With a null base it only counts.
struct Parts {
  char *base;
  int64_t bytes;
  template <class P>
  P *take(int64_t count) {
    P *part = base == nullptr ? nullptr : reinterpret_cast<P *>(base + bytes);
    bytes += rounded(count * int64_t(sizeof(P)), 256);
    return part;
  }
};

inline dim3 grid_for(int64_t items, int64_t a_block = 256) {
  const int64_t blocks = ceil_div(items, a_block);
  return dim3(unsigned(blocks < 1 ? 1 : blocks < 8192 ? blocks : 8192));
}

// z log2(e) - reference, to the precision of z: the two large numbers cancel in the first fma, which rounds once.
__device__ __forceinline__ float exponent_of(float z, float reference) { return fmaf(z, LOG2E_REST, fmaf(z, LOG2E, -reference)); }
// 2^d for an integer d <= 0, exactly; 0 below the normal numbers.
__device__ __forceinline__ float power_of_two(float d) {
  if (d != d) return d;
  return d < -126.f ? 0.f : __int_as_float((int(d) + 127) << 23);
}

__device__ __forceinline__ float capped(float u, float cap) { return cap > 0.f ? cap * tanhf(u / cap) : u; }
__device__ __forceinline__ float slope_of(float z, float cap) {
  if (!(cap > 0.f)) return 1.f;
  const float t = z / cap;
  return fmaf(-t, t, 1.f);
}

namespace {

// The product that makes logits, and what becomes of them in its epilogue.
template <class T, class EPILOGUE>
int make_logits(const gemm::Problem &g, const EPILOGUE &epilogue, void *stream) {
  Device device;
  EP_TRY(current_device(device));
  const int64_t tiles = ceil_div(g.m, LogitTile::BM) * ceil_div(g.n, LogitTile::BN);
  if (tiles == 0) return EP_OK;
  if (device.wgmma && gemm::wgmma_takes(g, false, false)) {
    return gemm::start_wgmma<T, 256, false, false>(g, epilogue, 1, device.multiprocessors, stream);
  }
  return launch(&gemm::product<T, LogitTile, false, false, EPILOGUE>, dim3(unsigned(tiles)), LogitTile::THREADS,
                LogitTile::SHARED_BYTES, stream, g, epilogue);
}

// rows: the positions of targets that count, in order; *count: how many. One block.
__global__ void list_rows(const int64_t *targets, int64_t tokens, int *rows, int *count) {
  int *sums = shared_memory<int>();  // of the warps
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32, warps = int(blockDim.x) / 32;
  int found = 0;
  for (int64_t start = 0; start < tokens; start += blockDim.x) {
    const bool keep = start + thread < tokens && targets[start + thread] != SKIPPED;
    const unsigned votes = __ballot_sync(0xffffffffu, keep);
    if (lane == 0) sums[warp] = __popc(votes);
    __syncthreads();
    int before = found;
    for (int w = 0; w < warps; w++) {
      if (w < warp) before += sums[w];
      found += sums[w];
    }
    if (keep) rows[before + __popc(votes & ((1u << lane) - 1))] = int(start + thread);
    __syncthreads();
  }
  if (thread == 0) *count = found;
}

// gathered (n, ld) = rows row0, row0 + 1, ... of the list, of hidden; 8 elements a thread. n = how many of `most` there are.
__global__ void gather_rows(const uint16_t *hidden, int64_t hidden_row, const int *rows, const int *count, int64_t row0,
                            int64_t most, int width, uint16_t *gathered, int64_t ld) {
  const int64_t left = *count - row0, n = left < most ? left : most, chunks = ld / 8, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n * chunks; i += step) {
    const int64_t row = i / chunks, column = i % chunks * 8;
    const uint16_t *from = hidden + rows[row0 + row] * hidden_row + column;
    for (int e = 0; e < 8; e++) gathered[row * ld + column + e] = column + e < width ? from[e] : uint16_t(0);
  }
}

}  // namespace

}  // namespace cuda
}  // namespace ep
