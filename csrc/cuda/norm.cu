// RMSNorm on the GPU, forward and backward: see csrc/cpu/norm.cpp for the formulas.
//
// A block has one row at a time, HELD accesses of WIDTH elements per thread, which stay in registers between the sum of squares and
// the product: each byte is read once. Rows that are too long, oddly wide or badly aligned go element by element and are read
// twice. Sums are trees of fixed shape over a row. The backward gives a block every gridDim-th row, sums their dweight in
// registers, and a second kernel adds the blocks' sums in order: the grid depends on the shape alone, so the bits do not change
// from card to card.
#include "norm.h"

#include "launch.cuh"
#include "vector.cuh"

namespace ep {
namespace cuda {
namespace {

constexpr int HELD = 4, MOST_THREADS = 512;
constexpr int64_t BLOCKS =
    512;  // with partial sums of dweight: they are written and read once more, 2 % of the traffic at 16k rows

// Elements [i0, i0 + WIDTH) of access k: consecutive threads have consecutive accesses.
template <int WIDTH>
__device__ __forceinline__ int64_t element(int k) {
  return (int64_t(k) * blockDim.x + threadIdx.x) * WIDTH;
}

template <class T, class W, bool ADD>
__global__ void __launch_bounds__(MOST_THREADS)
    forward_held(const T *x, const T *residual, const W *weight, T *y, T *h, float *rstd, int64_t width, float eps, float offset) {
  constexpr int WIDTH = WIDE<T>;
  const int64_t row = int64_t(blockIdx.x) * width;
  float v[HELD][WIDTH], squares = 0.f;
#pragma unroll
  for (int k = 0; k < HELD; k++) {
    const int64_t i = element<WIDTH>(k);
    if (i >= width) continue;
    load_run<WIDTH, true>(x + row + i, v[k]);
    if constexpr (ADD) {
      float r[WIDTH];
      load_run<WIDTH, true>(residual + row + i, r);
#pragma unroll
      for (int e = 0; e < WIDTH; e++) v[k][e] = rounded<T>(v[k][e] + r[e]);  // as two separate ops would read it
      store_run(h + row + i, v[k]);
    }
#pragma unroll
    for (int e = 0; e < WIDTH; e++) squares = fmaf(v[k][e], v[k][e], squares);
  }
  const float r = 1.f / sqrtf(block_sum(squares, shared_memory<float>()) / float(width) + eps);
  if (threadIdx.x == 0) rstd[blockIdx.x] = r;
#pragma unroll
  for (int k = 0; k < HELD; k++) {
    const int64_t i = element<WIDTH>(k);
    if (i >= width) continue;
    float w[WIDTH];
    load_run<WIDTH>(weight + i, w);
#pragma unroll
    for (int e = 0; e < WIDTH; e++) v[k][e] = v[k][e] * r * (offset + w[e]);
    store_run(y + row + i, v[k]);
  }
}

template <class T, class W, bool ADD>
__global__ void __launch_bounds__(MOST_THREADS)
    forward_any(const T *x, const T *residual, const W *weight, T *y, T *h, float *rstd, int64_t width, float eps, float offset) {
  const int64_t row = int64_t(blockIdx.x) * width;
  float squares = 0.f;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    float v = to_float(x[row + i]);
    if constexpr (ADD) {
      const T sum = from_float<T>(v + to_float(residual[row + i]));
      h[row + i] = sum;
      v = to_float(sum);
    }
    squares = fmaf(v, v, squares);
  }
  const float r = 1.f / sqrtf(block_sum(squares, shared_memory<float>()) / float(width) + eps);
  if (threadIdx.x == 0) rstd[blockIdx.x] = r;
  const T *from = ADD ? h : x;  // a thread reads back only what it wrote
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    y[row + i] = from_float<T>(to_float(from[row + i]) * r * (offset + to_float(weight[i])));
  }
}

// Rows blockIdx.x, blockIdx.x + gridDim.x, ...; partial (gridDim.x, H) or null.
template <class T, class W>
__global__ void __launch_bounds__(MOST_THREADS)
    backward_held(const T *dy, const T *dh, const T *x, const W *weight, const float *rstd, T *dx, float *partial, int64_t rows,
                  int64_t width, float offset) {
  constexpr int WIDTH = WIDE<T>;
  float dw[HELD][WIDTH] = {};
  for (int64_t n = blockIdx.x, turn = 0; n < rows; n += gridDim.x, turn ^= 1) {
    const int64_t row = n * width;
    const float r = rstd[n];
    uint4 g_raw[HELD], v_raw[HELD];  // unpacked twice: half the registers, and dw needs many
    float dot = 0.f;
#pragma unroll
    for (int k = 0; k < HELD; k++) {
      const int64_t i = element<WIDTH>(k);
      if (i >= width) continue;
      float g[WIDTH], v[WIDTH], w[WIDTH];
      g_raw[k] = ptx::load_once(reinterpret_cast<const uint4 *>(dy + row + i));
      v_raw[k] = ptx::load_once(reinterpret_cast<const uint4 *>(x + row + i));
      load_run<WIDTH>(weight + i, w);
      unpack16<T>(g_raw[k], g);
      unpack16<T>(v_raw[k], v);
#pragma unroll
      for (int e = 0; e < WIDTH; e++) {
        dw[k][e] = fmaf(g[e] * r, v[e], dw[k][e]);
        dot = fmaf(g[e] * (offset + w[e]), v[e], dot);
      }
    }
    // Two rooms in turn: the barrier of the next row lies between this row's reads and the writes two rows on.
    const float pull = -block_sum(dot, shared_memory<float>() + 32 * turn) * r * r * r / float(width);
#pragma unroll
    for (int k = 0; k < HELD; k++) {
      const int64_t i = element<WIDTH>(k);
      if (i >= width) continue;
      float d[WIDTH] = {}, g[WIDTH], v[WIDTH], w[WIDTH];
      if (dh != nullptr) load_run<WIDTH, true>(dh + row + i, d);
      load_run<WIDTH>(weight + i, w);
      unpack16<T>(g_raw[k], g);
      unpack16<T>(v_raw[k], v);
#pragma unroll
      for (int e = 0; e < WIDTH; e++) d[e] += fmaf(v[e], pull, g[e] * (offset + w[e]) * r);
      store_run(dx + row + i, d);
    }
  }
  if (partial == nullptr) return;
#pragma unroll
  for (int k = 0; k < HELD; k++) {
    const int64_t i = element<WIDTH>(k);
    if (i >= width) continue;
#pragma unroll
    for (int e = 0; e < WIDTH; e++) partial[blockIdx.x * width + i + e] = dw[k][e];
  }
}

// Each thread has columns of its own, so its sums of dweight in `partial` are read and written by it alone.
template <class T, class W>
__global__ void __launch_bounds__(MOST_THREADS)
    backward_any(const T *dy, const T *dh, const T *x, const W *weight, const float *rstd, T *dx, float *partial, int64_t rows,
                 int64_t width, float offset) {
  for (int64_t n = blockIdx.x, turn = 0; n < rows; n += gridDim.x, turn ^= 1) {
    const int64_t row = n * width;
    const float r = rstd[n];
    float dot = 0.f;
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
      const float d = to_float(dy[row + i]), v = to_float(x[row + i]);
      dot = fmaf(d * (offset + to_float(weight[i])), v, dot);
      if (partial != nullptr) {
        float *sum = partial + blockIdx.x * width + i;
        *sum = fmaf(d * r, v, n == int64_t(blockIdx.x) ? 0.f : *sum);
      }
    }
    const float pull = -block_sum(dot, shared_memory<float>() + 32 * turn) * r * r * r / float(width);
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
      const float g = to_float(dy[row + i]) * (offset + to_float(weight[i]));
      const float more = dh == nullptr ? 0.f : to_float(dh[row + i]);
      dx[row + i] = from_float<T>(more + fmaf(to_float(x[row + i]), pull, g * r));
    }
  }
}

// dweight[i] = sum of partial[b][i]: a warp has 32 columns and every 16th block, and the warps' sums are added in order.
template <class W>
__global__ void __launch_bounds__(512) add_partial(const float *partial, W *dweight, int64_t blocks, int64_t width) {
  constexpr int WARPS = 16;
  float *sums = shared_memory<float>();  // (WARPS, 32)
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t i = int64_t(blockIdx.x) * 32 + lane;
  float total = 0.f;
  if (i < width) {
    for (int64_t b = warp; b < blocks; b += WARPS) total += partial[b * width + i];
  }
  sums[warp * 32 + lane] = total;
  __syncthreads();
  if (warp != 0 || i >= width) return;
  total = 0.f;
  for (int k = 0; k < WARPS; k++) total += sums[k * 32 + lane];
  dweight[i] = from_float<W>(total);
}

// Threads of a block whose rows are held in registers; 0 where they cannot be.
template <class T, class W>
int held_threads(int64_t width, std::initializer_list<const void *> rows) {
  for (const void *p : rows) {
    if (!aligned16(p)) return 0;
  }
  const int64_t threads = ceil_div(ceil_div(width, WIDE<T>), HELD);
  return width % WIDE<T> != 0 || threads > MOST_THREADS ? 0 : int(ceil_div(threads, 32) * 32);
}
int any_threads(int64_t width) { return int(ceil_div(width < MOST_THREADS ? width : MOST_THREADS, 32) * 32); }

template <class T, class W, bool ADD>
int forward_as(const NormForward &a, void *stream) {
  const int held = held_threads<T, W>(a.width, {a.x, a.residual, a.weight, a.y, a.h});
  return launch(held > 0 ? &forward_held<T, W, ADD> : &forward_any<T, W, ADD>, dim3(unsigned(a.rows)),
                held > 0 ? held : any_threads(a.width), 32 * sizeof(float), stream, reinterpret_cast<const T *>(a.x),
                reinterpret_cast<const T *>(a.residual), reinterpret_cast<const W *>(a.weight), reinterpret_cast<T *>(a.y),
                reinterpret_cast<T *>(a.h), a.rstd, a.width, a.eps, a.offset);
}

template <class T, class W>
int forward(const NormForward &a, void *stream) {
  return a.residual == nullptr ? forward_as<T, W, false>(a, stream) : forward_as<T, W, true>(a, stream);
}

template <class T, class W>
int backward(const NormBackward &a, void *stream) {
  const int held = held_threads<T, W>(a.width, {a.dy, a.dh, a.x, a.weight, a.dx});
  int64_t blocks = a.rows;
  if (a.partial != nullptr) blocks = norm_tasks(a.rows) < BLOCKS ? norm_tasks(a.rows) : BLOCKS;
  if (blocks > 0) {
    const int status =
        launch(held > 0 ? &backward_held<T, W> : &backward_any<T, W>, dim3(unsigned(blocks)),
               held > 0 ? held : any_threads(a.width), 64 * sizeof(float), stream, reinterpret_cast<const T *>(a.dy),
               reinterpret_cast<const T *>(a.dh), reinterpret_cast<const T *>(a.x), reinterpret_cast<const W *>(a.weight), a.rstd,
               reinterpret_cast<T *>(a.dx), a.partial, a.rows, a.width, a.offset);
    if (status != EP_OK) return status;
  }
  if (a.dweight == nullptr) return EP_OK;
  return launch(&add_partial<W>, dim3(unsigned(ceil_div(a.width, 32))), 512, 512 * sizeof(float), stream,
                static_cast<const float *>(a.partial), reinterpret_cast<W *>(a.dweight), blocks, a.width);
}

}  // namespace

int norm_forward(const NormForward &a, void *stream) {
  if (a.dtype == F32) return forward<float, float>(a, stream);
  if (a.dtype == BF16) return a.weight_dtype == F32 ? forward<bf16, float>(a, stream) : forward<bf16, bf16>(a, stream);
  return a.weight_dtype == F32 ? forward<fp16, float>(a, stream) : forward<fp16, fp16>(a, stream);
}

int norm_backward(const NormBackward &a, void *stream) {
  if (a.dtype == F32) return backward<float, float>(a, stream);
  if (a.dtype == BF16) return a.weight_dtype == F32 ? backward<bf16, float>(a, stream) : backward<bf16, bf16>(a, stream);
  return a.weight_dtype == F32 ? backward<fp16, float>(a, stream) : backward<fp16, fp16>(a, stream);
}

}  // namespace cuda
}  // namespace ep
