// Log-probabilities, and the direction in which a frozen head's hidden states raise them
// (csrc/include/enginepost/linear_logprob.h).
//
// Rows that count go by in chunks. One product makes a chunk's logits, and no logit leaves the registers as it is: a warp has 64
// columns of a row, a span, in its registers, and reduces them to
//
//   n = ceil(log2 e max z)        S = sum 2^(z log2 e - n)        D = sum 2^(z log2 e - n) (z log2 e - n)
//
// which a second kernel combines in the order of the spans. For the direction it also writes e = z' 2^(z log2 e - n) in 16 bits.
// The reference n is an integer, so that e of every span can be brought to the reference of its row without another rounding (a
// shift of exponents), and sum_v p_v z'_v W[v] = (1 / S) sum_v e_v W[v] is one more product: four T V K FLOP in all, as with logits
// in memory, and one chunk of e instead of them. The sum is divided by S times (sum of e as rounded) / (sum of e), so that weights
// add up to what they should: where one token has nearly all the mass, the rest is a small difference.
//
//   chunk of C rows:  hidden --gather--> H [C, K] --product--> spans (n, S, D) [V / 64, C], e [C, V]
//                     spans --combine--> logprob, lse, entropy, N, 1 / S        e --rescale--> e 2^(n - N)
//                     e W --product--> [C, K] --finish--> direction = z'_y W[y] - that / S
#include <cstdint>

#include "device.h"
#include "linear_logprob.cuh"

namespace ep {
namespace cuda {

struct Spans {
  float *reference, *sum, *spread;  // [span][chunk]
  float *exact, *kept;              // [span][chunk]: sums of e before and after rounding; null where there is no e
  float *target;                    // [chunk]: z of the row's target
  int64_t chunk;
};

struct Logits {  // the epilogue of the product
  Spans spans;
  const int64_t *targets;
  const int *rows;
  int row0;
  float cap;
  uint16_t *e;  // [chunk][e_row], or null
  int64_t e_row;

  template <class T, class TILE>
  __device__ __forceinline__ void operator()(const gemm::Problem &g, float (&acc)[TILE::MB][TILE::NB][4], int m, int n,
                                             int limit) const {
    const int lane = int(threadIdx.x) % 32, column = n + lane % 4 * 2;
    const int64_t span = n / TILE::WN * spans.chunk;
#pragma unroll
    for (int i = 0; i < TILE::MB; i++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = m + i * 16 + half * 8 + lane / 4;
        const int64_t found = row < limit ? targets[rows[row0 + row]] : -1, y = found < g.n ? found : -1;
        float high = -INFINITY;
#pragma unroll
        for (int j = 0; j < TILE::NB; j++) {
#pragma unroll
          for (int e = 0; e < 2; e++) {
            float &z = acc[i][j][half * 2 + e];
            const int v = column + j * 8 + e;
            z = v < g.n ? capped(z, cap) : -INFINITY;
            high = fmaxf(high, z);
            if (v == y) spans.target[row] = z;
          }
        }
        high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
        high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
        const float reference = n < g.n ? (high > -INFINITY ? ceilf(high * LOG2E) : 0.f) : NOTHING;
        float sum = 0.f, spread = 0.f;
#pragma unroll
        for (int j = 0; j < TILE::NB; j++) {
#pragma unroll
          for (int e = 0; e < 2; e++) {
            float &z = acc[i][j][half * 2 + e];
            const bool there = column + j * 8 + e < g.n;
            const float exponent = exponent_of(z, reference), weight = there ? ptx::exp2(exponent) : 0.f;
            sum += weight;
            spread += weight == 0.f ? 0.f : weight * exponent;
            z = there ? weight * slope_of(z, cap) : 0.f;
          }
        }
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        spread += __shfl_xor_sync(0xffffffffu, spread, 1);
        spread += __shfl_xor_sync(0xffffffffu, spread, 2);
        if (row < limit && lane % 4 == 0) {
          spans.reference[span + row] = reference;
          spans.sum[span + row] = sum;
          spans.spread[span + row] = spread;
        }
        if (e == nullptr) continue;
        float exact = 0.f, kept = 0.f;
#pragma unroll
        for (int j = 0; j < TILE::NB; j += 4) {
          uint32_t r[4];
#pragma unroll
          for (int p = 0; p < 4; p++) {
            r[p] = pack<T>(acc[i][j + p][half * 2], acc[i][j + p][half * 2 + 1]);
            const float2 rounded = unpack<T>(r[p]);
            exact += acc[i][j + p][half * 2] + acc[i][j + p][half * 2 + 1];
            kept += rounded.x + rounded.y;
          }
          const uint4 chunk = gemm::chunk_of(r);
          if (row < limit) *reinterpret_cast<uint4 *>(e + row * e_row + n + (j + lane % 4) * 8) = chunk;
        }
        exact += __shfl_xor_sync(0xffffffffu, exact, 1);
        exact += __shfl_xor_sync(0xffffffffu, exact, 2);
        kept += __shfl_xor_sync(0xffffffffu, kept, 1);
        kept += __shfl_xor_sync(0xffffffffu, kept, 2);
        if (row < limit && lane % 4 == 0) {
          spans.exact[span + row] = exact;
          spans.kept[span + row] = kept;
        }
      }
    }
  }
};

struct Row {                           // what is known of a row once its spans are combined
  float *reference, *inverse, *slope;  // [chunk]: N, what e W is multiplied by, z' of the target
};

// Blocks of 32 rows by 8 groups of spans; the groups are added in order.
__global__ void combine_spans(const Spans spans, int64_t count_of_spans, const int *rows, const int *count, int64_t row0, float cap,
                              float *logprob, float *lse, float *entropy, const Row out) {
  constexpr int GROUPS = 8, SUMS = 4;
  float *shared = shared_memory<float>();  // [1 + SUMS][GROUPS][32]
  const int lane = int(threadIdx.x) % 32, group = int(threadIdx.x) / 32;
  const int64_t left = *count - row0, row = int64_t(blockIdx.x) * 32 + lane;
  if (int64_t(blockIdx.x) * 32 >= left) return;
  const bool there = row < left && row < spans.chunk, direction = spans.kept != nullptr;
  float reference = NOTHING;
  for (int64_t s = group; there && s < count_of_spans; s += GROUPS)
    reference = fmaxf(reference, spans.reference[s * spans.chunk + row]);
  shared[group * 32 + lane] = reference;
  __syncthreads();
  for (int w = 0; w < GROUPS; w++) reference = fmaxf(reference, shared[w * 32 + lane]);
  float sums[SUMS] = {0.f, 0.f, 0.f, 0.f};  // S, D, e, e as rounded
  for (int64_t s = group; there && s < count_of_spans; s += GROUPS) {
    const int64_t at = s * spans.chunk + row;
    const float below = spans.reference[at] - reference, factor = power_of_two(below);
    if (factor == 0.f) continue;
    sums[0] += factor * spans.sum[at];
    sums[1] += factor * fmaf(spans.sum[at], below, spans.spread[at]);
    if (!direction) continue;
    sums[2] += factor * spans.exact[at];
    sums[3] += factor * spans.kept[at];
  }
#pragma unroll
  for (int i = 0; i < SUMS; i++) shared[((1 + i) * GROUPS + group) * 32 + lane] = sums[i];
  __syncthreads();
  if (group > 0 || !there) return;
#pragma unroll
  for (int i = 0; i < SUMS; i++) {
    for (int w = 1; w < GROUPS; w++) sums[i] += shared[((1 + i) * GROUPS + w) * 32 + lane];
  }
  const int64_t t = rows[row0 + row];
  const float z = spans.target[row], sum = sums[0], beyond = log2f(sum);
  logprob[t] = (exponent_of(z, reference) - beyond) * LN2;
  lse[t] = fmaf(reference, LN2, fmaf(reference, LN2_REST, beyond * LN2));
  if (entropy != nullptr) entropy[t] = (beyond - sums[1] / sum) * LN2;
  if (!direction) return;
  out.reference[row] = reference;
  out.inverse[row] = (sums[3] > 0.f ? sums[2] / sums[3] : 1.f) / sum;
  out.slope[row] = slope_of(z, cap);
}

// e (chunk, e_row) brought from the reference of its span to that of its row.
template <class T>
__global__ void rescale(uint16_t *e, int64_t e_row, const Spans spans, const float *reference, const int *count, int64_t row0) {
  const int64_t left = *count - row0, n = left < spans.chunk ? left : spans.chunk, chunks = e_row / 8;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n * chunks; i += step) {
    const int64_t row = i / chunks, column = i % chunks * 8;
    const float below = spans.reference[column / LogitTile::WN * spans.chunk + row] - reference[row];
    if (below == 0.f) continue;
    const float factor = power_of_two(below);
    uint4 *at = reinterpret_cast<uint4 *>(e + row * e_row + column);
    uint4 v = *at;
    uint32_t *pairs[4] = {&v.x, &v.y, &v.z, &v.w};
#pragma unroll
    for (int p = 0; p < 4; p++) {
      const float2 pair = unpack<T>(*pairs[p]);
      *pairs[p] = pack<T>(pair.x * factor, pair.y * factor);
    }
    *at = v;
  }
}

template <class T>
__global__ void finish_direction(const float *product, const uint16_t *weight, int64_t weight_row, const int64_t *targets,
                                 int64_t vocab, const int *rows, const int *count, int64_t row0, int64_t chunk, int width,
                                 const Row of, float *direction, int64_t direction_row) {
  const int64_t left = *count - row0, n = left < chunk ? left : chunk, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n * width; i += step) {
    const int64_t row = i / width, column = i % width, t = rows[row0 + row], y = targets[t];
    const float own = y >= 0 && y < vocab ? to_float(T{weight[y * weight_row + column]}) : NAN;
    direction[t * direction_row + column] = of.slope[row] * own - product[i] * of.inverse[row];
  }
}

// Zeros where the target is skipped. `target` of a chunk begins as NaN, which is what a target outside of the vocabulary leaves.
__global__ void clear_skipped(const int64_t *targets, int64_t tokens, float *logprob, float *lse, float *entropy) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; t < tokens; t += step) {
    if (targets[t] != SKIPPED) continue;
    logprob[t] = 0.f, lse[t] = 0.f;
    if (entropy != nullptr) entropy[t] = 0.f;
  }
}
__global__ void clear_skipped_rows(const int64_t *targets, int64_t tokens, int width, float *direction, int64_t direction_row) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < tokens * width; i += step) {
    if (targets[i / width] == SKIPPED) direction[i / width * direction_row + i % width] = 0.f;
  }
}
__global__ void fill(float *x, int64_t n, float value) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) x[i] = value;
}

namespace {

constexpr int64_t LOGITS_BYTES = int64_t(1) << 28, SPAN_BYTES = int64_t(1) << 26, MOST_ROWS = 8192;

// Rows of a chunk: as many as e, or the spans where there is no e, have room for; whole tiles.
int64_t chunk_rows(int64_t tokens, int64_t vocab, bool direction) {
  const int64_t padded = rounded(vocab, LogitTile::BN);
  const int64_t most = direction ? LOGITS_BYTES / (padded * 2) : SPAN_BYTES / (padded / LogitTile::WN * 12);
  const int64_t capped = most < MOST_ROWS ? most : MOST_ROWS;
  const int64_t whole = capped / LogitTile::BM * LogitTile::BM, all = rounded(tokens, LogitTile::BM);
  const int64_t rows = whole < LogitTile::BM ? int64_t(LogitTile::BM) : whole;
  return rows < all ? rows : all;
}

struct Buffers {
  int *rows, *count;
  uint16_t *hidden;
  int64_t hidden_row;
  Spans spans;
  int64_t span_count;
  uint16_t *e;
  int64_t e_row;
  Row row;
  float *product;
  char *gemm;
  int64_t bytes;
};

gemm::Product direction_product(const LogprobProblem &p, const Buffers &b, int64_t row0) {
  gemm::Product g;
  g.a[0] = {reinterpret_cast<const char *>(b.e), b.e_row, 1, p.kind};
  g.b[0] = {p.weight, p.weight_row, 1, p.kind};
  g.depth[0] = p.vocab, g.m = b.spans.chunk, g.n = p.width;
  g.c = reinterpret_cast<char *>(b.product), g.c_row = p.width, g.c_kind = gemm::Kind::f32;
  g.m_limit = b.count, g.row0 = row0;
  return g;
}

Buffers carve(const LogprobProblem &p, bool direction, char *workspace, int multiprocessors) {
  Buffers b{};
  Parts at{workspace, 0};
  b.rows = at.take<int>(p.tokens);
  b.count = at.take<int>(1);
  b.spans.chunk = chunk_rows(p.tokens, p.vocab, direction);
  b.hidden_row = rounded(p.width, 8);
  b.hidden = at.take<uint16_t>(b.spans.chunk * b.hidden_row);
  b.e_row = rounded(p.vocab, LogitTile::BN);
  b.span_count = b.e_row / LogitTile::WN;
  b.spans.reference = at.take<float>(b.span_count * b.spans.chunk);
  b.spans.sum = at.take<float>(b.span_count * b.spans.chunk);
  b.spans.spread = at.take<float>(b.span_count * b.spans.chunk);
  b.spans.target = at.take<float>(b.spans.chunk);
  if (direction) {
    b.spans.exact = at.take<float>(b.span_count * b.spans.chunk);
    b.spans.kept = at.take<float>(b.span_count * b.spans.chunk);
    b.row.reference = at.take<float>(b.spans.chunk);
    b.row.inverse = at.take<float>(b.spans.chunk);
    b.row.slope = at.take<float>(b.spans.chunk);
    b.e = at.take<uint16_t>(b.spans.chunk * b.e_row);
    b.product = at.take<float>(b.spans.chunk * p.width);
    b.gemm = at.take<char>(gemm::workspace_bytes(direction_product(p, b, 0), multiprocessors));
  }
  b.bytes = at.bytes;
  return b;
}

template <class T>
int forward(const LogprobForward &a, int multiprocessors, void *stream) {
  const LogprobProblem &p = a.problem;
  const Buffers b = carve(p, a.direction != nullptr, a.workspace, multiprocessors);
  const int width = int(p.width);
  const int64_t chunk = b.spans.chunk;
  const uint16_t *hidden = reinterpret_cast<const uint16_t *>(p.hidden), *weight = reinterpret_cast<const uint16_t *>(p.weight);
  EP_TRY(launch(&list_rows, 1, 512, 64 * sizeof(int), stream, p.targets, p.tokens, b.rows, b.count));
  EP_TRY(launch(&clear_skipped, grid_for(p.tokens), 256, 0, stream, p.targets, p.tokens, a.logprob, a.lse, a.entropy));
  if (a.direction != nullptr) {
    EP_TRY(launch(&clear_skipped_rows, grid_for(p.tokens * width), 256, 0, stream, p.targets, p.tokens, width, a.direction,
                  a.direction_row));
  }
  for (int64_t row0 = 0; row0 < p.tokens; row0 += chunk) {
    EP_TRY(launch(&gather_rows, grid_for(chunk * b.hidden_row / 8), 256, 0, stream, hidden, p.hidden_row, b.rows, b.count, row0,
                  chunk, width, b.hidden, b.hidden_row));
    EP_TRY(launch(&fill, grid_for(chunk), 256, 0, stream, b.spans.target, chunk, NAN));
    gemm::Problem g{};
    const bool aligned = reinterpret_cast<uintptr_t>(p.weight) % 16 == 0 && p.weight_row % 8 == 0;
    g.segment[0] = {b.hidden, weight, b.hidden_row, p.weight_row, width, true, aligned};
    g.segments = 1, g.m = int(chunk), g.n = int(p.vocab), g.row0 = int(row0), g.m_limit = b.count, g.k_limit = nullptr;
    const Logits logits{b.spans, p.targets, b.rows, int(row0), p.softcap, b.e, b.e_row};
    EP_TRY(make_logits<T>(g, logits, stream));
    EP_TRY(launch(&combine_spans, dim3(unsigned(ceil_div(chunk, 32))), 256, 5 * 8 * 32 * sizeof(float), stream, b.spans,
                  b.span_count, b.rows, b.count, row0, p.softcap, a.logprob, a.lse, a.entropy, b.row));
    if (a.direction == nullptr) continue;
    EP_TRY(
        launch(&rescale<T>, grid_for(chunk * b.e_row / 8), 256, 0, stream, b.e, b.e_row, b.spans, b.row.reference, b.count, row0));
    EP_TRY(gemm::run(direction_product(p, b, row0), multiprocessors, b.gemm, stream));
    EP_TRY(launch(&finish_direction<T>, grid_for(chunk * width), 256, 0, stream, b.product, weight, p.weight_row, p.targets,
                  p.vocab, b.rows, b.count, row0, chunk, width, b.row, a.direction, a.direction_row));
  }
  return EP_OK;
}

}  // namespace

int64_t linear_logprob_forward_workspace(int64_t tokens, int64_t width, int64_t vocab, bool direction, int multiprocessors) {
  LogprobProblem p{};
  p.tokens = tokens, p.width = width, p.vocab = vocab, p.weight_row = width, p.kind = gemm::Kind::bf16;
  return carve(p, direction, nullptr, multiprocessors).bytes;
}

int linear_logprob_forward(const LogprobForward &a, void *stream) {
  Device device;
  EP_TRY(current_device(device));
  return a.problem.kind == gemm::Kind::bf16 ? forward<bf16>(a, device.multiprocessors, stream)
                                            : forward<fp16>(a, device.multiprocessors, stream);
}

}  // namespace cuda
}  // namespace ep
