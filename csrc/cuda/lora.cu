// Dropout of a low-rank update's input on the GPU: see csrc/cpu/lora.h for the hash. One pass, bound by memory: a thread has a run
// of WIDTH elements of a row, hashes the row once and each column, and drops by a selection, so that what is dropped is 0 whatever
// it was.
#include "lora.h"

#include "launch.cuh"
#include "vector.cuh"

namespace ep {
namespace cuda {
namespace {

__device__ __forceinline__ uint32_t mix(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
  h = (h ^ (h >> 13)) * 0xC2B2AE35u;
  return (h ^ (h >> 16)) & 0x7fffffffu;
}

// runs: of a row. A block has 256 consecutive runs of a (rows, runs) table.
template <class T, int WIDTH>
__global__ void __launch_bounds__(256) drop(const LoraDropout a, int64_t runs) {
  const int64_t run = int64_t(blockIdx.x) * 256 + threadIdx.x, row = run / runs, at = (run - row * runs) * WIDTH;
  if (row >= a.rows) return;
  float v[WIDTH];
  load_run<WIDTH>(reinterpret_cast<const T *>(a.x) + row * a.x_row + at, v);
  const uint32_t line = mix(uint32_t(row) * DROPOUT_ROW + a.low) + a.high;
#pragma unroll
  for (int e = 0; e < WIDTH; e++) {
    v[e] = int(mix(line + uint32_t(at + e) * DROPOUT_COLUMN)) >= a.threshold ? __fmul_rn(v[e], a.scale) : 0.f;
  }
  store_run(reinterpret_cast<T *>(a.out) + row * a.out_row + at, v);
}

template <class T, int WIDTH>
int run(const LoraDropout &a, void *stream) {
  const int64_t runs = a.width / WIDTH;
  return launch(&drop<T, WIDTH>, dim3(unsigned(ceil_div(a.rows * runs, 256))), 256, 0, stream, a, runs);
}

template <class T>
int of_width(const LoraDropout &a, void *stream) {
  constexpr int W = WIDE<T>;
  const bool whole = a.width % W == 0 && a.x_row % W == 0 && a.out_row % W == 0 && aligned16(a.x) && aligned16(a.out);
  return whole ? run<T, W>(a, stream) : run<T, 1>(a, stream);
}

}  // namespace

int lora_dropout(const LoraDropout &a, void *stream) {
  if (a.dtype == F32) return of_width<float>(a, stream);
  return a.dtype == BF16 ? of_width<bf16>(a, stream) : of_width<fp16>(a, stream);
}

}  // namespace cuda
}  // namespace ep
