// See planted.h. Small kernels of mbarriers, TMA and wgmma, right or with one thing wrong.
//
// matmul: warps 0 to 3 are a warpgroup that multiplies, 64 x 128; warp 4 brings the operands, two stages of 64 in k.
//   stage   a: 64 rows of 128 bytes | b: 128 rows of 128 bytes; all in the 128-byte swizzle
//   full    of a stage: its bytes have come. empty: the four warps are done with it.
// halves: TMA in, doubled by the threads, TMA out.
#include <cstring>

#include "../cuda/hopper.cuh"
#include "../cuda/launch.cuh"
#include "planted.h"

namespace ep {
namespace emulator {

namespace {

enum Fault {
  NONE,
  FULL_WAIT,
  PARITY,
  LATE_WAIT,
  NO_WAIT,
  RELEASE,
  STRIDE,
  SWIZZLE,
  LESS_BYTES,
  MORE_BYTES,
  FENCE,
  INIT_FENCE,
  INIT_BARRIER,
  TOUCH,
  WARP_LEFT,
  REGISTERS,
  OVERWRITE,
  ASYNC_FENCE,
  STORE_WAIT,
  REGISTER_COUNT,
  EMPTY_COUNT,
};
constexpr const char *NAMES[] = {
    "",          "full wait",  "parity",     "late wait",   "no wait",    "release",        "stride",
    "swizzle",   "less bytes", "more bytes", "fence",       "init fence", "init barrier",   "touch",
    "warp left", "registers",  "overwrite",  "async fence", "store wait", "register count", "empty count"};

constexpr int M = 64, N = 128, K = 64, A_BYTES = M * 128, STAGE = A_BYTES + N * 128, STAGES = 2;
constexpr int MATMUL_SHARED = STAGES * STAGE + 64;

struct Matrices {
  TensorMap a, b;
};

template <class T, bool ACROSS, bool REGISTERS_A>
__global__ void __launch_bounds__(160) matmul(int fault, const __grid_constant__ Matrices of, float *c, int n, int k) {
#if EP_SM90A
  const uint32_t shared = ptx::shared_address(shared_memory<char>()), barriers = shared + STAGES * STAGE;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, m0 = int(blockIdx.y) * M, n0 = int(blockIdx.x) * N;
  const auto full = [&](int stage) { return barriers + uint32_t(stage * 8); };
  const auto empty = [&](int stage) { return barriers + uint32_t((STAGES + stage) * 8); };
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) ptx::mbarrier_init(full(s), 1), ptx::mbarrier_init(empty(s), fault == EMPTY_COUNT ? 5 : 4);
    if (fault != INIT_FENCE) ptx::fence_mbarrier_init();
  }
  if (fault != INIT_BARRIER) __syncthreads();
  const int steps = k / K;

  if (warp == 4) {
    if (fault == REGISTER_COUNT) ptx::more_registers<240>();
    ptx::fewer_registers<24>();
    if (ptx::elected()) {
      for (int step = 0; step < steps; step++) {
        const int stage = step % STAGES, round = step / STAGES;
        ptx::mbarrier_wait(empty(stage), (round & 1) ^ 1);
        const int bytes = fault == LESS_BYTES ? STAGE - 4096 : fault == MORE_BYTES ? STAGE + 128 : STAGE;
        ptx::mbarrier_arrive_expect(full(stage), bytes);
        const uint32_t a = shared + uint32_t(stage * STAGE), b = a + A_BYTES;
        if (ACROSS) {
          ptx::tma_load(a, of.a, full(stage), m0, step * K);
          ptx::tma_load(b, of.b, full(stage), n0, step * K);
          ptx::tma_load(b + K * 128, of.b, full(stage), n0 + 64, step * K);
        } else {
          ptx::tma_load(a, of.a, full(stage), step * K, m0);
          ptx::tma_load(b, of.b, full(stage), step * K, n0);
        }
      }
    }
    return;
  }

  float sum[N / 8][4];
  uint32_t held[K / 16][4];
  for (int step = 0; step < steps; step++) {
    const int stage = step % STAGES, round = step / STAGES;
    if (fault != FULL_WAIT) ptx::mbarrier_wait(full(stage), (round & 1) ^ (fault == PARITY ? 1 : 0));
    const uint32_t at = shared + uint32_t(stage * STAGE);
    const int stride = fault == STRIDE ? 512 : 1024;
    uint64_t a = ptx::matrix(at, 0, stride), b = ptx::matrix(at + A_BYTES, ACROSS ? K * 128 : 0, 1024);
    if (fault == SWIZZLE) b += uint64_t(1) << 62;  // 64 bytes
    if (REGISTERS_A) {
      for (int i = 0; i < K / 16; i++) {
        const int row = warp * 16 + lane % 16, chunk = 2 * i + lane / 16;
        ptx::ldmatrix_x4(held[i], at + uint32_t(row * 128 + (chunk ^ row % 8) * 16));
      }
    }
    if (fault != FENCE) ptx::wgmma_fence();
    for (int i = 0; i < K / 16; i++) {
      if (fault == WARP_LEFT && warp == 2 && step == steps - 1 && i == 3) continue;
      if (REGISTERS_A) {
        ptx::wgmma<T, ACROSS>(sum, held[i], ptx::moved(b, ACROSS ? i * 2048 : i * 32), step + i > 0);
      } else {
        ptx::wgmma<T, ACROSS, ACROSS>(sum, ptx::moved(a, ACROSS ? i * 2048 : i * 32), ptx::moved(b, ACROSS ? i * 2048 : i * 32),
                                      step + i > 0);
      }
    }
    ptx::wgmma_commit();
    if (fault == TOUCH) sum[1][2] += 1.f;
    if (fault == REGISTERS) held[1][2] = 0;
    if (fault == RELEASE || (step > 0 && !REGISTERS_A)) {
      if (fault != RELEASE) ptx::wgmma_wait<1>();
      if (lane == 0) ptx::mbarrier_arrive(empty(fault == RELEASE ? stage : (step - 1) % STAGES));
    }
    if (REGISTERS_A) {
      ptx::wgmma_wait<0>(sum);
      if (lane == 0) ptx::mbarrier_arrive(empty(stage));
    }
  }
  if (fault != LATE_WAIT && fault != NO_WAIT) ptx::wgmma_wait<0>(sum);
  if (fault == OVERWRITE) shared_memory<char>()[STAGES * STAGE] = 1;
  for (int j = 0; j < N / 8; j++) {
    for (int e = 0; e < 4; e++) {
      c[int64_t(m0 + warp * 16 + lane / 4 + e / 2 * 8) * n + n0 + j * 8 + lane % 4 * 2 + e % 2] = sum[j][e];
    }
  }
  if (fault == OVERWRITE) ptx::mbarrier_wait(full(0), 0);
  if (fault == LATE_WAIT) ptx::wgmma_wait<0>(sum);
#endif
}

// y[:, :] = 2 x of 64 x 64 of bfloat16 a block, by blocks of a (rows, columns) matrix that need not be whole.
__global__ void __launch_bounds__(64) twice(int fault, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y) {
#if EP_SM90A
  bf16 *tile = shared_memory<bf16>();
  const uint32_t shared = ptx::shared_address(tile), barrier = shared + 64 * 128;
  const int thread = int(threadIdx.x), row = int(blockIdx.y) * 64, column = int(blockIdx.x) * 64;
  if (thread == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(barrier, 64 * 128);
    ptx::tma_load(shared, x, barrier, column, row);
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  for (int i = 0; i < 64; i++) tile[thread * 64 + i] = from_float<bf16>(2.f * to_float(tile[thread * 64 + i]));
  if (fault != ASYNC_FENCE) ptx::fence_async();
  __syncthreads();
  if (thread == 63) {
    ptx::tma_store(y, shared, column, row);
    ptx::bulk_commit();
    if (fault != STORE_WAIT) ptx::bulk_wait<0>();
  }
#endif
}

int number(const char *fault) {
  for (int i = 0; i < int(sizeof NAMES / sizeof *NAMES); i++) {
    if (std::strcmp(fault, NAMES[i]) == 0) return i;
  }
  return -1;
}

int map_matrix(TensorMap &map, const uint16_t *data, int64_t rows, int64_t columns, int box_rows) {
  const uint64_t extent[] = {uint64_t(columns), uint64_t(rows)}, stride[] = {uint64_t(columns) * 2};
  const uint32_t box[] = {64, uint32_t(box_rows)};
  return make_tensor_map(map, data, 2, extent, stride, box);
}

template <class T>
int start(int fault, const char *kind, const Matrices &of, float *c, dim3 grid, int n, int k) {
  if (std::strcmp(kind, "across") == 0)
    return launch(&matmul<T, true, false>, grid, 160, MATMUL_SHARED, nullptr, fault, of, c, n, k);
  if (std::strcmp(kind, "registers") == 0)
    return launch(&matmul<T, false, true>, grid, 160, MATMUL_SHARED, nullptr, fault, of, c, n, k);
  return launch(&matmul<T, false, false>, grid, 160, MATMUL_SHARED, nullptr, fault, of, c, n, k);
}

}  // namespace

int planted_wgmma(const char *fault, const char *kind, const uint16_t *a, const uint16_t *b, float *c, int64_t m, int64_t n,
                  int64_t k, bool fp16) {
  const int which = number(fault);
  if (which < 0 || m % M != 0 || n % N != 0 || k % K != 0 || m * n * k == 0) {
    return fail(EP_INVALID_ARGUMENT, "planted_wgmma: no such fault or shape");
  }
  const bool across = std::strcmp(kind, "across") == 0;
  Matrices of;
  if (int status = across ? map_matrix(of.a, a, k, m, K) : map_matrix(of.a, a, m, k, M)) return status;
  if (int status = across ? map_matrix(of.b, b, k, n, K) : map_matrix(of.b, b, n, k, N)) return status;
  const dim3 grid(unsigned(n / N), unsigned(m / M));
  return fp16 ? start<ep::fp16>(which, kind, of, c, grid, int(n), int(k)) : start<bf16>(which, kind, of, c, grid, int(n), int(k));
}

int planted_twice(const char *fault, const uint16_t *x, uint16_t *y, int64_t rows, int64_t columns) {
  const int which = number(fault);
  if (which < 0) return fail(EP_INVALID_ARGUMENT, "planted_twice: no such fault");
  TensorMap from, to;
  if (int status = map_matrix(from, x, rows, columns, 64)) return status;
  if (int status = map_matrix(to, y, rows, columns, 64)) return status;
  return launch(&twice, dim3(unsigned(ceil_div(columns, 64)), unsigned(ceil_div(rows, 64))), 64, 64 * 128 + 8, nullptr, which, from,
                to);
}

}  // namespace emulator
}  // namespace ep
