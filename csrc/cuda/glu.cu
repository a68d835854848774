// Gated linear unit on the GPU: see csrc/cpu/glu.cpp for the formulas. One pass, bound by memory: a thread has one run of WIDTH
// elements of the gate, the same of the other half, and in the backward of dy. Accurate expf, erfcf and division: the memory is
// slower still.
#include "glu.h"

#include "enginepost/glu.h"
#include "launch.cuh"
#include "vector.cuh"

namespace ep {
namespace cuda {
namespace {

struct Act {
  float value, slope;
};

// s = sigmoid(x) and 1 - s, both to full precision; NaN for NaN.
struct Sigmoid {
  float s, rest;
};
__device__ __forceinline__ Sigmoid sigmoid(float x) {
  const float e = expf(-fabsf(x)), large = 1.f / (1.f + e), small = e * large;
  return x >= 0.f ? Sigmoid{large, small} : Sigmoid{small, large};
}

template <int ACT>
__device__ __forceinline__ Act activate(float g) {
  if constexpr (ACT == EP_SILU) {
    const Sigmoid at = sigmoid(g);
    return {g * at.s, at.s * fmaf(g, at.rest, 1.f)};
  } else if constexpr (ACT == EP_GELU_TANH) {
    // 2k and a; beyond |g| = 15 the sigmoid is 0 or 1 in float32, and the powers of g could overflow.
    const float k = 1.59576912160573072f, a = 0.044715f;
    const float x = g < -15.f ? -15.f : g > 15.f ? 15.f : g;  // NaN stays
    const Sigmoid at = sigmoid(k * fmaf(a * x * x, x, x));
    return {g * at.s, fmaf(x * at.s * at.rest, k * fmaf(3.f * a * x, x, 1.f), at.s)};
  } else {
    const float cdf = 0.5f * erfcf(g * -0.70710678118654752f);
    return {g * cdf, fmaf(g * 0.39894228040143268f, expf(-0.5f * g * g), cdf)};
  }
}

// runs: of a row's half. A block has 256 consecutive runs of a (rows, runs) table.
template <class T, int WIDTH, int ACT>
__global__ void __launch_bounds__(256) forward(const T *x, T *y, int64_t rows, int64_t width, int runs) {
  const int64_t run = int64_t(blockIdx.x) * 256 + threadIdx.x, row = run / runs, at = (run - row * runs) * WIDTH;
  if (row >= rows) return;
  float g[WIDTH], u[WIDTH];
  load_run<WIDTH, true>(x + row * 2 * width + at, g);
  load_run<WIDTH, true>(x + row * 2 * width + width + at, u);
#pragma unroll
  for (int e = 0; e < WIDTH; e++) g[e] = activate<ACT>(g[e]).value * u[e];
  store_run(y + row * width + at, g);
}

template <class T, int WIDTH, int ACT>
__global__ void __launch_bounds__(256) backward(const T *dy, const T *x, T *dx, int64_t rows, int64_t width, int runs) {
  const int64_t run = int64_t(blockIdx.x) * 256 + threadIdx.x, row = run / runs, at = (run - row * runs) * WIDTH;
  if (row >= rows) return;
  float d[WIDTH], g[WIDTH], u[WIDTH];
  load_run<WIDTH, true>(dy + row * width + at, d);
  load_run<WIDTH, true>(x + row * 2 * width + at, g);
  load_run<WIDTH, true>(x + row * 2 * width + width + at, u);
#pragma unroll
  for (int e = 0; e < WIDTH; e++) {
    const Act act = activate<ACT>(g[e]);
    g[e] = d[e] * u[e] * act.slope;
    u[e] = d[e] * act.value;
  }
  store_run(dx + row * 2 * width + at, g);
  store_run(dx + row * 2 * width + width + at, u);
}

template <class T, int WIDTH, int ACT>
int run(const Glu &a, void *stream) {
  const int64_t runs = a.width / WIDTH;
  const dim3 grid(unsigned(ceil_div(a.rows * runs, 256)));
  const T *x = reinterpret_cast<const T *>(a.x);
  T *out = reinterpret_cast<T *>(a.out);
  if (a.dy == nullptr) return launch(&forward<T, WIDTH, ACT>, grid, 256, 0, stream, x, out, a.rows, a.width, runs);
  return launch(&backward<T, WIDTH, ACT>, grid, 256, 0, stream, reinterpret_cast<const T *>(a.dy), x, out, a.rows, a.width, runs);
}

template <class T, int ACT>
int of_width(const Glu &a, void *stream) {
  const bool whole = a.width % WIDE<T> == 0 && aligned16(a.x) && aligned16(a.out) && aligned16(a.dy);
  return whole ? run<T, WIDE<T>, ACT>(a, stream) : run<T, 1, ACT>(a, stream);
}

template <class T>
int of_activation(const Glu &a, void *stream) {
  switch (a.activation) {
    case EP_SILU: return of_width<T, EP_SILU>(a, stream);
    case EP_GELU_TANH: return of_width<T, EP_GELU_TANH>(a, stream);
    default: return of_width<T, EP_GELU>(a, stream);
  }
}

int of_dtype(const Glu &a, void *stream) {
  if (a.dtype == F32) return of_activation<float>(a, stream);
  return a.dtype == BF16 ? of_activation<bf16>(a, stream) : of_activation<fp16>(a, stream);
}

}  // namespace

int glu_forward(const Glu &a, void *stream) { return of_dtype(a, stream); }
int glu_backward(const Glu &a, void *stream) { return of_dtype(a, stream); }

}  // namespace cuda
}  // namespace ep
