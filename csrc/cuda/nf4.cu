// Quantising to and from 4 bits on the GPU, to the bit as csrc/cpu/nf4.cpp does it (the rules are there), and blockwise 8-bit
// numbers.
//
// All of it is bound by memory. A lane holds 8 neighbours, a warp 256: blocks of up to 256 elements lie in one warp and find their
// largest magnitude by shuffles; a longer block is walked through twice by its warp, the second time out of the caches.
//
// Numbers are looked up in shared memory where entry i has 32 copies, one in each bank, so that lanes with different codes do not
// wait for each other.
//
// NOTES: products and sums that the CPU rounds one by one are written with __fmul_rn and __fadd_rn, which the compiler may not
// fuse.
#include "nf4.h"

#include "device.h"
#include "nf4.cuh"

namespace ep {
namespace cuda {

using gemm::Kind;

namespace {

constexpr int THREADS = 256, RUN = 8, WARP_RUN = 32 * RUN;

// The larger of two magnitudes; not a number, if one of them is none.
__device__ __forceinline__ float larger(float a, float b) { return b > a || b != b ? b : a; }

template <class S>
__device__ __forceinline__ void read(const S *x, int64_t from, int64_t size, float (&v)[RUN]) {
#pragma unroll
  for (int i = 0; i < RUN; i++) v[i] = from + i < size ? to_float(x[from + i]) : 0.f;
}

// One block of `1 << shift` elements, or several that fill a warp's run, a warp at a time: writes absmax and gives each lane's
// elements, scaled, to use(first element, scaled).
template <class S, class Use>
__device__ __forceinline__ void scale_blocks(const S *x, int64_t size, int shift, float *absmax, Use &&use) {
  const int lane = int(threadIdx.x) % 32, block_size = 1 << shift;
  const int span = block_size > WARP_RUN ? block_size : WARP_RUN, lanes = block_size > WARP_RUN ? 32 : block_size / RUN;
  const int64_t spans = (size + span - 1) / span, step = int64_t(gridDim.x) * (THREADS / 32);
  for (int64_t s = int64_t(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32; s < spans; s += step) {
    const int64_t first = s * span + lane * RUN;
    float most = 0.f, v[RUN];
    for (int at = 0; at < span; at += WARP_RUN) {
      read(x, first + at, size, v);
#pragma unroll
      for (int i = 0; i < RUN; i++) most = larger(most, fabsf(v[i]));
    }
    for (int other = lanes / 2; other > 0; other /= 2) most = larger(most, __shfl_xor_sync(0xffffffffu, most, other));
    const int64_t block = first >> shift;
    const bool whole = (block + 1) << shift <= size;
    const float divisor = most < 1e-38f ? 1e-38f : most, factor = __fdiv_rn(1.f, divisor);
    if (lane % lanes == 0 && first < size) absmax[block] = whole ? most : divisor;
    for (int at = 0; at < span; at += WARP_RUN) {
      if (span > WARP_RUN) read(x, first + at, size, v);
#pragma unroll
      for (int i = 0; i < RUN; i++) v[i] = whole ? __fmul_rn(v[i], factor) : __fdiv_rn(v[i], divisor);
      if (first + at < size) use(first + at, v);
    }
  }
}

struct Ranks {
  float thresholds[15];
  uint8_t order[16];
};

template <class S>
__global__ void quantize4(const S *x, int64_t size, int shift, const Ranks ranks, uint8_t *packed, float *absmax) {
  uint8_t *order = shared_memory<uint8_t>();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < 16; i++) order[i] = ranks.order[i];
  }
  float thresholds[15];
#pragma unroll
  for (int t = 0; t < 15; t++) thresholds[t] = ranks.thresholds[t];
  __syncthreads();
  scale_blocks(x, size, shift, absmax, [&](int64_t first, const float (&v)[RUN]) {
    uint32_t bytes = 0;
#pragma unroll
    for (int i = 0; i < RUN; i++) {
      int rank = 0;
#pragma unroll
      for (int t = 0; t < 15; t++) rank += !(thresholds[t] >= v[i]);
      bytes |= uint32_t(order[rank]) << (i / 2 * 8 + (i % 2 == 0 ? 4 : 0));
    }
    const int64_t at = first / 2, end = (size + 1) / 2;
    if (at + 4 <= end && reinterpret_cast<uintptr_t>(packed) % 4 == 0) {
      *reinterpret_cast<uint32_t *>(packed + at) = bytes;
    } else {
      for (int i = 0; i < 4 && at + i < end; i++) packed[at + i] = uint8_t(bytes >> (8 * i));
    }
  });
}

struct Midpoints {
  float value[255];
};

template <class S>
__global__ void quantize8(const S *x, int64_t size, int shift, const Midpoints midpoints, uint8_t *q, float *absmax) {
  float *middle = shared_memory<float>();  // 256
  for (int i = int(threadIdx.x); i < 256; i += THREADS) middle[i] = i < 255 ? midpoints.value[i] : INFINITY;
  __syncthreads();
  scale_blocks(x, size, shift, absmax, [&](int64_t first, const float (&v)[RUN]) {
#pragma unroll
    for (int i = 0; i < RUN; i++) {
      if (first + i >= size) break;
      int below = 0;  // midpoints below v
#pragma unroll
      for (int step = 128; step > 0; step /= 2) below += v[i] > middle[below + step - 1] ? step : 0;
      q[first + i] = v[i] != v[i] ? uint8_t(255) : uint8_t(below);
    }
  });
}

// 8 numbers to `out` + `first`, of which `size` exist.
template <class C>
__device__ __forceinline__ void write(C *out, int64_t first, int64_t size, const float (&v)[RUN]) {
  if (first + RUN <= size && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    alignas(16) C numbers[RUN];
#pragma unroll
    for (int i = 0; i < RUN; i++) numbers[i] = from_float<C>(v[i]);
#pragma unroll
    for (int i = 0; i < int(RUN * sizeof(C) / 16); i++) {
      ptx::store_once(reinterpret_cast<uint4 *>(out + first) + i, reinterpret_cast<const uint4 *>(numbers)[i]);
    }
    return;
  }
  for (int i = 0; i < RUN && first + i < size; i++) out[first + i] = from_float<C>(v[i]);
}

template <class C>
__global__ void dequantize4(const Nf4Tensor w, C *out) {
  const Codebook book(w);
  const int64_t bytes = (w.size + 1) / 2, step = int64_t(gridDim.x) * THREADS * RUN;
  for (int64_t first = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * RUN; first < w.size; first += step) {
    uint32_t packed = 0;
    if (first / 2 + 4 <= bytes && reinterpret_cast<uintptr_t>(w.packed) % 4 == 0) {
      packed = *reinterpret_cast<const uint32_t *>(w.packed + first / 2);
    } else {
      for (int i = 0; i < 4 && first / 2 + i < bytes; i++) packed |= uint32_t(w.packed[first / 2 + i]) << (8 * i);
    }
    const float scale = scale_of(w, first >> w.shift);
    float v[RUN];
#pragma unroll
    for (int i = 0; i < RUN; i++) v[i] = book.number(packed >> (i / 2 * 8 + (i % 2 == 0 ? 4 : 0)), scale);
    write(out, first, w.size, v);
  }
}

template <class C>
__global__ void dequantize8(const uint8_t *q, const float *absmax, const float *code, int64_t size, int shift, float offset,
                            C *out) {
  float *table = shared_memory<float>();
  for (int i = int(threadIdx.x); i < 256; i += THREADS) table[i] = code[i];
  __syncthreads();
  const int64_t step = int64_t(gridDim.x) * THREADS * RUN;
  for (int64_t first = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * RUN; first < size; first += step) {
    const float scale = absmax[first >> shift];
    float v[RUN];
#pragma unroll
    for (int i = 0; i < RUN; i++) v[i] = first + i < size ? __fadd_rn(__fmul_rn(table[q[first + i]], scale), offset) : 0.f;
    write(out, first, size, v);
  }
}

int blocks_for(int64_t size, int64_t a_block, int multiprocessors) {
  const int64_t blocks = ceil_div(size, a_block), most = int64_t(multiprocessors) * 16;
  return int(blocks < most ? blocks : most);
}

// call(S()) with the element type of a kind.
template <class Call>
int by_kind(Kind kind, Call &&call) {
  return kind == Kind::f32 ? call(float()) : kind == Kind::bf16 ? call(bf16()) : call(fp16());
}

}  // namespace

int nf4_quantize(const Nf4Quantize &a, void *stream) {
  Device device;
  if (int status = current_device(device)) return status;
  Ranks ranks;
  for (int i = 0; i < 15; i++) ranks.thresholds[i] = a.thresholds[i];
  for (int i = 0; i < 16; i++) ranks.order[i] = a.order[i];
  return by_kind(a.kind, [&](auto number) {
    using S = decltype(number);
    return launch(&quantize4<S>, dim3(unsigned(blocks_for(a.size, THREADS * RUN, device.multiprocessors))), THREADS, 16, stream,
                  reinterpret_cast<const S *>(a.x), a.size, a.shift, ranks, a.packed, a.absmax);
  });
}

int nf4_dequantize(const Nf4Dequantize &a, void *stream) {
  Device device;
  if (int status = current_device(device)) return status;
  return by_kind(a.kind, [&](auto number) {
    using C = decltype(number);
    return launch(&dequantize4<C>, dim3(unsigned(blocks_for(a.w.size, THREADS * RUN, device.multiprocessors))), THREADS,
                  Codebook::SHARED_BYTES, stream, a.w, reinterpret_cast<C *>(a.out));
  });
}

int blockwise8_quantize(const Blockwise8Quantize &a, void *stream) {
  Device device;
  if (int status = current_device(device)) return status;
  Midpoints midpoints;
  for (int i = 0; i < 255; i++) midpoints.value[i] = a.midpoints[i];
  return by_kind(a.kind, [&](auto number) {
    using S = decltype(number);
    return launch(&quantize8<S>, dim3(unsigned(blocks_for(a.size, THREADS * RUN, device.multiprocessors))), THREADS, 1024, stream,
                  reinterpret_cast<const S *>(a.x), a.size, a.shift, midpoints, a.q, a.absmax);
  });
}

int blockwise8_dequantize(const Blockwise8Dequantize &a, void *stream) {
  Device device;
  if (int status = current_device(device)) return status;
  return by_kind(a.kind, [&](auto number) {
    using C = decltype(number);
    return launch(&dequantize8<C>, dim3(unsigned(blocks_for(a.size, THREADS * RUN, device.multiprocessors))), THREADS, 1024, stream,
                  a.q, a.absmax, a.code, a.size, a.shift, a.offset, reinterpret_cast<C *>(a.out));
  });
}

}  // namespace cuda
}  // namespace ep
