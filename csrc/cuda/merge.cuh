// What the merge kernels share: loads of pieces whose dtype is known at run time, sums in the CPU's order, random draws.
//
// Every result has the bits of the CPU's. So nothing is contracted (__fmul_rn and __fadd_rn never become an fma), and a sum in
// double is built as there: a tile of 256 elements in eight lanes, the lanes pairwise, the tiles one after the other.
#pragma once

#include "launch.cuh"
#include "merge.h"
#include "vector.cuh"

namespace ep {
namespace cuda {
namespace {

constexpr int RUN = 8, THREADS = 256;  // a thread has a run of elements
constexpr int GROUPS = THREADS / 8;    // of eight lanes, a tile each

__device__ __forceinline__ float load_one(const Piece &p, int64_t i) {
  if (p.dtype == F32) return reinterpret_cast<const float *>(p.data)[i];
  const uint16_t bits = reinterpret_cast<const uint16_t *>(p.data)[i];
  return p.dtype == BF16 ? to_float(bf16{bits}) : to_float(fp16{bits});
}

// Elements [at, at + n) of a piece, n <= RUN, as floats, and 0 behind them; `at` is a multiple of RUN.
__device__ __forceinline__ void load_piece(const Piece &p, int64_t at, int n, float (&v)[RUN]) {
  if (n == RUN && (reinterpret_cast<uintptr_t>(p.data) & 15) == 0) {
    if (p.dtype == F32) return load_run(reinterpret_cast<const float *>(p.data) + at, v);
    if (p.dtype == BF16) return load_run(reinterpret_cast<const bf16 *>(p.data) + at, v);
    return load_run(reinterpret_cast<const fp16 *>(p.data) + at, v);
  }
#pragma unroll
  for (int e = 0; e < RUN; e++) v[e] = e < n ? load_one(p, at + e) : 0.f;
}

__device__ __forceinline__ void store_piece(char *out, unsigned dtype, int64_t at, int n, const float (&v)[RUN]) {
  if (n == RUN && (reinterpret_cast<uintptr_t>(out) & 15) == 0) {
    if (dtype == F32) return store_run(reinterpret_cast<float *>(out) + at, v);
    if (dtype == BF16) return store_run(reinterpret_cast<bf16 *>(out) + at, v);
    return store_run(reinterpret_cast<fp16 *>(out) + at, v);
  }
#pragma unroll
  for (int e = 0; e < RUN; e++) {
    if (e >= n) continue;
    if (dtype == F32) {
      reinterpret_cast<float *>(out)[at + e] = v[e];
    } else {
      reinterpret_cast<uint16_t *>(out)[at + e] = dtype == BF16 ? from_float<bf16>(v[e]).bits : from_float<fp16>(v[e]).bits;
    }
  }
}

// x - base, where there is a base
__device__ __forceinline__ float delta_one(const Piece &x, const Piece &base, int64_t i) {
  const float v = load_one(x, i);
  return base.data == nullptr ? v : __fsub_rn(v, load_one(base, i));
}
__device__ __forceinline__ void load_delta(const Piece &x, const Piece &base, int64_t at, int n, float (&d)[RUN]) {
  load_piece(x, at, n, d);
  if (base.data == nullptr) return;
  float b[RUN];
  load_piece(base, at, n, b);
#pragma unroll
  for (int e = 0; e < RUN; e++) d[e] = __fsub_rn(d[e], b[e]);
}
__device__ __forceinline__ int magnitude(float d) { return __float_as_int(d) & 0x7fffffff; }

// The first element of this thread's run, and how many it has.
__device__ __forceinline__ int64_t run_of(int64_t size, int &n) {
  const int64_t at = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * RUN;
  n = int(max(int64_t(0), min(int64_t(RUN), size - at)));
  return at;
}
inline dim3 run_blocks(int64_t size) { return dim3(unsigned(ceil_div(size, THREADS * RUN))); }

// Adds a warp's whole numbers to one in global memory: in any order the same.
__device__ __forceinline__ void add_counts(long long *total, int count) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) count += __shfl_xor_sync(0xffffffffu, count, lanes);
  if (threadIdx.x % 32 == 0 && count != 0) {
    atomicAdd(reinterpret_cast<unsigned long long *>(total), static_cast<unsigned long long>(static_cast<long long>(count)));
  }
}

// total[k], in thread k, = sum over the elements [from, end) of term k, which term(i, lane sums) adds, in the order of the CPU.
// room: N GROUPS doubles of shared memory. UNROLL steps at once: more loads in flight, more registers.
template <int N, int UNROLL, class Term>
__device__ __forceinline__ double sum_in_order(int64_t from, int64_t end, double *room, Term &&term) {
  const int group = int(threadIdx.x) / 8, lane = int(threadIdx.x) % 8;
  double total = 0;
  for (int64_t round = from; round < end; round += int64_t(GROUPS) * TILE) {
    double sum[N];
#pragma unroll
    for (int k = 0; k < N; k++) sum[k] = 0;
    const int64_t first = round + int64_t(group) * TILE + lane;
#pragma unroll UNROLL
    for (int step = 0; step < TILE / 8; step++) {
      if (first + 8 * step < end) term(first + 8 * step, sum);
    }
#pragma unroll
    for (int k = 0; k < N; k++) {
#pragma unroll
      for (int lanes = 4; lanes > 0; lanes /= 2) sum[k] = __dadd_rn(sum[k], __shfl_xor_sync(0xffffffffu, sum[k], lanes));
      if (lane == 0) room[k * GROUPS + group] = sum[k];
    }
    __syncthreads();
    if (int(threadIdx.x) < N) {
      for (int g = 0; g < GROUPS; g++) total = __dadd_rn(total, room[int(threadIdx.x) * GROUPS + g]);
    }
    __syncthreads();
  }
  return total;
}

// Draws by element, see random_tile in csrc/cpu/merge_tile.h: the key of a block of 65536 is made once for neighbours.
struct Draws {
  uint64_t key, block;
  uint32_t k0, k1;
  __device__ __forceinline__ Draws(uint64_t key_, int64_t index) : key(key_) { enter(uint64_t(index) >> 16); }
  __device__ __forceinline__ void enter(uint64_t to) {
    block = to;
    uint64_t z = key + (block + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    k0 = uint32_t(z), k1 = uint32_t(z >> 32);
  }
  static __device__ __forceinline__ uint32_t mix(uint32_t h) {
    h = (h ^ (h >> 16)) * 0x7FEB352Du;
    h = (h ^ (h >> 15)) * 0x846CA68Bu;
    return h ^ (h >> 16);
  }
  __device__ __forceinline__ uint32_t operator()(int64_t index) {
    if (uint64_t(index) >> 16 != block) enter(uint64_t(index) >> 16);
    return mix(k0 ^ (uint32_t(index & 0xffff) * 0x9E3779B9u)) + k1;
  }
};

// ---- memory, in the order of the stream ----

inline int failed(const char *what) { return fail(EP_DEVICE_ERROR, "merge: CUDA could not %s", what); }

#if defined(EP_EMULATED)
inline int clear(void *p, int64_t bytes, void *) {
  std::memset(p, 0, size_t(bytes));
  return EP_OK;
}
inline int send(void *to, const void *from, int64_t bytes, void *) {
  std::memcpy(to, from, size_t(bytes));
  return EP_OK;
}
inline int fetch(void *to, const void *from, int64_t bytes, void *stream) { return send(to, from, bytes, stream); }
#else
inline int clear(void *p, int64_t bytes, void *stream) {
  return cudaMemsetAsync(p, 0, size_t(bytes), static_cast<cudaStream_t>(stream)) == cudaSuccess ? int(EP_OK)
                                                                                                : failed("clear memory");
}
// From pageable memory: it may change as soon as this returns.
inline int send(void *to, const void *from, int64_t bytes, void *stream) {
  const cudaError_t error = cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? int(EP_OK) : failed("copy to the GPU");
}
// Waits for what was queued.
inline int fetch(void *to, const void *from, int64_t bytes, void *stream) {
  cudaError_t error = cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDeviceToHost, static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) error = cudaStreamSynchronize(static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? int(EP_OK)
                              : fail(EP_DEVICE_ERROR, "merge: a kernel or a copy failed: %s", cudaGetErrorString(error));
}
#endif

}  // namespace
}  // namespace cuda
}  // namespace ep
