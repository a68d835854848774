// Rotary embedding on the GPU: see csrc/cpu/rope.cpp for the formula and the layout. A thread has one job of a token: a run of
// WIDTH pairs of a rotated head (both halves of it, so the result may lie over the input), or a run that is copied. Jobs of a
// token:
//   [0, pairs) rotated: head job / runs, run job % runs       [pairs, pairs + rest) copied: the other dimensions, the other heads
#include "rope.h"

#include "launch.cuh"
#include "vector.cuh"

namespace ep {
namespace cuda {
namespace {

template <class T, int WIDTH>
__global__ void __launch_bounds__(256)
    rotate(const T *x, const float *cos, const float *sin, T *y, int64_t tokens, int rotated_heads, int dim, int half,
           int64_t x_stride, int64_t y_stride, float sign, int jobs) {
  const int64_t index = int64_t(blockIdx.x) * 256 + threadIdx.x, token = index / jobs;
  if (token >= tokens) return;
  const int job = int(index - token * jobs), runs = half / WIDTH, pairs = rotated_heads * runs;
  x += token * x_stride, y += token * y_stride;
  if (job < pairs) {
    const int head = job / runs, i = (job - head * runs) * WIDTH, at = head * dim + i;
    float x0[WIDTH], x1[WIDTH], c[WIDTH], s[WIDTH];
    load_run(x + at, x0);
    load_run(x + at + half, x1);
    load_run(cos + token * half + i, c);
    load_run(sin + token * half + i, s);
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
      const float first = x0[e], second = x1[e], turn = s[e] * sign;
      x0[e] = first * c[e] - second * turn;
      x1[e] = fmaf(second, c[e], first * turn);
    }
    store_run(y + at, x0);
    store_run(y + at + half, x1);
    return;
  }
  const int copied = job - pairs, tail = (dim - 2 * half) / WIDTH, tails = rotated_heads * tail;
  const int at =
      copied < tails ? copied / tail * dim + 2 * half + copied % tail * WIDTH : rotated_heads * dim + (copied - tails) * WIDTH;
  float v[WIDTH];
  load_run(x + at, v);
  store_run(y + at, v);
}

template <class T, int WIDTH>
int run(const Rope &a, void *stream) {
  int64_t jobs = a.rotated_heads * (a.half / WIDTH);
  if (a.x != a.y || a.x_stride != a.y_stride) {
    jobs += (a.rotated_heads * (a.dim - 2 * a.half) + (a.heads - a.rotated_heads) * a.dim) / WIDTH;
  }
  if (jobs == 0) return EP_OK;
  return launch(&rotate<T, WIDTH>, dim3(unsigned(ceil_div(a.tokens * jobs, 256))), 256, 0, stream, reinterpret_cast<const T *>(a.x),
                a.cos, a.sin, reinterpret_cast<T *>(a.y), a.tokens, a.rotated_heads, a.dim, a.half, a.x_stride, a.y_stride,
                a.inverse ? -1.f : 1.f, jobs);
}

template <class T>
int of_width(const Rope &a, void *stream) {
  constexpr int W = WIDE<T>;
  const bool whole = a.dim % W == 0 && a.half % W == 0 && a.x_stride % W == 0 && a.y_stride % W == 0 && aligned16(a.x) &&
                     aligned16(a.y) && aligned16(a.cos) && aligned16(a.sin);
  return whole ? run<T, W>(a, stream) : run<T, 1>(a, stream);
}

}  // namespace

int rope_rotate(const Rope &a, void *stream) {
  if (a.heads * a.dim > 0x7fffffff) return fail(EP_UNSUPPORTED, "rope: a token of %lld elements", (long long)(a.heads * a.dim));
  if (a.dtype == F32) return of_width<float>(a, stream);
  return a.dtype == BF16 ? of_width<bf16>(a, stream) : of_width<fp16>(a, stream);
}

}  // namespace cuda
}  // namespace ep
