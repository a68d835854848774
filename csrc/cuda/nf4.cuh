// Numbers of 4 bits on the device: code * scale in float32, rounded by whoever keeps them.
#pragma once

#include "launch.cuh"
#include "nf4.h"

namespace ep {
namespace cuda {

__device__ __forceinline__ float scale_of(const Nf4Tensor &w, int64_t block) {
  if (w.absmax != nullptr) return w.absmax[block];
  return __fadd_rn(__fmul_rn(w.nested_code[w.absmax8[block]], w.nested_absmax[block >> 8]), w.offset);
}

// The codebook in shared memory, [16][32]: entry i of lane l lies in bank l.
struct Codebook {
  static constexpr int SHARED_BYTES = 16 * 32 * 4;
  const float *mine;

  // All threads of the block.
  __device__ __forceinline__ explicit Codebook(const Nf4Tensor &w) {
    float *table = shared_memory<float>();
    if (threadIdx.x < 32) {
#pragma unroll
      for (int i = 0; i < 16; i++) table[i * 32 + threadIdx.x] = w.code[i];
    }
    __syncthreads();
    mine = table + threadIdx.x % 32;
  }
  // Of the low four bits of `bits`.
  __device__ __forceinline__ float number(uint32_t bits, float scale) const { return __fmul_rn(mine[(bits & 15) * 32], scale); }
};

}  // namespace cuda
}  // namespace ep
