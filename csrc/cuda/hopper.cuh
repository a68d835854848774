// What sm_90a adds to ptx.cuh, one small function per instruction: mbarriers, the tensor memory accelerator (TMA), wgmma,
// setmaxnreg. With EP_EMULATED the same functions have host bodies (cs../emulator/hopper_emulated.h).
//
// A kernel that uses them has its body between `#if EP_SM90A` and `#endif`: other architectures compile it empty.
//
// Matrices in shared memory are rows of 128 bytes (64 elements of 16 bits) in the 128-byte swizzle, as TMA writes them: chunk c of
// 16 bytes of row r lies at chunk c ^ (r % 8); blocks of eight rows begin at multiples of 1024 bytes.
//
//   along k    a row is a row of A or column of B, 64 deep. stride = bytes from 8 rows to the next 8 (1024); a step of 16 in k is
//   32
//              bytes further in the row. `leading` is not used.
//   across     a row is one k, 64 wide in m or n. stride = bytes from 8 k to the next 8; leading = bytes from 64 of m or n to the
//              next 64; a step of 16 in k is 2 strides.
//
// (PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout": canonical layouts ((8,m),(T,2)):((8T,SBO),(1,T)) and
// ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO)), T = 8 elements, the address XORed with its bits 7 to 9 at bits 4 to 6.)
//
// Accumulators of m64nN: warp w of the warpgroup has rows 16 w to 16 w + 15, and of those the fragments of mma.m16n8k16: d[j][e] is
// row lane / 4 + e / 2 * 8, column 8 j + lane % 4 * 2 + e % 2. A in registers is A of mma.m16n8k16 for the warp's 16 rows.
#pragma once

#include "ptx.cuh"

#if defined(EP_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define EP_SM90A 1
#else
#define EP_SM90A 0
#endif

#if defined(EP_EMULATED)
#include "../emulator/hopper_emulated.h"
#else

#include <cuda.h>  // CUtensorMap; nothing of it is linked

#include "wgmma.cuh"

namespace ep {

using TensorMap = CUtensorMap;

namespace ptx {

// ---- mbarriers --------------------------------------------------------------------------------------------------------------

// An mbarrier is 8 bytes of shared memory. A phase is complete when `count` arrivals have come and every byte that was expected
// has. One thread initialises, fences and meets the others at a barrier before anybody uses it.
__device__ __forceinline__ void mbarrier_init(uint32_t mbarrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(mbarrier), "r"(count) : "memory");
}
__device__ __forceinline__ void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void mbarrier_arrive(uint32_t mbarrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(mbarrier) : "memory");
}
// One arrival, and `bytes` more to wait for.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t mbarrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mbarrier), "r"(bytes) : "memory");
}
// Until the phase of this parity is complete: 0 for the first, 1 for the second, ...; 1 on a new mbarrier does not wait.
__device__ __forceinline__ void mbarrier_wait(uint32_t mbarrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(mbarrier),
      "r"(parity)
      : "memory");
}
// What this thread has written to shared memory will be seen by TMA and wgmma; a barrier must follow for others' sake.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// True in one lane of a whole warp.
__device__ __forceinline__ bool elected() {
  uint32_t one;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(one));
  return one != 0;
}

// ---- TMA --------------------------------------------------------------------------------------------------------------------

// A box of a tensor into shared memory (128-byte aligned; 1024 with the swizzle), zeros where it lies beyond the tensor. One thread
// asks for it; the whole box counts for the mbarrier's bytes. Coordinates from the innermost dimension on.
__device__ __forceinline__ void tma_prefetch(const TensorMap &map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t to, const TensorMap &map, uint32_t mbarrier, int x0, int x1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(&map), "r"(mbarrier), "r"(x0), "r"(x1)
      : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t to, const TensorMap &map, uint32_t mbarrier, int x0, int x1, int x2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(&map), "r"(mbarrier), "r"(x0), "r"(x1), "r"(x2)
      : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t to, const TensorMap &map, uint32_t mbarrier, int x0, int x1, int x2, int x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
          to),
      "l"(&map), "r"(mbarrier), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
      : "memory");
}
// The other way, without what lies beyond the tensor. Shared memory must stay as it is until bulk_wait.
__device__ __forceinline__ void tma_store(const TensorMap &map, uint32_t from, int x0, int x1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map), "r"(from), "r"(x0),
               "r"(x1)
               : "memory");
}
__device__ __forceinline__ void tma_store(const TensorMap &map, uint32_t from, int x0, int x1, int x2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map), "r"(from), "r"(x0),
               "r"(x1), "r"(x2)
               : "memory");
}
__device__ __forceinline__ void tma_store(const TensorMap &map, uint32_t from, int x0, int x1, int x2, int x3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map), "r"(from),
               "r"(x0), "r"(x1), "r"(x2), "r"(x3)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most LEFT groups of this thread are under way.
template <int LEFT>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(LEFT) : "memory");
}

// ---- registers --------------------------------------------------------------------------------------------------------------

// Registers of each thread of the warpgroup from here on: a multiple of 8. More waits until others have given theirs back.
template <int COUNT>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- wgmma ------------------------------------------------------------------------------------------------------------------

// By the four warps of a warpgroup: wgmma_fence, products, wgmma_commit, and wgmma_wait before the accumulators (and an A in
// registers) may be touched or the operands in shared memory overwritten.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Tells the compiler that these registers change here, so that it moves no use of them across.
template <int BLOCKS>
__device__ __forceinline__ void wgmma_hold(float (&d)[BLOCKS][4]) {
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
}
template <int BLOCKS>
__device__ __forceinline__ void wgmma_hold(uint32_t (&a)[BLOCKS][4]) {
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
}
// Until at most LEFT groups of this warp are under way; `sums` are the accumulators (and A) of those that have ended.
template <int LEFT, class... Sums>
__device__ __forceinline__ void wgmma_wait(Sums &...sums) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
  (wgmma_hold(sums), ...);
}

// d = a b, or d += a b: m64nNk16, N = 8 BLOCKS, 16-bit T. A from shared memory or registers, B from shared memory, as descriptors
// that matrix() makes; ..._ACROSS as above.
template <class T, bool A_ACROSS, bool B_ACROSS, int BLOCKS>
__device__ __forceinline__ void wgmma(float (&d)[BLOCKS][4], uint64_t a, uint64_t b, bool accumulate) {
  Wgmma<T>::template shared<A_ACROSS, B_ACROSS>(d, a, b, accumulate);
}
template <class T, bool B_ACROSS, int BLOCKS>
__device__ __forceinline__ void wgmma(float (&d)[BLOCKS][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  Wgmma<T>::template registers<B_ACROSS>(d, a, b, accumulate);
}

}  // namespace ptx
}  // namespace ep

#endif

namespace ep {
namespace ptx {

// The descriptor of a matrix that begins at this shared address; `leading` and `stride` in bytes, as above.
__device__ __forceinline__ uint64_t matrix(uint32_t address, int leading, int stride) {
  return uint64_t(address >> 4) | uint64_t(uint32_t(leading) >> 4) << 16 | uint64_t(uint32_t(stride) >> 4) << 32 |
         uint64_t(1) << 62;
}
// The same matrix `bytes` further on.
__device__ __forceinline__ uint64_t moved(uint64_t matrix, int bytes) { return matrix + uint64_t(bytes >> 4); }

}  // namespace ptx

// Makes the map of a tensor of 2-byte elements that TMA reads in boxes; host code. extent[0] is the innermost dimension,
// contiguous; stride[i] the bytes between elements of dimension i + 1. Boxes of 64 elements a row, swizzled. An ep status: a tensor
// that TMA cannot read is an error, so callers ask tma_reads before.
int make_tensor_map(TensorMap &map, const void *base, int rank, const uint64_t *extent, const uint64_t *stride,
                    const uint32_t *box);

}  // namespace ep
