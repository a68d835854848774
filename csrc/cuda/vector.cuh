// Runs of WIDTH elements between global memory and registers, as floats: whole 16-byte accesses where WIDTH > 1.
#pragma once

#include "ptx.cuh"

namespace ep {

// A run that fills 16 bytes of T.
template <class T>
constexpr int WIDE = 16 / int(sizeof(T));

template <class T>
__device__ __forceinline__ void unpack16(uint4 raw, float *v) {
  const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 pair = unpack<T>(word[i]);
    v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
  }
}
template <>
__device__ __forceinline__ void unpack16<float>(uint4 raw, float *v) {
  v[0] = __uint_as_float(raw.x), v[1] = __uint_as_float(raw.y), v[2] = __uint_as_float(raw.z), v[3] = __uint_as_float(raw.w);
}
template <class T>
__device__ __forceinline__ uint4 pack16(const float *v) {
  return make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
}
template <>
__device__ __forceinline__ uint4 pack16<float>(const float *v) {
  return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
}

// v = p[0 .. WIDTH). WIDTH is 1 or a multiple of WIDE<T>; ONCE: it will not be read again.
template <int WIDTH, bool ONCE = false, class T>
__device__ __forceinline__ void load_run(const T *p, float (&v)[WIDTH]) {
  if constexpr (WIDTH == 1) {
    v[0] = to_float(*p);
  } else {
    static_assert(WIDTH % WIDE<T> == 0, "whole accesses");
#pragma unroll
    for (int i = 0; i < WIDTH; i += WIDE<T>) {
      const uint4 *at = reinterpret_cast<const uint4 *>(p + i);
      unpack16<T>(ONCE ? ptx::load_once(at) : *at, v + i);
    }
  }
}
template <int WIDTH, class T>
__device__ __forceinline__ void store_run(T *p, const float (&v)[WIDTH]) {
  if constexpr (WIDTH == 1) {
    *p = from_float<T>(v[0]);
  } else {
#pragma unroll
    for (int i = 0; i < WIDTH; i += WIDE<T>) *reinterpret_cast<uint4 *>(p + i) = pack16<T>(v + i);
  }
}

// The number nearest to x that a T holds.
template <class T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, lanes));
  return v;
}
// Sum over a block of whole warps, in a fixed order, the same in every thread. `room`: 32 floats of shared memory, which may be
// used again only after another barrier.
__device__ __forceinline__ float block_sum(float v, float *room) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
  v = warp_sum(v);
  if (warps == 1) return v;
  if (lane == 0) room[warp] = v;
  __syncthreads();
  return warp_sum(lane < warps ? room[lane] : 0.f);
}

inline bool aligned16(const void *p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace ep
