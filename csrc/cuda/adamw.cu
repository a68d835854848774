// AdamW on the GPU, float32 and 8-bit moments, and the sum of squares: see csrc/cpu/adamw.cpp for the formulas. One pass, bound by
// memory.
//
// Float32 moments: a thread has a run of 8 elements. 8-bit moments: a warp has a group of 256, lane l elements 8 l to 8 l + 7; the
// group's largest moments are found by shuffles, and codes by reckoning: within a decade the code's values are equally far apart,
// so a scaled magnitude is the index, give or take one, and the midpoints in shared memory decide.
//
// Sum of squares: in the order of a CPU with eight lanes, so with its bits. A tile of 256 elements is read as one run of 8 by each
// lane of a warp, and comes out of shared memory again the other way, as 8 sums of every 8th element; 4 tiles make use of 32 lanes.
#include "adamw.h"

#include <type_traits>

#include "device.h"
#include "dynamic_code.h"
#include "launch.cuh"
#include "vector.cuh"

namespace ep {
namespace cuda {
namespace {

constexpr int RUN = 8, WARPS = 8;

struct Moved {
  float m, v, p;
};
__device__ __forceinline__ Moved update(const AdamW &a, float g, float m, float v, float p) {
  m = fmaf(a.keep1, m, a.take1 * g);
  v = fmaf(a.keep2, v, a.take2 * g * g);
  return {m, v, p * a.decay - a.step_size * (m / (sqrtf(v * a.inv_c2) + a.eps))};
}

template <class P, class G, int WIDTH>
__device__ __forceinline__ void step_run(const AdamW &a, int64_t i) {
  P *param = reinterpret_cast<P *>(a.param) + i;
  float g[WIDTH], m[WIDTH], v[WIDTH], p[WIDTH];
  load_run<WIDTH, WIDTH != 1>(reinterpret_cast<const G *>(a.grad) + i, g);
  load_run(a.m + i, m);
  load_run(a.v + i, v);
  if (a.master == nullptr) {
    load_run(param, p);
  } else {
    load_run(a.master + i, p);
  }
#pragma unroll
  for (int e = 0; e < WIDTH; e++) {
    const Moved r = update(a, g[e] * a.scale, m[e], v[e], p[e]);
    m[e] = r.m, v[e] = r.v, p[e] = r.p;
  }
  store_run(a.m + i, m);
  store_run(a.v + i, v);
  if (a.master != nullptr) store_run(a.master + i, p);
  store_run(param, p);
}

template <class P, class G>
__global__ void __launch_bounds__(256) step(const AdamW a, bool whole) {
  const int64_t i = (int64_t(blockIdx.x) * 256 + threadIdx.x) * RUN;
  if (whole && i + RUN <= a.size) return step_run<P, G, RUN>(a, i);
  for (int64_t j = i; j < a.size && j < i + RUN; j++) step_run<P, G, 1>(a, j);
}

// What a block needs of a DynamicCode, and lays out in shared memory: values, midpoints, and the classes.
struct Code {
  float value[256];
  int zero, begins[7];         // bits of the magnitudes where classes 1 to 7 begin
  float inverse[8], shift[8];  // of a class: magnitude * inverse + shift = index in it
  int base[8], last[8];        // its first code, from that of zero, and its highest index
};
struct SharedCode {
  float value[256], midpoint[256];
  float inverse[8], shift[8];
  int base[8], last[8];
};

__device__ __forceinline__ void lay_out(const Code &c, SharedCode &s) {
  const int i = int(threadIdx.x);
  s.value[i] = c.value[i];
  s.midpoint[i] = i < 255 ? (c.value[i] + c.value[i + 1]) * 0.5f : __uint_as_float(0x7f800000u);
  if (i < 8) s.inverse[i] = c.inverse[i], s.shift[i] = c.shift[i], s.base[i] = c.base[i], s.last[i] = c.last[i];
}

// The number of midpoints below x: the nearest code, ties go down; 255 for NaN.
__device__ __forceinline__ int nearest(const Code &c, const SharedCode &s, float x) {
  if (x != x) return 255;
  const int size = __float_as_int(x) & 0x7fffffff;
  int kind = 0;
#pragma unroll
  for (int k = 0; k < 7; k++) kind += size > c.begins[k];
  int index = int(fmaf(__int_as_float(size), s.inverse[kind], s.shift[kind]));
  index = s.base[kind] + min(max(index, 0), s.last[kind]);
  int code = min(max(c.zero + (x < 0.f ? -index : index), 0), 255);
  while (code < 255 && x > s.midpoint[code]) code++;
  while (code > 0 && !(x > s.midpoint[code - 1])) code--;
  return code;
}

template <class P, class G>
__global__ void __launch_bounds__(32 * WARPS) step8(const AdamW a, uint8_t *m_codes, uint8_t *v_codes, float *m_scale,
                                                    float *v_scale, const Code m_code, const Code v_code, bool whole) {
  SharedCode *shared = shared_memory<SharedCode>();  // of m, of v
  lay_out(m_code, shared[0]);
  lay_out(v_code, shared[1]);
  __syncthreads();
  const int lane = int(threadIdx.x) % 32;
  const int64_t groups = (a.size + GROUP - 1) / GROUP;
  for (int64_t group = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32; group < groups; group += int64_t(gridDim.x) * WARPS) {
    const int64_t from = group * GROUP + lane * RUN;
    const int count = int(min(int64_t(RUN), max(int64_t(0), a.size - from)));
    P *param = reinterpret_cast<P *>(a.param) + from;
    const G *grad = reinterpret_cast<const G *>(a.grad) + from;
    float *master = a.master == nullptr ? nullptr : a.master + from;
    const bool vectors = whole && count == RUN;
    float g[RUN], p[RUN], m[RUN], v[RUN];
    uint8_t mc[RUN], vc[RUN];
    bool finite = true;
    if (vectors) {
      load_run<RUN, true>(grad, g);
      master == nullptr ? load_run(param, p) : load_run(master, p);
      const uint2 codes[2] = {*reinterpret_cast<const uint2 *>(m_codes + from), *reinterpret_cast<const uint2 *>(v_codes + from)};
#pragma unroll
      for (int e = 0; e < RUN; e++) {
        mc[e] = uint8_t((e < 4 ? codes[0].x : codes[0].y) >> 8 * (e % 4));
        vc[e] = uint8_t((e < 4 ? codes[1].x : codes[1].y) >> 8 * (e % 4));
      }
    } else {
#pragma unroll
      for (int e = 0; e < RUN; e++) {
        g[e] = p[e] = 0.f, mc[e] = vc[e] = 0;
        if (e >= count) continue;
        g[e] = to_float(grad[e]), p[e] = master == nullptr ? to_float(param[e]) : master[e];
        mc[e] = m_codes[from + e], vc[e] = v_codes[from + e];
      }
    }
    const float of_m = m_scale[group], of_v = v_scale[group];
    float m_most = 0.f, v_most = 0.f;
#pragma unroll
    for (int e = 0; e < RUN; e++) {
      m[e] = v[e] = 0.f;
      const float scaled = g[e] * a.scale;
      if (e >= count) continue;
      if (!(scaled - scaled == 0.f)) {
        finite = false;
        continue;
      }
      const Moved r = update(a, scaled, shared[0].value[mc[e]] * of_m, shared[1].value[vc[e]] * of_v, p[e]);
      m[e] = r.m, v[e] = r.v, p[e] = r.p;
      m_most = fmaxf(m_most, fabsf(r.m)), v_most = fmaxf(v_most, r.v);
    }
    if (vectors && finite) {
      if (master != nullptr) store_run(master, p);
      store_run(param, p);
    } else {
#pragma unroll
      for (int e = 0; e < RUN; e++) {
        const float scaled = g[e] * a.scale;
        if (e >= count || !(scaled - scaled == 0.f)) continue;  // the parameter stays
        if (master != nullptr) master[e] = p[e];
        param[e] = from_float<P>(p[e]);
      }
    }
    m_most = warp_max(m_most), v_most = warp_max(v_most);
    if (lane == 0) m_scale[group] = m_most, v_scale[group] = v_most;
    const float by_m = 1.f / fmaxf(m_most, 1e-38f), by_v = 1.f / fmaxf(v_most, 1e-38f);
    uint2 codes[2] = {};
#pragma unroll
    for (int e = 0; e < RUN; e++) {
      // Neither an m below zero nor a v above it becomes the code of zero.
      const float x = m[e] * by_m, y = v[e] * by_v;
      mc[e] = uint8_t(nearest(m_code, shared[0], __float_as_int(x) < 0 ? fminf(x, shared[0].value[126]) : x));
      vc[e] = uint8_t(nearest(v_code, shared[1], fmaxf(y, fminf(y * 1e30f, shared[1].value[1]))));
      (e < 4 ? codes[0].x : codes[0].y) |= unsigned(mc[e]) << 8 * (e % 4);
      (e < 4 ? codes[1].x : codes[1].y) |= unsigned(vc[e]) << 8 * (e % 4);
    }
    if (vectors) {
      *reinterpret_cast<uint2 *>(m_codes + from) = codes[0];
      *reinterpret_cast<uint2 *>(v_codes + from) = codes[1];
    } else {
      for (int e = 0; e < RUN; e++) {
        if (e < count) m_codes[from + e] = mc[e], v_codes[from + e] = vc[e];
      }
    }
  }
}

constexpr int TILES = 4, TILE_ROOM = int(SQUARES_TILE) + 8;  // of a warp at a time; so that its lanes read different banks
constexpr int SUMS = int(SQUARES_BLOCK / SQUARES_TILE) * 8;  // of a block
static_assert(SUMS % (WARPS * TILES * 8) == 0 && SQUARES_TILE == 32 * RUN, "whole rounds, whole tiles");

template <class T>
__global__ void __launch_bounds__(32 * WARPS) square_block(const T *x, int64_t size, bool whole, double *partial) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  double *sums = shared_memory<double>();  // (tile, lane of the CPU)
  float *room = reinterpret_cast<float *>(sums + SUMS) + warp * TILES * TILE_ROOM;
  const int64_t from = int64_t(blockIdx.x) * SQUARES_BLOCK;
  const int count = int(min(SQUARES_BLOCK, size - from));
  x += from;
  for (int tile = warp * TILES; tile * int(SQUARES_TILE) < count; tile += WARPS * TILES) {
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      const int i = (tile + t) * int(SQUARES_TILE) + lane * RUN;
      float v[RUN];
      if (whole && i + RUN <= count) {
        load_run<RUN, true>(x + i, v);
      } else {
#pragma unroll
        for (int e = 0; e < RUN; e++) v[e] = i + e < count ? to_float(x[i + e]) : 0.f;
      }
      store_run(room + t * TILE_ROOM + lane * RUN, v);
    }
    __syncwarp();
    const float *mine = room + lane / 8 * TILE_ROOM + lane % 8;
    float s = 0.f;
#pragma unroll
    for (int step = 0; step < int(SQUARES_TILE) / 8; step++) s = fmaf(mine[step * 8], mine[step * 8], s);
    sums[tile * 8 + lane] = double(s);
    __syncwarp();
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  for (int i = 0; i < (count + int(SQUARES_TILE) - 1) / int(SQUARES_TILE) * 8; i++) total = __dadd_rn(total, sums[i]);
  partial[blockIdx.x] = total;
}

// One block; the order is that of the partial sums.
__global__ void __launch_bounds__(256) add_squares(const double *partial, int64_t count, double *result) {
  double *some = shared_memory<double>(), total = 0;  // (256)
  for (int64_t from = 0; from < count; from += 256) {
    const int n = int(min(int64_t(256), count - from)), i = int(threadIdx.x);
    if (i < n) some[i] = partial[from + i];
    __syncthreads();
    for (int k = 0; i == 0 && k < n; k++) total = __dadd_rn(total, some[k]);
    __syncthreads();
  }
  if (threadIdx.x == 0) *result = total;
}

template <class T>
int squares(const SumSquares &a, void *stream) {
  const int64_t blocks = squares_blocks(a.size);
  if (blocks > 0) {
    const size_t shared = SUMS * sizeof(double) + WARPS * TILES * TILE_ROOM * sizeof(float);
    const int status = launch(&square_block<T>, dim3(unsigned(blocks)), 32 * WARPS, shared, stream,
                              reinterpret_cast<const T *>(a.x), a.size, aligned16(a.x), blocks == 1 ? a.result : a.partial);
    if (blocks == 1 || status != EP_OK) return status;
  }
  return launch(&add_squares, dim3(1), 256, 256 * sizeof(double), stream, static_cast<const double *>(a.partial), blocks, a.result);
}

Code code_of(const DynamicCode &d) {
  Code c;
  for (int i = 0; i < 256; i++) c.value[i] = d.value[i];
  c.zero = d.zero;
  for (int i = 0; i < 7; i++) c.begins[i] = d.begins[i];
  for (int i = 0; i < 8; i++) c.inverse[i] = d.inverse[i], c.shift[i] = d.shift[i], c.base[i] = d.base[i], c.last[i] = d.last[i];
  return c;
}

template <class P, class G>
struct Steps {
  static int plain(const AdamW &a, void *stream) {
    const bool whole = aligned16(a.param) && aligned16(a.grad) && aligned16(a.m) && aligned16(a.v) && aligned16(a.master);
    return launch(&step<P, G>, dim3(unsigned(ceil_div(a.size, 256 * RUN))), 256, 0, stream, a, whole);
  }
  static int eight(const AdamW8 &a, void *stream) {
    Device device;
    if (const int status = current_device(device)) return status;
    const AdamW &s = a.step;
    const bool whole = aligned16(s.param) && aligned16(s.grad) && aligned16(s.master) && aligned16(a.m) && aligned16(a.v);
    const int64_t blocks = ceil_div(ceil_div(s.size, GROUP), WARPS),
                  most = 8 * device.multiprocessors;  // the tables cost a block little
    return launch(&step8<P, G>, dim3(unsigned(blocks < most ? blocks : most)), 32 * WARPS, 2 * sizeof(SharedCode), stream, s, a.m,
                  a.v, a.m_scale, a.v_scale, code_of(*a.m_code), code_of(*a.v_code), whole);
  }
};

// Gradients of float32 or of the parameter's dtype; a float32 parameter takes any.
template <class P, class Call>
int of_grad(const AdamW &a, Call &&call) {
  if (a.grad_dtype == F32) return call(Steps<P, float>());
  if (a.grad_dtype == BF16 && a.dtype != F16) {
    if constexpr (!std::is_same<P, fp16>::value) return call(Steps<P, bf16>());
  }
  if (a.grad_dtype == F16 && a.dtype != BF16) {
    if constexpr (!std::is_same<P, bf16>::value) return call(Steps<P, fp16>());
  }
  return fail(EP_INVALID_ARGUMENT, "adamw: grad must be float32 or have the dtype of param");
}
template <class Call>
int of_dtypes(const AdamW &a, Call &&call) {
  if (a.dtype == F32) return of_grad<float>(a, call);
  return a.dtype == BF16 ? of_grad<bf16>(a, call) : of_grad<fp16>(a, call);
}

}  // namespace

int adamw_step(const AdamW &a, void *stream) {
  return of_dtypes(a, [&](auto steps) { return decltype(steps)::plain(a, stream); });
}

int adamw8_step(const AdamW8 &a, void *stream) {
  return of_dtypes(a.step, [&](auto steps) { return decltype(steps)::eight(a, stream); });
}

int sum_squares(const SumSquares &a, void *stream) {
  if (a.dtype == F32) return squares<float>(a, stream);
  return a.dtype == BF16 ? squares<bf16>(a, stream) : squares<fp16>(a, stream);
}

}  // namespace cuda
}  // namespace ep
