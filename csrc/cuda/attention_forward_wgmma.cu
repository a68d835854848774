// Forward attention for sm_90a, after Shah et al. 2024 (FlashAttention-3, arXiv 2407.08608): TMA, wgmma, warps with a trade.
//
//   warpgroup 0      one thread brings Q, and tiles of K and V from the last to the first, two of each on their way
//   warpgroups 1, 2  64 rows each: S = Q K^T from shared memory, softmax, O += P V with P in registers
//
//   shared   Q [D / 64][128 rows][64] | K [2 stages][D / 64][N keys][64] | V the same | mbarriers; rows of 128 bytes, swizzled
//
// Two overlaps hide the softmax: inside a warpgroup S of the next tile is on its way while P V of this one is (so P, S and O live
// in registers together), and the two warpgroups take turns with the tensor cores (named barriers), one multiplying while the other
// exponentiates.
//
// Rows are stacked as in attention.h, but a tile is a whole number of tokens, floor(128 / group): then TMA reads it as one box of a
// tensor (token, key head, head of the group, D). Keys beyond a sequence's end are those of the next one: the mask hides their
// scores, and as 0 times a NaN is one, their rows of V are cleared before they are multiplied.
#include "attention_tile.cuh"
#include "attention_wgmma.cuh"

namespace ep {
namespace cuda {

namespace {

constexpr int M = 128, N = 128, STAGES = 2, THREADS = 384, CONSUMER_WARPS = 8;

struct WgmmaForward {
  TensorMap q, k, v;
  ForwardLaunch a;
  int tokens;  // of a tile
};

// Where everything lies in shared memory, in bytes.
template <int D>
struct Layout {
  static constexpr int PANELS = D / 64, Q_PANEL = M * 128, KEY_PANEL = N * 128, KEY_TILE = PANELS * KEY_PANEL;
  static constexpr int K = PANELS * Q_PANEL, V = K + STAGES * KEY_TILE, BARRIERS = V + STAGES * KEY_TILE;
  static constexpr int Q_FULL = BARRIERS, K_FULL = Q_FULL + 8, K_EMPTY = K_FULL + 8 * STAGES, V_FULL = K_EMPTY + 8 * STAGES,
                       V_EMPTY = V_FULL + 8 * STAGES, BYTES = V_EMPTY + 8 * STAGES;
  static_assert(BYTES <= 227 * 1024, "the shared memory of a block");
};

// The tile of a block: tokens [token0, token0 + ...) of a sequence, and the tiles of keys that any of its rows sees.
struct Work {
  Sequence seq;
  int kv_head, token0, rows, tile_begin, tile_end;
};
__device__ __forceinline__ Work work_of(const Problem &s, int tokens) {
  Work w;
  const int number = gridDim.x / s.kv_heads - 1 - blockIdx.x / s.kv_heads;  // the last tiles see most: they go first
  int local;
  w.kv_head = blockIdx.x % s.kv_heads;
  w.seq = sequence_of(s, find_sequence(s.cu_q, s.sequences, 1, tokens, number, local));
  w.token0 = local * tokens;
  const int count = min(tokens, w.seq.queries - w.token0);
  w.rows = count * s.group;
  const Span first = visible(s, w.seq, w.token0), last = visible(s, w.seq, w.token0 + count - 1);
  w.tile_begin = first.begin / N, w.tile_end = last.end > first.begin ? (last.end + N - 1) / N : w.tile_begin;
  return w;
}

template <int D>
__device__ __forceinline__ void produce(const WgmmaForward &x, const Work &w, uint32_t shared) {
  using L = Layout<D>;
  const Problem &s = x.a.shape;
  const int tiles = w.tile_end - w.tile_begin;
  const auto load = [&](const TensorMap &map, int to, int full, int empty, int i) {
    const int stage = i % STAGES;
    ptx::mbarrier_wait(shared + empty + 8 * stage, (i / STAGES & 1) ^ 1);
    ptx::mbarrier_arrive_expect(shared + full + 8 * stage, L::KEY_TILE);
    const int key = w.seq.k0 + (w.tile_end - 1 - i) * N;
#pragma unroll
    for (int p = 0; p < L::PANELS; p++) {
      ptx::tma_load(shared + to + stage * L::KEY_TILE + p * L::KEY_PANEL, map, shared + full + 8 * stage, p * 64, w.kv_head, key);
    }
  };
  if (tiles == 0) return;
  ptx::mbarrier_arrive_expect(shared + L::Q_FULL, L::PANELS * x.tokens * s.group * 128);
#pragma unroll
  for (int p = 0; p < L::PANELS; p++) {
    ptx::tma_load(shared + p * L::Q_PANEL, x.q, shared + L::Q_FULL, p * 64, 0, w.kv_head, w.seq.q0 + w.token0);
  }
  load(x.k, L::K, L::K_FULL, L::K_EMPTY, 0);
  for (int i = 1; i < tiles; i++) {  // in the order in which they are wanted
    load(x.k, L::K, L::K_FULL, L::K_EMPTY, i);
    load(x.v, L::V, L::V_FULL, L::V_EMPTY, i - 1);
  }
  load(x.v, L::V, L::V_FULL, L::V_EMPTY, tiles - 1);
}

template <class T, int D>
__device__ __forceinline__ void consume(const WgmmaForward &x, const Work &w, uint32_t shared, int group) {
  using L = Layout<D>;
  const Problem &s = x.a.shape;
  const int thread = threadIdx.x % 128, lane = thread % 32, tiles = w.tile_end - w.tile_begin;
  const int row0 = group * 64 + thread / 32 * 16 + lane / 4;  // and row0 + 8

  float out[D / 8][4], row_max[2] = {-EP_INFINITY, -EP_INFINITY}, row_sum[2] = {0.f, 0.f};
  clear(out);
  if (tiles > 0) {
    const Span see[2] = {visible(s, w.seq, w.token0 + row0 / s.group), visible(s, w.seq, w.token0 + (row0 + 8) / s.group)};
    const Span first = visible(s, w.seq, w.token0 + group * 64 / s.group);
    const Span last = visible(s, w.seq, w.token0 + min(group * 64 + 63, w.rows - 1) / s.group);
    float scores[N / 8][4];
    uint32_t weights[N / 16][4];

    const auto multiply_keys = [&](int i) {  // scores = Q K^T of tile i
      const int stage = i % STAGES;
      const uint64_t q = ptx::matrix(shared + group * 64 * 128, 0, 1024);
      const uint64_t k = ptx::matrix(shared + L::K + stage * L::KEY_TILE, 0, 1024);
      ptx::mbarrier_wait(shared + L::K_FULL + 8 * stage, i / STAGES & 1);
      ptx::wgmma_hold(scores);
      ptx::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < D / 16; kk++) {
        const int panel = kk / 4, step = kk % 4 * 32;
        ptx::wgmma<T, false, false>(scores, ptx::moved(q, panel * L::Q_PANEL + step), ptx::moved(k, panel * L::KEY_PANEL + step),
                                    kk > 0);
      }
      ptx::wgmma_commit();
    };
    const auto multiply_values = [&](int i) {  // out += weights V of tile i
      const int stage = i % STAGES, end = w.seq.keys - (w.tile_end - 1) * N;
      const uint32_t tile = shared + L::V + stage * L::KEY_TILE;
      const uint64_t v = ptx::matrix(tile, L::KEY_PANEL, 1024);
      ptx::mbarrier_wait(shared + L::V_FULL + 8 * stage, i / STAGES & 1);
      if (i == 0 && end < N) clear_rows<D, N>(shared_memory<unsigned char>() + (tile - shared), end, N, thread, 4 + group);
      ptx::wgmma_hold(out);
      ptx::wgmma_hold(weights);
      ptx::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < N / 16; kk++) ptx::wgmma<T, true>(out, weights[kk], ptx::moved(v, kk * 2048), true);
      ptx::wgmma_commit();
    };
    const auto release = [&](int empty, int i) {
      if (lane == 0) ptx::mbarrier_arrive(shared + empty + 8 * (i % STAGES));
    };
    float rescale[2];
    const auto softmax = [&](int i) {
      const int k0 = (w.tile_end - 1 - i) * N;
      transform(scores, s.score);
      if (k0 < last.begin || k0 + N > first.end) {
#pragma unroll
        for (int h = 0; h < 2; h++) mask_row(scores, h, see[h].begin - k0, see[h].end - k0, lane);
      }
      softmax_step(scores, s.score.after, row_max, row_sum, rescale);
    };
    const auto make_weights = [&] {
#pragma unroll
      for (int kk = 0; kk < N / 16; kk++) as_operand<T>(weights[kk], scores, kk);
    };

    ptx::mbarrier_wait(shared + L::Q_FULL, 0);
    multiply_keys(0);
    ptx::wgmma_wait<0>(scores);
    release(L::K_EMPTY, 0);
    softmax(0);
    make_weights();
    // Turns: barrier 2 + g opens when it is warpgroup g's turn to start its products.
    if (group == 1 && tiles > 1) ptx::named_barrier_arrive(2, 256);
#pragma unroll 1
    for (int i = 1; i < tiles; i++) {
      ptx::named_barrier_sync(2 + group, 256);
      multiply_keys(i);
      multiply_values(i - 1);
      if (group == 0 || i + 1 < tiles) ptx::named_barrier_arrive(3 - group, 256);
      ptx::wgmma_wait<1>(scores);
      release(L::K_EMPTY, i);
      softmax(i);
      ptx::wgmma_wait<0>(out, weights);
      release(L::V_EMPTY, i - 1);
      rescale_rows(out, rescale);
      make_weights();
    }
    multiply_values(tiles - 1);
    ptx::wgmma_wait<0>(out, weights);
  }

  const StackedRows<T> out_rows = stacked_rows<T>(x.a.out, s, w.seq, w.kv_head, w.token0 * s.group);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float sum = row_total(row_sum[h]);
    const int row = row0 + h * 8;
    if (row >= w.rows) continue;
    const bool blind = row_max[h] == -EP_INFINITY && sum == 0.f;
    const float factor = blind ? 0.f : 1.f / sum;
    T *to = out_rows(row);
#pragma unroll
    for (int d = 0; d < D / 8; d++) {
      store_pair(to, d * 8 + lane % 4 * 2, s.head_dim, x.a.out.vector, out[d][2 * h] * factor, out[d][2 * h + 1] * factor);
    }
    if (lane % 4 == 0) {
      const int of = row / s.group;
      x.a.lse[int64_t(w.kv_head * s.group + row - of * s.group) * s.tokens + w.seq.q0 + w.token0 + of] =
          blind ? -EP_INFINITY : row_max[h] * s.score.after * LN2 + logf(sum);
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(THREADS, 1) attention_forward_wgmma_kernel(const __grid_constant__ WgmmaForward x) {
#if EP_SM90A
  using L = Layout<D>;
  const Work w = work_of(x.a.shape, x.tokens);
  if (w.rows <= 0) return;
  const uint32_t shared = ptx::shared_address(shared_memory<unsigned char>());
  const int group = int(threadIdx.x) / 128;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(shared + L::Q_FULL, 1);
    for (int i = 0; i < STAGES; i++) {
      ptx::mbarrier_init(shared + L::K_FULL + 8 * i, 1), ptx::mbarrier_init(shared + L::V_FULL + 8 * i, 1);
      ptx::mbarrier_init(shared + L::K_EMPTY + 8 * i, CONSUMER_WARPS);
      ptx::mbarrier_init(shared + L::V_EMPTY + 8 * i, CONSUMER_WARPS);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (group == 0) {
    ptx::fewer_registers<24>();
    if (threadIdx.x < 32 && ptx::elected()) produce<D>(x, w, shared);
  } else {
    ptx::more_registers<240>();
    consume<T, D>(x, w, shared, group - 1);
  }
#endif
}

template <class T, int D>
int forward(const WgmmaForward &x, void *stream) {
  const int64_t blocks = (int64_t(x.a.shape.tokens) / x.tokens + x.a.shape.sequences) * x.a.shape.kv_heads;
  return launch(attention_forward_wgmma_kernel<T, D>, dim3(unsigned(blocks)), dim3(THREADS), size_t(Layout<D>::BYTES), stream, x);
}

}  // namespace

int launch_forward_wgmma(const ForwardLaunch &a, void *stream) {
  WgmmaForward x;
  x.a = a;
  x.tokens = M / a.shape.group;
  if (int status = map_queries(x.q, a.q, a.shape, x.tokens)) return status;
  if (int status = map_keys(x.k, a.k, a.shape, N)) return status;
  if (int status = map_keys(x.v, a.v, a.shape, N)) return status;
  const bool narrow = a.shape.head_dim <= 64;
  if (a.shape.bf16) return narrow ? forward<bf16, 64>(x, stream) : forward<bf16, 128>(x, stream);
  return narrow ? forward<fp16, 64>(x, stream) : forward<fp16, 128>(x, stream);
}

}  // namespace cuda
}  // namespace ep
