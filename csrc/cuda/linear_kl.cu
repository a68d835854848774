// Divergence of two next-token distributions on the GPU: what is made of a block of logits (csrc/include/enginepost/linear_kl.h).
//
// A block of threads has one row; a thread goes through runs of 4 columns, the blocks' width apart, and keeps for each side the
// largest z that it has seen and the sum of exp(z - largest), and beside them the sum that forward or reverse KL is made of. When a
// larger z comes, sums move to it. At the end the threads' sums move to the row's largest and are added in a fixed order, then to
// those of the blocks of the vocabulary that came before. Bound by memory where the arithmetic allows: every logit is read once,
// and written once in the gradient.
//
//   thread 0      columns 0..3    4N..4N+3   ...       N threads a row: 32 to 512, some 32 columns each
//   thread 1      columns 4..7    ...                  (largest, sum) of p, of q, weighted  --shuffles-->  warp  --shared-->  row
#include "linear_kl.h"

#include <cmath>

#include "enginepost/linear_kl.h"
#include "launch.cuh"
#include "vector.cuh"

namespace ep {
namespace cuda {
namespace {

constexpr int RUN = 4, TOPK = 3;  // TOPK: a kind of its own, without a teacher's logits
constexpr int MOST_THREADS = 512, ROOM = 32;

// The z of one side, and dz / du.
struct Logit {
  float z, slope;
};
__device__ __forceinline__ Logit logit_of(float u, float softcap, float temperature) {
  Logit l{u, 1.f};
  if (softcap > 0.f) {
    const float t = tanhf(u / softcap);
    l.z = softcap * t, l.slope = fmaf(-t, t, 1.f);
  }
  if (temperature != 1.f) l.z /= temperature, l.slope /= temperature;
  return l;
}

// Columns [at, at + n) of a row, as whole 16 bytes where they are.
__device__ __forceinline__ void load_columns(const float *row, int64_t at, int n, bool whole, float (&v)[RUN]) {
  if (whole && n == RUN) return load_run<RUN, true>(row + at, v);
#pragma unroll
  for (int e = 0; e < RUN; e++) v[e] = e < n ? row[at + e] : 0.f;
}
// body(first column, how many) for this thread's runs.
template <class Body>
__device__ __forceinline__ void each_run(int64_t width, Body &&body) {
  for (int64_t at = int64_t(threadIdx.x) * RUN; at < width; at += int64_t(blockDim.x) * RUN) {
    body(at, int(min(int64_t(RUN), width - at)));
  }
}

// Largest of a block, in every thread; the rooms of this and of block_sum must differ until a barrier.
__device__ __forceinline__ float block_max(float v, float *room) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
  v = warp_max(v);
  if (warps == 1) return v;
  if (lane == 0) room[warp] = v;
  __syncthreads();
  return warp_max(lane < warps ? room[lane] : KL_NOTHING);
}

// What is known of some columns of a row. KIND says which side weighs: forward the teacher, reverse the student.
struct Sums {
  float high_p, sum_p, high_q, sum_q, weighted;
};
template <int KIND>
__device__ __forceinline__ void move(Sums &s, float high_p, float high_q) {
  const float by_p = expf(s.high_p - high_p), by_q = KIND == TOPK ? 1.f : expf(s.high_q - high_q);
  const float moved = (high_p - s.high_p) - (high_q - s.high_q);
  if (KIND == EP_KL_FORWARD) s.weighted = fmaf(-moved, s.sum_q, s.weighted) * by_q;
  if (KIND == EP_KL_REVERSE) s.weighted = fmaf(-moved, s.sum_p, s.weighted) * by_p;
  s.sum_p *= by_p, s.sum_q *= by_q;
  s.high_p = high_p, s.high_q = high_q;
}

template <int KIND>
__global__ void __launch_bounds__(MOST_THREADS) scan(const LinearKl a, bool whole) {
  float *rooms = shared_memory<float>();  // (5, ROOM)
  const int64_t row = blockIdx.x;
  float *u = a.student.u + row * a.student.row;
  if (KIND == TOPK) {
    for (int64_t j = threadIdx.x; j < a.k; j += blockDim.x) {
      const int64_t at = a.ids[row * a.k + j] - a.first;
      if (at < 0 || at >= a.width) continue;
      a.chosen[row * a.k + j] = logit_of(u[at], a.student.softcap, a.temperature).z;
      u[at] = -INFINITY;
    }
    __syncthreads();
  }
  float *of = a.sums + row * KL_SUMS;
  Sums before{KL_NOTHING, 0.f, KL_NOTHING, 0.f, 0.f};
  if (a.first > 0) before = {of[0], of[1], of[2], of[3], of[4]};
  Sums s{before.high_p, 0.f, before.high_q, 0.f, 0.f};  // from the largest so far: sums that do not move are not rounded for it
  each_run(a.width, [&](int64_t at, int n) {
    float z[RUN], t[RUN], most_p = s.high_p, most_q = s.high_q;
    load_columns(u, at, n, whole, z);
    if (KIND != TOPK) load_columns(a.teacher.u + row * a.teacher.row, at, n, whole, t);
#pragma unroll
    for (int e = 0; e < RUN; e++) {
      if (KIND != TOPK || z[e] != -INFINITY) z[e] = logit_of(z[e], a.student.softcap, a.temperature).z;
      if (KIND != TOPK) t[e] = logit_of(t[e], a.teacher.softcap, a.temperature).z;
      if (e >= n) continue;
      most_p = fmaxf(most_p, z[e]);
      if (KIND != TOPK) most_q = fmaxf(most_q, t[e]);
    }
    if (most_p > s.high_p || most_q > s.high_q) move<KIND>(s, most_p, most_q);
#pragma unroll
    for (int e = 0; e < RUN; e++) {
      if (e >= n) continue;
      const float by_p = expf(z[e] - s.high_p);
      s.sum_p += by_p;
      if (KIND == TOPK) continue;
      const float by_q = expf(t[e] - s.high_q), apart = (z[e] - s.high_p) - (t[e] - s.high_q);
      s.sum_q += by_q;
      if (KIND == EP_KL_FORWARD) s.weighted = fmaf(by_q, apart, s.weighted);
      if (KIND == EP_KL_REVERSE) s.weighted = fmaf(by_p, apart, s.weighted);
    }
  });
  const float high_p = block_max(s.high_p, rooms), high_q = KIND == TOPK ? KL_NOTHING : block_max(s.high_q, rooms + ROOM);
  move<KIND>(s, high_p, high_q);
  s.sum_p = block_sum(s.sum_p, rooms + 2 * ROOM);
  if (KIND != TOPK) s.sum_q = block_sum(s.sum_q, rooms + 3 * ROOM);
  if (KIND == EP_KL_FORWARD || KIND == EP_KL_REVERSE) s.weighted = block_sum(s.weighted, rooms + 4 * ROOM);
  if (threadIdx.x != 0) return;
  move<KIND>(before, s.high_p, s.high_q);
  s.sum_p += before.sum_p, s.sum_q += before.sum_q, s.weighted += before.weighted;
  of[0] = s.high_p, of[1] = s.sum_p, of[2] = s.high_q, of[3] = s.sum_q, of[4] = s.weighted;
}

// log p - log m and log q - log m for m = beta q + (1 - beta) p, from d = log q - log p: the one whose side is larger first, by
// log1p, so that sides that are nearly the same keep their difference.
struct Apart {
  float p, q;
};
__device__ __forceinline__ Apart from_mixture(float d, float beta) {
  const float less = expm1f(-fabsf(d));
  if (d >= 0.f) {
    const float q = -log1pf((1.f - beta) * less);
    return {q - d, q};
  }
  const float p = -log1pf(beta * less);
  return {p, p + d};
}

__global__ void __launch_bounds__(MOST_THREADS) compare(const LinearKl a, bool whole) {
  float *rooms = shared_memory<float>();
  const int64_t row = blockIdx.x;
  const float *norm = a.norm + row * a.norm_row;
  const float high_p = norm[0], log_p_sum = norm[1], high_q = norm[2], log_q_sum = norm[3];
  float of_q = 0.f, of_p = 0.f;
  each_run(a.width, [&](int64_t at, int n) {
    float z[RUN], t[RUN];
    load_columns(a.student.u + row * a.student.row, at, n, whole, z);
    load_columns(a.teacher.u + row * a.teacher.row, at, n, whole, t);
#pragma unroll
    for (int e = 0; e < RUN; e++) {
      if (e >= n) continue;
      const float log_p = logit_of(z[e], a.student.softcap, a.temperature).z - high_p - log_p_sum;
      const float log_q = logit_of(t[e], a.teacher.softcap, a.temperature).z - high_q - log_q_sum;
      const Apart apart = from_mixture(log_q - log_p, a.beta);
      of_q = fmaf(expf(log_q), apart.q, of_q);
      of_p = fmaf(expf(log_p), apart.p, of_p);
    }
  });
  of_q = block_sum(of_q, rooms);
  of_p = block_sum(of_p, rooms + ROOM);
  if (threadIdx.x != 0) return;
  float *of = a.sums + row * 2;
  of[0] = a.first > 0 ? of[0] + of_q : of_q;
  of[1] = a.first > 0 ? of[1] + of_p : of_p;
}

// A thread reads its run of u before it writes the same of du, which may lie in the same place.
template <int KIND, class T>
__global__ void __launch_bounds__(MOST_THREADS) gradient(const LinearKl a, bool whole) {
  const int64_t row = blockIdx.x;
  const float *norm = a.norm + row * a.norm_row;
  const float high_p = norm[0], log_p_sum = norm[1], dkl = a.dkl[row];
  T *du = reinterpret_cast<T *>(a.du) + row * a.du_row;
  each_run(a.width, [&](int64_t at, int n) {
    float d[RUN], t[RUN];
    load_columns(a.student.u + row * a.student.row, at, n, whole, d);
    if (KIND != TOPK) load_columns(a.teacher.u + row * a.teacher.row, at, n, whole, t);
#pragma unroll
    for (int e = 0; e < RUN; e++) {
      const Logit l = logit_of(d[e], a.student.softcap, a.temperature);
      const float beyond = l.z - high_p, p = expf(beyond - log_p_sum);
      float dz = p;
      if constexpr (KIND == TOPK) {
        dz *= norm[2];
      } else {
        const float theirs = logit_of(t[e], a.teacher.softcap, a.temperature).z - norm[2];
        if constexpr (KIND == EP_KL_FORWARD) {
          dz -= expf(theirs - norm[3]);
        } else if constexpr (KIND == EP_KL_REVERSE) {  // without the logs of the sums, which would leave their roundings
          dz *= beyond - theirs - norm[4];
        } else {
          dz *= (1.f - a.beta) * (from_mixture((theirs - norm[3]) - (beyond - log_p_sum), a.beta).p - norm[4]);
        }
      }
      d[e] = dz * l.slope * dkl;
    }
    if (whole && n == RUN) {
      if constexpr (sizeof(T) == 4) {
        store_run(du + at, d);
      } else {
        *reinterpret_cast<uint2 *>(du + at) = make_uint2(pack<T>(d[0], d[1]), pack<T>(d[2], d[3]));
      }
    } else {
#pragma unroll
      for (int e = 0; e < RUN; e++) {
        if (e < n) du[at + e] = from_float<T>(d[e]);
      }
    }
  });
  if (KIND != TOPK) return;
  __syncthreads();
  for (int64_t j = threadIdx.x; j < a.k; j += blockDim.x) {
    const int64_t at = a.ids[row * a.k + j] - a.first;
    if (at >= 0 && at < a.width) du[at] = from_float<T>(a.chosen[row * a.k + j] * dkl);
  }
}

// Threads of a row: enough columns for each to be worth the sums at the end.
int row_threads(int64_t width) {
  const int64_t warps = width / 1024;
  return 32 * int(warps < 1 ? 1 : warps > MOST_THREADS / 32 ? MOST_THREADS / 32 : warps);
}

bool aligned(const LinearKl &a) {
  const auto side = [](const KlSide &s) { return aligned16(s.u) && s.row % RUN == 0; };
  return side(a.student) && side(a.teacher) && aligned16(a.du) && a.du_row % RUN == 0;
}

int start(void (*kernel)(LinearKl, bool), const LinearKl &a, void *stream) {
  return launch(kernel, dim3(unsigned(a.rows)), row_threads(a.width), 5 * ROOM * sizeof(float), stream, a, aligned(a));
}

template <class T>
int gradient_as(const LinearKl &a, void *stream) {
  if (a.teacher.u == nullptr) return start(&gradient<TOPK, T>, a, stream);
  if (a.kind == EP_KL_FORWARD) return start(&gradient<EP_KL_FORWARD, T>, a, stream);
  if (a.kind == EP_KL_REVERSE) return start(&gradient<EP_KL_REVERSE, T>, a, stream);
  return start(&gradient<EP_KL_JS, T>, a, stream);
}

}  // namespace

int linear_kl_scan(const LinearKl &a, void *stream) {
  if (a.teacher.u == nullptr) return start(&scan<TOPK>, a, stream);
  if (a.kind == EP_KL_FORWARD) return start(&scan<EP_KL_FORWARD>, a, stream);
  if (a.kind == EP_KL_REVERSE) return start(&scan<EP_KL_REVERSE>, a, stream);
  return start(&scan<EP_KL_JS>, a, stream);
}

int linear_kl_compare(const LinearKl &a, void *stream) { return start(&compare, a, stream); }

int linear_kl_gradient(const LinearKl &a, void *stream) {
  if (a.du_dtype == F32) return gradient_as<float>(a, stream);
  return a.du_dtype == BF16 ? gradient_as<bf16>(a, stream) : gradient_as<fp16>(a, stream);
}

}  // namespace cuda
}  // namespace ep
