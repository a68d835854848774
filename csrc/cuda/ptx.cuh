// All inline PTX, one small function per instruction, for sm_80 and up. With EP_EMULATED the same functions have host bodies
// (csrc/emulator/ptx_emulated.h), so every file of this folder also runs on a CPU, in tests.
//
// Fragments of mma.m16n8k16, for lane = 4 g + t (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"):
//   a[0] (row g, k 2t, 2t+1)   a[1] (row g+8, k 2t, 2t+1)   a[2] (row g, k 2t+8, 2t+9)   a[3] (row g+8, k 2t+8, 2t+9)
//   b0 (k 2t, 2t+1, column g)  b1 (k 2t+8, 2t+9, column g)
//   d[0], d[1] (row g, columns 2t, 2t+1)                    d[2], d[3] (row g+8, columns 2t, 2t+1)
// The lower half of a register is the element of the lower index. Shared memory is addressed with 32 bits: shared_address(p) once,
// byte offsets added to it afterwards.
#pragma once

#include <cstdint>

#include "element.cuh"

#if defined(EP_EMULATED)
#include "../emulator/ptx_emulated.h"
#else

namespace ep {

// The block's dynamic shared memory, of the size that launch() was given; aligned to 1024 bytes, as TMA's swizzle wants.
template <class T>
__device__ __forceinline__ T *shared_memory() {
  extern __shared__ __align__(1024) unsigned char ep_shared[];
  return reinterpret_cast<T *>(ep_shared);
}

namespace ptx {

// ---- numbers ----------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint16_t bf16_bits(float f) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  return bits;
}
__device__ __forceinline__ float bf16_value(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
__device__ __forceinline__ uint16_t fp16_bits(float f) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  return bits;
}
__device__ __forceinline__ float fp16_value(uint16_t bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
}
// Two numbers rounded into one register, `low` in its lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Approximations of the special function unit; their relative error is about 2^-22 (tanh: 2^-11).
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_sqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The same number, of which the compiler knows nothing: what is worked out from it stays where it is used, and holds no registers
// through a loop.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- shared memory and warp products ----------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void *pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// Matrices of 8 x 8 16-bit elements: lane 8 i + j gives the address of row j of matrix i, 16 bytes, 16-byte aligned; r[i] is the
// fragment of matrix i: row lane / 4, columns 2 (lane % 4) and the next (with trans: of the transposed matrix).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(row) : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(row) : "memory");
}

// d += a b, T = bf16 or fp16.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<fp16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- copies -----------------------------------------------------------------------------------------------------------------

// Global to shared memory in the background, both addresses multiples of the size; zeros where not `valid`, and then the source is
// not read. The data is there for the thread after cp_async_wait, for the block after a barrier that follows it.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void *from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
// The first `bytes` (0 to 16) of 16, then zeros; what is not copied is not read.
__device__ __forceinline__ void cp_async_16_first(uint32_t to, const void *from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_4(uint32_t to, const void *from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most LEFT groups of this thread are under way.
template <int LEFT>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Data that is read or written once: it does not push other data out of the caches.
__device__ __forceinline__ uint4 load_once(const uint4 *p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");  // a result may lie over its input: no store may move above this
  return v;
}
__device__ __forceinline__ void store_once(uint4 *p, uint4 v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
// *p += v in global memory, in no particular order: not for results that must have the same bits every time.
__device__ __forceinline__ void red_add(float *p, float v) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(p), "f"(v) : "memory");
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int RED_WIDTH = 4;  // neighbours that one instruction adds
// The same for four neighbours, 16-byte aligned; sm_90 and up.
__device__ __forceinline__ void red_add_x4(float *p, const float (&v)[4]) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
}
#else
constexpr int RED_WIDTH = 1;
__device__ __forceinline__ void red_add_x4(float *, const float (&)[4]) {}
#endif
// A counter in global memory by which blocks wait for each other: what was written before add_release (with __threadfence, and by
// the whole block with a barrier too) is seen after a load_acquire that sees the sum.
__device__ __forceinline__ int load_acquire(const int *p) {
  int v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void add_release(int *p, int v) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// ---- barriers ---------------------------------------------------------------------------------------------------------------

// Barrier `id` (1 to 15; 0 is __syncthreads) of `threads` threads, a multiple of 32: those that sync wait, those that arrive do
// not.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace ptx
}  // namespace ep

#endif

// ---- one name for every element type ----------------------------------------------------------------------------------------

namespace ep {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return ptx::bf16_value(x.bits); }
__device__ __forceinline__ float to_float(fp16 x) { return ptx::fp16_value(x.bits); }

template <class T>
struct Rounding;  // how a T is made of floats
template <>
struct Rounding<float> {
  static __device__ __forceinline__ float one(float x) { return x; }
};
template <>
struct Rounding<bf16> {
  static __device__ __forceinline__ bf16 one(float x) { return bf16{ptx::bf16_bits(x)}; }
  static __device__ __forceinline__ uint32_t pair(float low, float high) { return ptx::pack_bf16(low, high); }
};
template <>
struct Rounding<fp16> {
  static __device__ __forceinline__ fp16 one(float x) { return fp16{ptx::fp16_bits(x)}; }
  static __device__ __forceinline__ uint32_t pair(float low, float high) { return ptx::pack_fp16(low, high); }
};
template <class T>
__device__ __forceinline__ T from_float(float x) {
  return Rounding<T>::one(x);
}
// Two numbers in one register, as mma and ldmatrix have them; T = bf16 or fp16.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  return Rounding<T>::pair(low, high);
}
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  return make_float2(to_float(T{uint16_t(pair)}), to_float(T{uint16_t(pair >> 16)}));
}

}  // namespace ep
