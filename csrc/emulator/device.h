// The words of CUDA C++ that csrc/cuda uses, for the host compiler: qualifiers, vector types, built-in variables, intrinsics.
// A kernel is an ordinary function here; what the threads of a warp or a block do together goes through emulator.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

#define __global__ static
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

#define threadIdx (ep::emulator::current->index)
#define blockIdx (ep::emulator::block.index)
#define blockDim (ep::emulator::block.dim)
#define gridDim (ep::emulator::block.grid)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using std::max;
using std::min;

// ---- arithmetic -------------------------------------------------------------------------------------------------------------

inline float __uint_as_float(unsigned v) {
  float f;
  std::memcpy(&f, &v, 4);
  return f;
}
inline unsigned __float_as_uint(float f) {
  unsigned v;
  std::memcpy(&v, &f, 4);
  return v;
}
inline int __float_as_int(float f) { return int(__float_as_uint(f)); }
inline float __int_as_float(int v) { return __uint_as_float(unsigned(v)); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return std::exp(a); }
inline float __logf(float a) { return std::log(a); }
inline float rsqrtf(float a) { return 1.f / std::sqrt(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline int __float2int_rn(float a) { return int(std::nearbyint(a)); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(unsigned(v)); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = (uint64_t(y) << 32) | x;
  unsigned out = 0;
  for (int i = 0; i < 4; i++) out |= unsigned((bytes >> (8 * ((selector >> (4 * i)) & 7))) & 255) << (8 * i);
  return out;
}

// ---- memory -----------------------------------------------------------------------------------------------------------------

template <class T>
inline T __ldg(const T *p) {
  return *p;
}
template <class T>
inline T __ldcs(const T *p) {
  return *p;
}
template <class T>
inline void __stcs(T *p, T v) {
  *p = v;
}
// Threads of the emulator run one at a time, so a plain read and write is atomic.
template <class T>
inline T atomicAdd(T *p, T v) {
  const T old = *p;
  *p = old + v;
  return old;
}
template <class T>
inline T atomicMax(T *p, T v) {
  const T old = *p;
  *p = std::max(old, v);
  return old;
}
template <class T>
inline T atomicMin(T *p, T v) {
  const T old = *p;
  *p = std::min(old, v);
  return old;
}
template <class T>
inline T atomicOr(T *p, T v) {
  const T old = *p;
  *p = old | v;
  return old;
}
template <class T>
inline T atomicExch(T *p, T v) {
  const T old = *p;
  *p = v;
  return old;
}
template <class T>
inline T atomicCAS(T *p, T expected, T v) {
  const T old = *p;
  if (old == expected) *p = v;
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { ep::emulator::give_way(); }

// ---- together ---------------------------------------------------------------------------------------------------------------

inline void __syncthreads() { ep::emulator::barrier(0, int(ep::emulator::block.threads), true); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  ep::emulator::Vote v{};
  ep::emulator::together("syncwarp", mask, &v, [](void **, uint32_t) {});
}
template <class T>
inline T __shfl_sync(unsigned mask, T v, int lane, int width = 32) {
  const int self = int(ep::emulator::current->lane);
  return ep::emulator::shuffle(mask, v, (self & ~(width - 1)) | (lane & (width - 1)));
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32) {
  const int self = int(ep::emulator::current->lane), other = self ^ lanes;
  return ep::emulator::shuffle(mask, v, (other & ~(width - 1)) > (self & ~(width - 1)) ? self : other);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T v, unsigned lanes, int width = 32) {
  const int self = int(ep::emulator::current->lane), other = self - int(lanes);
  return ep::emulator::shuffle(mask, v, other < (self & ~(width - 1)) ? self : other);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T v, unsigned lanes, int width = 32) {
  const int self = int(ep::emulator::current->lane), other = self + int(lanes);
  return ep::emulator::shuffle(mask, v, other > (self | (width - 1)) ? self : other);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return ep::emulator::ballot(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return ep::emulator::ballot(mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return ep::emulator::ballot(mask, predicate != 0) == mask; }
inline unsigned __reduce_add_sync(unsigned mask, unsigned v) {
  return ep::emulator::reduce(mask, v, [](unsigned a, unsigned b) { return a + b; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned v) {
  return ep::emulator::reduce(mask, v, [](unsigned a, unsigned b) { return std::max(a, b); });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned v) {
  return ep::emulator::reduce(mask, v, [](unsigned a, unsigned b) { return a | b; });
}
