// See planted.h. The product is the pattern of every matrix kernel here: cp.async into two buffers, XOR-swizzled rows of 64 bytes,
// ldmatrix, mma.m16n8k16. A block makes 64 x 64 with four warps of 32 x 32.
//   shared: [2 buffers][a: 64 rows x 64 bytes | b: 64 rows x 64 bytes]; 16-byte chunk c of row r lies at chunk c ^ (r / 2 % 4)
#include "planted.h"

#include <cstring>

#include "../cuda/launch.cuh"

namespace ep {
namespace emulator {

namespace {

enum Fault { NONE, BARRIER, WAIT, STORE, FRAGMENT, SWIZZLE, ALIGNMENT, DIVERGENCE, MASK, SYNCWARP, ARRIVE, GLOBAL, SPIN };

constexpr int TILE = 64, DEPTH = 32, ROW = DEPTH * 2, BUFFER = 2 * TILE * ROW;

__device__ __forceinline__ uint32_t chunk_at(int row, int chunk, bool swizzle) {
  return uint32_t(row * ROW + (swizzle ? chunk ^ (row / 2 % 4) : chunk) * 16);
}

template <class T>
__global__ void __launch_bounds__(128) matmul(int fault, const uint16_t *a, const uint16_t *b, float *c, int n, int k) {
  const uint32_t shared = ptx::shared_address(shared_memory<char>());
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int m0 = int(blockIdx.y) * TILE, n0 = int(blockIdx.x) * TILE;
  const int wm = warp / 2 * 32, wn = warp % 2 * 32;
  const bool swizzle = fault != SWIZZLE;

  auto load = [&](int step) {
    const uint32_t to = shared + uint32_t(step % 2 * BUFFER);
    for (int i = thread; i < TILE * 4; i += 128) {
      const int row = i / 4, chunk = i % 4;
      ptx::cp_async_16(to + chunk_at(row, chunk, swizzle), a + int64_t(m0 + row) * k + step * DEPTH + chunk * 8, true);
      ptx::cp_async_16(to + TILE * ROW + chunk_at(row, chunk, swizzle), b + int64_t(n0 + row) * k + step * DEPTH + chunk * 8, true);
    }
    ptx::cp_async_commit();
  };

  float sum[2][4][4] = {};
  const int steps = k / DEPTH;
  load(0);
  for (int step = 0; step < steps; step++) {
    if (step + 1 < steps) load(step + 1);
    if (fault != WAIT) step + 1 < steps ? ptx::cp_async_wait<1>() : ptx::cp_async_wait<0>();
    if (fault != BARRIER) __syncthreads();
    const uint32_t from = shared + uint32_t(step % 2 * BUFFER) + (fault == ALIGNMENT ? 2 : 0);
    for (int kk = 0; kk < 2; kk++) {
      uint32_t fa[2][4], fb[2][4];
      for (int i = 0; i < 2; i++) {
        const int row = wm + i * 16 + lane % 16, chunk = kk * 2 + lane / 16;
        ptx::ldmatrix_x4(fa[i], from + chunk_at(row, chunk, swizzle));
      }
      for (int j = 0; j < 2; j++) {
        const int row = wn + j * 16 + lane % 8 + lane / 16 * 8, chunk = kk * 2 + lane / 8 % 2;
        ptx::ldmatrix_x4(fb[j], from + TILE * ROW + chunk_at(row, chunk, swizzle));
      }
      for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 4; j++) {
          const int half = fault == FRAGMENT ? 1 - j % 2 : j % 2;
          ptx::mma_m16n8k16<T>(sum[i][j], fa[i], fb[j / 2][2 * half], fb[j / 2][2 * half + 1]);
        }
      }
    }
    if (fault != BARRIER) __syncthreads();
  }
  if (fault == STORE) shared_memory<char>()[2 * BUFFER + thread] = 0;
  for (int i = 0; i < 2; i++) {
    for (int j = 0; j < 4; j++) {
      const int row = m0 + wm + i * 16 + lane / 4, column = n0 + wn + j * 8 + lane % 4 * 2;
      float *at = c + int64_t(row) * n + column;
      at[0] = sum[i][j][0], at[1] = sum[i][j][1];
      at[8 * n] = sum[i][j][2], at[8 * n + 1] = sum[i][j][3];
    }
  }
  if (fault == GLOBAL && thread == 0) c[int64_t(gridDim.y) * TILE * n] = 0.f;  // one past the end
}

// Warps 0 to 2 add, warp 3 only receives: a named barrier between them.
__global__ void __launch_bounds__(128) sum(int fault, const float *x, float *y) {
  float *part = shared_memory<float>();  // (4), (32)
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  float v = x[blockIdx.x * 128 + threadIdx.x];
  if (fault == DIVERGENCE && warp == 1) return;
  if (fault == SPIN && thread == 0) {  // for a block that would have to come first
    while (ptx::load_acquire(reinterpret_cast<const int *>(y)) != 1) {
    }
  }
  if (fault == MASK && lane == 5) {
    __syncwarp();
    return;
  }
  for (int o = 16; o > 0; o /= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
  if (__ballot_sync(0xffffffffu, lane < 7) != 127u) v = -1.f;
  if (lane == 0) part[warp] = v;
  if (warp < 3) {
    if (fault != ARRIVE) ptx::named_barrier_arrive(1, 128);
  } else {
    ptx::named_barrier_sync(1, 128);
    part[4 + lane] = lane < 4 ? part[lane] : 0.f;
    if (fault != SYNCWARP) __syncwarp();
    if (lane == 0 || lane == 31) {  // both ends of the warp: whatever the order of lanes, one of them needs the barrier
      float total = 0.f;
      for (int i = 0; i < 32; i++) total += part[4 + i];
      y[2 * blockIdx.x + lane / 31] = total;
    }
  }
  __syncthreads();
}

template <class T>
__global__ void convert(T *bits, float *wide, int count, bool narrow) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  if (narrow) {
    bits[i] = from_float<T>(wide[i]);
  } else {
    wide[i] = to_float(bits[i]);
  }
}

int number(const char *fault) {
  const char *names[] = {"",           "barrier", "wait",     "store",  "fragment", "swizzle", "alignment",
                         "divergence", "mask",    "syncwarp", "arrive", "global",   "spin"};
  for (int i = 0; i < 13; i++) {
    if (std::strcmp(fault, names[i]) == 0) return i;
  }
  return -1;
}

}  // namespace

int planted_matmul(const char *fault, const uint16_t *a, const uint16_t *b, float *c, int64_t m, int64_t n, int64_t k, bool fp16) {
  const int which = number(fault);
  if (which < 0 || m % TILE != 0 || n % TILE != 0 || k % DEPTH != 0 || m * n * k == 0) {
    return fail(EP_INVALID_ARGUMENT, "planted_matmul: no such fault or shape");
  }
  const dim3 grid(unsigned(n / TILE), unsigned(m / TILE));
  return launch(fp16 ? &matmul<ep::fp16> : &matmul<bf16>, grid, 128, 2 * BUFFER, nullptr, which, a, b, c, n, k);
}

int planted_sum(const char *fault, const float *x, float *y, int64_t blocks) {
  const int which = number(fault);
  if (which < 0) return fail(EP_INVALID_ARGUMENT, "planted_sum: no such fault");
  return launch(&sum, dim3(unsigned(blocks)), 128, 36 * sizeof(float), nullptr, which, x, y);
}

int planted_convert(uint16_t *bits, float *wide, int64_t count, bool fp16, bool narrow) {
  const dim3 grid(unsigned(ceil_div(count, 256)));
  if (fp16) return launch(&convert<ep::fp16>, grid, 256, 0, nullptr, reinterpret_cast<ep::fp16 *>(bits), wide, count, narrow);
  return launch(&convert<bf16>, grid, 256, 0, nullptr, reinterpret_cast<bf16 *>(bits), wide, count, narrow);
}

}  // namespace emulator
}  // namespace ep
