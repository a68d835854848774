// The gradients of hidden states and of the head from those of logprob and entropy. With p = exp(z - lse) made again,
//
//   g_tv = z'_tv (dlogprob_t (delta_v,y(t) - p_tv) - dentropy_t p_tv (log p_tv + entropy_t))
//   dhidden = g W        dW = g^T hidden
//
// lse is known, so the vocabulary goes by in blocks, and each block's dW is whole: no float32 copy of dW exists.
//
//   block of B entries:  H W_block^T --product--> g [rows, B] in 16 bits
//                        g W_block --product--> added to dhidden [rows, K] in float32        g^T H --product--> dW_block
//
// NOTES: gradients of a mean over many tokens are small numbers, of float16's subnormal ones. So g is made of dlogprob and dentropy
// times a power of two that brings the largest of them to 1, which the two products divide by again (Product::alpha).
#include <cstdint>

#include "device.h"
#include "linear_logprob.cuh"

namespace ep {
namespace cuda {

struct RowGradients {  // [row that counts]; dlogprob and dentropy times the power of two
  float *dlogprob, *dentropy, *lse, *entropy;
  int *target;
  bool entropies;
};

struct Gradients {  // the epilogue of the product that makes the logits
  RowGradients row;
  int v0;
  float cap;
  uint16_t *g;  // [rows][g_row]
  int64_t g_row;

  template <class T, class TILE>
  __device__ __forceinline__ void operator()(const gemm::Problem &problem, float (&acc)[TILE::MB][TILE::NB][4], int m, int n,
                                             int limit) const {
    const int lane = int(threadIdx.x) % 32, column = n + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < TILE::MB; i++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int t = m + i * 16 + half * 8 + lane / 4;
        const bool there = t < limit;
        const float dlogprob = there ? row.dlogprob[t] : 0.f, lse = there ? row.lse[t] : 0.f;
        const float dentropy = there && row.entropies ? row.dentropy[t] : 0.f,
                    spread = there && row.entropies ? row.entropy[t] : 0.f;
        const int y = there ? row.target[t] - v0 : -1;
#pragma unroll
        for (int j = 0; j < TILE::NB; j++) {
#pragma unroll
          for (int e = 0; e < 2; e++) {
            float &u = acc[i][j][half * 2 + e];
            const int v = column + j * 8 + e;
            const float z = capped(u, cap), log_p = z - lse, p = ptx::exp2(log_p * LOG2E);
            float factor = -dlogprob;
            if (row.entropies) factor -= dentropy * (log_p + spread);
            const float g = p * factor + (v == y ? dlogprob : 0.f);
            u = v < problem.n ? g * slope_of(z, cap) : 0.f;
          }
        }
#pragma unroll
        for (int j = 0; j < TILE::NB; j += 4) {
          uint32_t r[4];
#pragma unroll
          for (int p = 0; p < 4; p++) r[p] = pack<T>(acc[i][j + p][half * 2], acc[i][j + p][half * 2 + 1]);
          const uint4 chunk = gemm::chunk_of(r);
          if (there) *reinterpret_cast<uint4 *>(g + t * g_row + n + (j + lane % 4) * 8) = chunk;
        }
      }
    }
  }
};

// scale[0] = 2^s with the largest of |dlogprob| and |dentropy| times it in [1, 2), scale[1] = 2^-s; 1 where there is none. One
// block.
__global__ void find_scale(const float *dlogprob, const float *dentropy, const int *rows, const int *count, float *scale) {
  float *shared = shared_memory<float>();
  float most = 0.f;
  for (int i = int(threadIdx.x); i < *count; i += int(blockDim.x)) {
    most = fmaxf(most, fabsf(dlogprob[rows[i]]));
    if (dentropy != nullptr) most = fmaxf(most, fabsf(dentropy[rows[i]]));
  }
  shared[threadIdx.x] = most;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < int(blockDim.x); i++) most = fmaxf(most, shared[i]);
  int exponent = (__float_as_int(most) >> 23) - 127;
  if (most == 0.f || exponent > 127) exponent = 0;
  exponent = exponent < -100 ? -100 : exponent > 100 ? 100 : exponent;
  scale[0] = __int_as_float((127 - exponent) << 23);
  scale[1] = __int_as_float((127 + exponent) << 23);
}

__global__ void gather_gradients(const float *dlogprob, const float *dentropy, const float *lse, const float *entropy,
                                 const int64_t *targets, int64_t vocab, const int *rows, const int *count, const float *scale,
                                 const RowGradients out) {
  const int step = int(gridDim.x * blockDim.x);
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < *count; i += step) {
    const int t = rows[i];
    const bool known = targets[t] >= 0 && targets[t] < vocab;
    out.dlogprob[i] = known ? dlogprob[t] * *scale : NAN;
    out.lse[i] = lse[t];
    out.target[i] = known ? int(targets[t]) : -1;
    if (!out.entropies) continue;
    out.dentropy[i] = dentropy[t] * *scale;
    out.entropy[i] = entropy[t];
  }
}

// dhidden (T, K) from the sums of the rows that count, in T; rows that do not count are 0.
template <class T>
__global__ void scatter_rows(const float *sums, const int *rows, const int *count, int width, uint16_t *dhidden,
                             int64_t dhidden_row) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < int64_t(*count) * width; i += step) {
    dhidden[rows[i / width] * dhidden_row + i % width] = from_float<T>(sums[i]).bits;
  }
}
__global__ void clear_skipped_halves(const int64_t *targets, int64_t tokens, int width, uint16_t *dhidden, int64_t dhidden_row) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < tokens * width; i += step) {
    if (targets[i / width] == SKIPPED) dhidden[i / width * dhidden_row + i % width] = 0;
  }
}

namespace {

constexpr int64_t GRADIENT_BYTES = int64_t(1) << 28;

int64_t block_entries(int64_t tokens, int64_t vocab) {
  const int64_t most = GRADIENT_BYTES / (2 * rounded(tokens + 1, LogitTile::BM)) / LogitTile::BN * LogitTile::BN;
  const int64_t all = rounded(vocab, LogitTile::BN), block = most < LogitTile::BN ? int64_t(LogitTile::BN) : most;
  return block < all ? block : all;
}

struct Buffers {
  int *rows, *count;
  float *scale;
  RowGradients row;
  uint16_t *hidden, *g;
  int64_t hidden_row, g_row;
  float *dhidden;
  char *gemm;
  int64_t bytes;
};

gemm::Product hidden_product(const LogprobBackward &a, const Buffers &b, int64_t v0, int64_t entries) {
  const LogprobProblem &p = a.problem;
  gemm::Product g;
  g.a[0] = {reinterpret_cast<const char *>(b.g), b.g_row, 1, p.kind};
  g.b[0] = {p.weight == nullptr ? nullptr : p.weight + v0 * p.weight_row * 2, p.weight_row, 1, p.kind};
  g.depth[0] = entries, g.m = p.tokens, g.n = p.width;
  g.c = reinterpret_cast<char *>(b.dhidden), g.c_row = p.width, g.c_kind = gemm::Kind::f32;
  g.accumulate = v0 > 0, g.m_limit = b.count, g.alpha = b.scale == nullptr ? nullptr : b.scale + 1;
  return g;
}

gemm::Product weight_product(const LogprobBackward &a, const Buffers &b, int64_t v0, int64_t entries) {
  const LogprobProblem &p = a.problem;
  gemm::Product g;
  g.a[0] = {reinterpret_cast<const char *>(b.g), 1, b.g_row, p.kind};
  g.b[0] = {reinterpret_cast<const char *>(b.hidden), b.hidden_row, 1, p.kind};
  g.depth[0] = p.tokens, g.m = entries, g.n = p.width;
  g.c = a.dweight == nullptr ? nullptr : a.dweight + v0 * a.dweight_row * 2, g.c_row = a.dweight_row, g.c_kind = p.kind;
  g.k_limit = b.count, g.alpha = b.scale == nullptr ? nullptr : b.scale + 1;
  return g;
}

Buffers carve(const LogprobBackward &a, bool dhidden, bool dweight, char *workspace, int multiprocessors) {
  const LogprobProblem &p = a.problem;
  Buffers b{};
  Parts at{workspace, 0};
  b.rows = at.take<int>(p.tokens);
  b.count = at.take<int>(1);
  b.scale = at.take<float>(2);
  float **values[] = {&b.row.dlogprob, &b.row.dentropy, &b.row.lse, &b.row.entropy};
  for (float **v : values) *v = at.take<float>(p.tokens);
  b.row.target = at.take<int>(p.tokens);
  b.hidden_row = rounded(p.width, 8);
  b.hidden = at.take<uint16_t>(p.tokens * b.hidden_row);
  b.g_row = block_entries(p.tokens, p.vocab);
  b.g = at.take<uint16_t>(p.tokens * b.g_row);
  if (dhidden) b.dhidden = at.take<float>(p.tokens * p.width);
  int64_t bytes = 0;
  for (int64_t v0 = 0; v0 < p.vocab; v0 += b.g_row) {  // the last block may cut its depth into more slices than the others
    const int64_t entries = p.vocab - v0 < b.g_row ? p.vocab - v0 : b.g_row;
    const int64_t of_hidden = dhidden ? gemm::workspace_bytes(hidden_product(a, b, v0, entries), multiprocessors) : 0;
    const int64_t of_weight = dweight ? gemm::workspace_bytes(weight_product(a, b, v0, entries), multiprocessors) : 0;
    bytes = bytes > of_hidden ? bytes : of_hidden;
    bytes = bytes > of_weight ? bytes : of_weight;
  }
  b.gemm = at.take<char>(bytes);
  b.bytes = at.bytes;
  return b;
}

template <class T>
int backward(const LogprobBackward &a, int multiprocessors, void *stream) {
  const LogprobProblem &p = a.problem;
  Buffers b = carve(a, a.dhidden != nullptr, a.dweight != nullptr, a.workspace, multiprocessors);
  b.row.entropies = a.dentropy != nullptr;
  const int width = int(p.width);
  const uint16_t *hidden = reinterpret_cast<const uint16_t *>(p.hidden), *weight = reinterpret_cast<const uint16_t *>(p.weight);
  EP_TRY(launch(&list_rows, 1, 512, 64 * sizeof(int), stream, p.targets, p.tokens, b.rows, b.count));
  EP_TRY(launch(&gather_rows, grid_for(p.tokens * b.hidden_row / 8), 256, 0, stream, hidden, p.hidden_row, b.rows, b.count,
                int64_t(0), p.tokens, width, b.hidden, b.hidden_row));
  EP_TRY(launch(&find_scale, 1, 256, 256 * sizeof(float), stream, a.dlogprob, a.dentropy, b.rows, b.count, b.scale));
  EP_TRY(launch(&gather_gradients, grid_for(p.tokens), 256, 0, stream, a.dlogprob, a.dentropy, a.lse, a.entropy, p.targets, p.vocab,
                b.rows, b.count, b.scale, b.row));
  for (int64_t v0 = 0; v0 < p.vocab; v0 += b.g_row) {
    const int64_t entries = p.vocab - v0 < b.g_row ? p.vocab - v0 : b.g_row;
    gemm::Problem g{};
    const uint16_t *block = weight + v0 * p.weight_row;
    const bool aligned = reinterpret_cast<uintptr_t>(block) % 16 == 0 && p.weight_row % 8 == 0;
    g.segment[0] = {b.hidden, block, b.hidden_row, p.weight_row, width, true, aligned};
    g.segments = 1, g.m = int(p.tokens), g.n = int(entries), g.row0 = 0, g.m_limit = b.count, g.k_limit = nullptr;
    EP_TRY(make_logits<T>(g, Gradients{b.row, int(v0), p.softcap, b.g, b.g_row}, stream));
    if (a.dhidden != nullptr) EP_TRY(gemm::run(hidden_product(a, b, v0, entries), multiprocessors, b.gemm, stream));
    if (a.dweight != nullptr) EP_TRY(gemm::run(weight_product(a, b, v0, entries), multiprocessors, b.gemm, stream));
  }
  if (a.dhidden == nullptr) return EP_OK;
  uint16_t *dhidden = reinterpret_cast<uint16_t *>(a.dhidden);
  EP_TRY(launch(&clear_skipped_halves, grid_for(p.tokens * width), 256, 0, stream, p.targets, p.tokens, width, dhidden,
                a.dhidden_row));
  return launch(&scatter_rows<T>, grid_for(p.tokens * width), 256, 0, stream, b.dhidden, b.rows, b.count, width, dhidden,
                a.dhidden_row);
}

}  // namespace

int64_t linear_logprob_backward_workspace(int64_t tokens, int64_t width, int64_t vocab, bool dhidden, bool dweight,
                                          int multiprocessors) {
  LogprobBackward a{};
  a.problem.tokens = tokens, a.problem.width = width, a.problem.vocab = vocab, a.problem.weight_row = width;
  a.problem.kind = gemm::Kind::bf16;
  return carve(a, dhidden, dweight, nullptr, multiprocessors).bytes;
}

int linear_logprob_backward(const LogprobBackward &a, void *stream) {
  Device device;
  EP_TRY(current_device(device));
  return a.problem.kind == gemm::Kind::bf16 ? backward<bf16>(a, device.multiprocessors, stream)
                                            : backward<fp16>(a, device.multiprocessors, stream);
}

}  // namespace cuda
}  // namespace ep
