// Backward attention for sm_90a: the algorithm of attention_backward.cu (delta, ticket, turn, dq_sum and their order are explained
// there) with TMA and wgmma, after Shah et al. 2024 (FlashAttention-3, arXiv 2407.08608, algorithm 3).
//
//   warpgroup 0      warp 0: one thread brings K and V once, and tiles of Q and dout, two on their way; warp 1: their lse and delta
//   warpgroups 1, 2  64 keys each. S^T = K Q^T, dP^T = V dout^T from shared memory; P^T and dS^T stay in registers as operands of
//                    dV += P^T dout and dK += dS^T Q. dS^T also goes to shared memory, two buffers in turn, for dQ = dS K, of which
//                    each warpgroup makes half: of the columns (D 128) or of the rows (D 64)
//
//   shared   K, V [D / 64][128 keys][64] | 2 x Q, 2 x dout [D / 64][M rows][64] | 2 x dS^T [M / 64][128 keys][64] | lse, delta
//            | mbarriers; rows of 128 bytes, swizzled
//
// A tile of rows is floor(M / group) whole tokens, one box for TMA; rows that no box writes are zeros from the beginning. Where a
// tile goes beyond its sequence, rows (or keys) of the next one are cleared: their weights are 0, and 0 times a NaN is a NaN.
#include "attention_tile.cuh"
#include "attention_wgmma.cuh"

namespace ep {
namespace cuda {

namespace {

constexpr int N = 128, STAGES = 2, THREADS = 384, CONSUMERS = 256;

struct WgmmaBackward {
  TensorMap q, dout, k, v;
  BackwardLaunch a;
  int tokens;  // of a tile of rows
};

template <int D>
struct Layout {
  static constexpr int M = wgmma_backward_rows(D), PANELS = D / 64, KEY_PANEL = N * 128, ROW_PANEL = M * 128;
  static constexpr int KEY_TILE = PANELS * KEY_PANEL, ROW_TILE = PANELS * ROW_PANEL, DS_TILE = M / 64 * KEY_PANEL;
  static constexpr int K = 0, V = K + KEY_TILE, Q = V + KEY_TILE, DOUT = Q + STAGES * ROW_TILE, DS = DOUT + STAGES * ROW_TILE;
  static constexpr int LSE = DS + 2 * DS_TILE, DELTA = LSE + STAGES * M * 4, BARRIERS = DELTA + STAGES * M * 4;
  static constexpr int KV_FULL = BARRIERS, FULL = KV_FULL + 8, EMPTY = FULL + 8 * STAGES, TICKET = EMPTY + 8 * STAGES,
                       BYTES = TICKET + 8;
  static_assert(BYTES <= 227 * 1024, "the shared memory of a block");
  static constexpr bool BY_COLUMNS = M == 64;  // how the warpgroups share dQ
  static_assert(M * D == 8192, "a thread has 32 numbers of a tile of dQ");
};

// Tokens [begin, end) of a sequence that see key j, as it were without end of the sequence.
struct TokenSpan {
  int begin, end;
};
__device__ __forceinline__ TokenSpan seeing(const Problem &s, const Sequence &seq, int j) {
  constexpr int FAR = 0x40000000;
  if (j >= seq.keys) return {FAR, FAR};
  const int token = j - (seq.keys - seq.queries);
  return {s.causal ? max(token, 0) : 0, s.window > 0 ? token + s.window : FAR};
}

// A block's keys, and the tiles of rows that see any of them.
struct Work {
  Sequence seq;
  int kv_head, local, k0, tile_begin, tile_end;
  int64_t first_tile;  // of the sequence, in dq_sum and turn
};
__device__ __forceinline__ Work work_of(const Problem &s, int tokens, int ticket) {
  Work w;
  w.kv_head = ticket % s.kv_heads;
  const int number = gridDim.x / s.kv_heads - 1 - ticket / s.kv_heads;
  w.seq = sequence_of(s, find_sequence(s.cu_k != nullptr ? s.cu_k : s.cu_q, s.sequences, 1, N, number, w.local));
  w.k0 = w.local * N;
  const TokenSpan first = seeing(s, w.seq, w.k0), last = seeing(s, w.seq, min(w.k0 + N, w.seq.keys) - 1);
  w.tile_begin = first.begin / tokens;
  w.tile_end = w.k0 < w.seq.keys ? (min(last.end, w.seq.queries) + tokens - 1) / tokens : 0;
  w.first_tile = int64_t(s.cu_q[w.seq.b] / tokens + w.seq.b) * s.kv_heads + w.kv_head;
  return w;
}

template <int D>
__device__ __forceinline__ void produce(const WgmmaBackward &x, const Work &w, uint32_t shared) {
  using L = Layout<D>;
  const Problem &s = x.a.shape;
  if (w.tile_begin >= w.tile_end) return;
  ptx::mbarrier_arrive_expect(shared + L::KV_FULL, 2 * L::KEY_TILE);
#pragma unroll
  for (int p = 0; p < L::PANELS; p++) {
    ptx::tma_load(shared + L::K + p * L::KEY_PANEL, x.k, shared + L::KV_FULL, p * 64, w.kv_head, w.seq.k0 + w.k0);
    ptx::tma_load(shared + L::V + p * L::KEY_PANEL, x.v, shared + L::KV_FULL, p * 64, w.kv_head, w.seq.k0 + w.k0);
  }
  for (int i = w.tile_begin; i < w.tile_end; i++) {
    const int n = i - w.tile_begin, stage = n % STAGES, token = w.seq.q0 + i * x.tokens;
    const uint32_t full = shared + L::FULL + 8 * stage;
    ptx::mbarrier_wait(shared + L::EMPTY + 8 * stage, (n / STAGES & 1) ^ 1);
    ptx::mbarrier_arrive_expect(full, 2 * L::PANELS * x.tokens * s.group * 128);
#pragma unroll
    for (int p = 0; p < L::PANELS; p++) {
      const uint32_t at = shared + stage * L::ROW_TILE + p * L::ROW_PANEL;
      ptx::tma_load(at + L::Q, x.q, full, p * 64, 0, w.kv_head, token);
      ptx::tma_load(at + L::DOUT, x.dout, full, p * 64, 0, w.kv_head, token);
    }
  }
}

// lse (in units of log 2; infinite where nothing is seen, so that P is 0) and delta of the rows of each tile.
template <int D>
__device__ __forceinline__ void produce_numbers(const WgmmaBackward &x, const Work &w, uint32_t shared, int lane) {
  using L = Layout<D>;
  const Problem &s = x.a.shape;
  float *const lse_tile = reinterpret_cast<float *>(shared_memory<unsigned char>() + L::LSE);
  float *const delta_tile = reinterpret_cast<float *>(shared_memory<unsigned char>() + L::DELTA);
  for (int i = w.tile_begin; i < w.tile_end; i++) {
    const int n = i - w.tile_begin, stage = n % STAGES, token0 = i * x.tokens;
    const int count = min(x.tokens, w.seq.queries - token0) * s.group;
    ptx::mbarrier_wait(shared + L::EMPTY + 8 * stage, (n / STAGES & 1) ^ 1);
#pragma unroll
    for (int r = lane; r < L::M; r += 32) {
      const int of = r / s.group;
      const int64_t from = int64_t(w.kv_head * s.group + r - of * s.group) * s.tokens + w.seq.q0 + token0 + of;
      const float lse = r < count ? x.a.lse[from] : EP_INFINITY;
      lse_tile[stage * L::M + r] = lse == -EP_INFINITY ? EP_INFINITY : lse * LOG2E;
      delta_tile[stage * L::M + r] = r < count ? x.a.delta[from] : 0.f;
    }
    ptx::mbarrier_arrive(shared + L::FULL + 8 * stage);
  }
}

template <class T, int D>
__device__ __forceinline__ void consume(const WgmmaBackward &x, const Work &w, uint32_t shared, int group) {
  using L = Layout<D>;
  constexpr int M = L::M;
  const Problem &s = x.a.shape;
  const int thread = threadIdx.x % 128, member = threadIdx.x - 128;
  unsigned char *const memory = shared_memory<unsigned char>();

  float dk[D / 8][4], dv[D / 8][4];
  clear(dk), clear(dv);
  if (w.tile_begin < w.tile_end) {
    ptx::mbarrier_wait(shared + L::KV_FULL, 0);
    if (w.seq.keys - w.k0 < N) clear_rows<D, N>(memory + L::K, w.seq.keys - w.k0, N, thread, 2 + group);
    const uint64_t k = ptx::matrix(shared + L::K + group * 64 * 128, 0, 1024),
                   v = ptx::matrix(shared + L::V + group * 64 * 128, 0, 1024);

#pragma unroll 1
    for (int i = w.tile_begin; i < w.tile_end; i++) {
      const int n = i - w.tile_begin, stage = n % STAGES;
      const int lane = ptx::opaque(thread % 32);                  // addresses are cheaper to make again than to keep
      const int key0 = group * 64 + thread / 32 * 16 + lane / 4;  // and key0 + 8
      const uint32_t q_tile = shared + L::Q + stage * L::ROW_TILE, dout_tile = shared + L::DOUT + stage * L::ROW_TILE;
      float p[M / 8][4], ds[M / 8][4];
      ptx::mbarrier_wait(shared + L::FULL + 8 * stage, n / STAGES & 1);
      const int count = (w.seq.queries - i * x.tokens) * s.group;
      if (count < x.tokens * s.group) {
        clear_rows<D, M>(memory + L::Q + stage * L::ROW_TILE, count, x.tokens * s.group, thread, 2 + group);
        clear_rows<D, M>(memory + L::DOUT + stage * L::ROW_TILE, count, x.tokens * s.group, thread, 2 + group);
      }
      ptx::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < D / 16; kk++) {
        const int panel = kk / 4, step = kk % 4 * 32;
        ptx::wgmma<T, false, false>(p, ptx::moved(k, panel * L::KEY_PANEL + step),
                                    ptx::moved(ptx::matrix(q_tile, 0, 1024), panel * L::ROW_PANEL + step), kk > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < D / 16; kk++) {
        const int panel = kk / 4, step = kk % 4 * 32;
        ptx::wgmma<T, false, false>(ds, ptx::moved(v, panel * L::KEY_PANEL + step),
                                    ptx::moved(ptx::matrix(dout_tile, 0, 1024), panel * L::ROW_PANEL + step), kk > 0);
      }
      ptx::wgmma_commit();

      // Element e of p[j]: key key0 + e / 2 * 8, row j * 8 + lane % 4 * 2 + e % 2.
      const float *const lse_tile = reinterpret_cast<float *>(memory + L::LSE) + stage * M + lane % 4 * 2;
      const float *const delta_tile = reinterpret_cast<float *>(memory + L::DELTA) + stage * M + lane % 4 * 2;
      if (s.score.kind == ScoreScale::PLAIN) {
        ptx::wgmma_wait<1>(p);
#pragma unroll
        for (int j = 0; j < M / 8; j++) {
          const float2 lse = *reinterpret_cast<const float2 *>(lse_tile + j * 8);
#pragma unroll
          for (int e = 0; e < 4; e++) p[j][e] = ptx::exp2(p[j][e] * s.score.after - (e % 2 == 0 ? lse.x : lse.y));
        }
        ptx::wgmma_wait<0>(ds);
#pragma unroll
        for (int j = 0; j < M / 8; j++) {
          const float2 delta = *reinterpret_cast<const float2 *>(delta_tile + j * 8);
#pragma unroll
          for (int e = 0; e < 4; e++) ds[j][e] = p[j][e] * (ds[j][e] - (e % 2 == 0 ? delta.x : delta.y));
        }
      } else {
        ptx::wgmma_wait<0>(p, ds);
        const bool is_capped = s.score.kind == ScoreScale::CAPPED;
#pragma unroll
        for (int j = 0; j < M / 8; j++) {
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const float y = p[j][e] * s.score.before, t = tanh_of(y);
            p[j][e] = ptx::exp2((is_capped ? s.score.cap * t : y) - lse_tile[j * 8 + e % 2]);
            ds[j][e] = p[j][e] * (ds[j][e] - delta_tile[j * 8 + e % 2]) * (is_capped ? 1.f - t * t : 1.f);
          }
        }
      }
      const TokenSpan first = seeing(s, w.seq, w.k0), whole = seeing(s, w.seq, w.k0 + N - 1);
      if (i * x.tokens < whole.begin || (i + 1) * x.tokens > first.end) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const TokenSpan span = seeing(s, w.seq, w.k0 + key0 + h * 8);
          const int begin = min(span.begin - i * x.tokens, M) * s.group - lane % 4 * 2;
          const int end = min(span.end - i * x.tokens, M) * s.group - lane % 4 * 2;
#pragma unroll
          for (int j = 0; j < M / 8; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
              if (j * 8 + e < begin || j * 8 + e >= end) p[j][2 * h + e] = 0.f, ds[j][2 * h + e] = 0.f;
            }
          }
        }
      }

      uint32_t p_held[M / 16][4], ds_held[M / 16][4];
      unsigned char *const ds_tile = memory + L::DS + n % 2 * L::DS_TILE;
#pragma unroll
      for (int j = 0; j < M / 8; j++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          p_held[j / 2][j % 2 * 2 + h] = pack<T>(p[j][2 * h], p[j][2 * h + 1]);
          ds_held[j / 2][j % 2 * 2 + h] = pack<T>(ds[j][2 * h], ds[j][2 * h + 1]);
          const int key = key0 + h * 8, chunk = j % 8 ^ (lane / 4);  // key % 8 is lane / 4
          *reinterpret_cast<uint32_t *>(ds_tile + j / 8 * L::KEY_PANEL + key * 128 + chunk * 16 + lane % 4 * 4) =
              ds_held[j / 2][j % 2 * 2 + h];
        }
      }
      ptx::wgmma_hold(p_held);
      ptx::wgmma_hold(dv);
      ptx::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < M / 16; kk++)
        ptx::wgmma<T, true>(dv, p_held[kk], ptx::moved(ptx::matrix(dout_tile, L::ROW_PANEL, 1024), kk * 2048), true);
      ptx::wgmma_commit();
      ptx::fence_async();
      ptx::named_barrier_sync(1, CONSUMERS);  // dS^T is whole; all have done their additions of the tile before
      if (x.a.ordered && member == 0 && n > 0) ptx::add_release(x.a.turn + w.first_tile + int64_t(i - 1) * s.kv_heads, 1);

      float dq[8][4];
      const uint32_t ds_at = shared + L::DS + n % 2 * L::DS_TILE + (L::BY_COLUMNS ? 0 : group * L::KEY_PANEL);
      const uint32_t k_at = shared + L::K + (L::BY_COLUMNS ? group * L::KEY_PANEL : 0);
      ptx::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < N / 16; kk++) {
        ptx::wgmma<T, true, true>(dq, ptx::moved(ptx::matrix(ds_at, 0, 1024), kk * 2048),
                                  ptx::moved(ptx::matrix(k_at, 0, 1024), kk * 2048), kk > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_hold(ds_held);
      ptx::wgmma_hold(dk);
      ptx::wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < M / 16; kk++)
        ptx::wgmma<T, true>(dk, ds_held[kk], ptx::moved(ptx::matrix(q_tile, L::ROW_PANEL, 1024), kk * 2048), true);
      ptx::wgmma_commit();

      const int64_t tile_number = w.first_tile + int64_t(i) * s.kv_heads;
      if (x.a.ordered) {
        if (lane == 0) {
          const int last_token = (i + 1) * x.tokens - 1, all = (w.seq.keys - 1) / N;
          const int highest = s.causal ? min((last_token + w.seq.keys - w.seq.queries) / N, all) : all;
          while (ptx::load_acquire(x.a.turn + tile_number) != highest - w.local) __nanosleep(64);
        }
        __syncwarp();
      }
      ptx::wgmma_wait<1>(dq, dv, p_held);
      float *const sum = x.a.dq_sum + tile_number * (M * D);
#pragma unroll
      for (int d = 0; d < 8; d++) ptx::red_add_x4(sum + (d * CONSUMERS + member) * 4, dq[d]);
      if (x.a.ordered) __threadfence();
      ptx::wgmma_wait<0>(dk, ds_held);
      if (lane == 0) ptx::mbarrier_arrive(shared + L::EMPTY + 8 * stage);
    }
    if (x.a.ordered) {
      ptx::named_barrier_sync(1, CONSUMERS);
      if (member == 0) ptx::add_release(x.a.turn + w.first_tile + int64_t(w.tile_end - 1) * s.kv_heads, 1);
    }
  }

  const int lane = thread % 32, key0 = group * 64 + thread / 32 * 16 + lane / 4;
  const KeyRows<T> dk_rows = key_rows<T>(x.a.dk, s, w.seq, w.kv_head, w.k0),
                   dv_rows = key_rows<T>(x.a.dv, s, w.seq, w.kv_head, w.k0);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int key = key0 + h * 8;
    if (w.k0 + key >= w.seq.slot) continue;
    T *const to_k = dk_rows(key), *const to_v = dv_rows(key);
#pragma unroll
    for (int d = 0; d < D / 8; d++) {
      const int column = d * 8 + lane % 4 * 2;
      store_pair(to_k, column, s.head_dim, x.a.dk.vector, dk[d][2 * h] * s.scale, dk[d][2 * h + 1] * s.scale);
      store_pair(to_v, column, s.head_dim, x.a.dv.vector, dv[d][2 * h], dv[d][2 * h + 1]);
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(THREADS, 1) attention_backward_wgmma_kernel(const __grid_constant__ WgmmaBackward x) {
#if EP_SM90A
  using L = Layout<D>;
  const Problem &s = x.a.shape;
  unsigned char *const memory = shared_memory<unsigned char>();
  const uint32_t shared = ptx::shared_address(memory);
  const int group = int(threadIdx.x) / 128;
  if (threadIdx.x == 0) {
    *reinterpret_cast<int *>(memory + L::TICKET) = atomicAdd(x.a.ticket, 1);
    ptx::mbarrier_init(shared + L::KV_FULL, 1);
    for (int i = 0; i < STAGES; i++) {
      ptx::mbarrier_init(shared + L::FULL + 8 * i, 1 + 32);
      ptx::mbarrier_init(shared + L::EMPTY + 8 * i, CONSUMERS / 32);
    }
    ptx::fence_mbarrier_init();
  }
  // Rows of Q and dout, in both stages, that no box of TMA writes.
  const int used = x.tokens * s.group;
  for (int tile = 0; tile < 2 * STAGES * L::PANELS; tile++) {
    for (int at = used * 128 + int(threadIdx.x) * 16; at < L::ROW_PANEL; at += THREADS * 16)
      *reinterpret_cast<uint4 *>(memory + L::Q + tile * L::ROW_PANEL + at) = make_uint4(0, 0, 0, 0);
  }
  if (used < L::M) ptx::fence_async();
  __syncthreads();
  const Work w = work_of(s, x.tokens, *reinterpret_cast<int *>(memory + L::TICKET));
  if (w.k0 >= w.seq.slot) return;
  if (group == 0) {
    ptx::fewer_registers<40>();
    if (threadIdx.x < 32) {
      if (ptx::elected()) produce<D>(x, w, shared);
    } else if (threadIdx.x < 64) {
      produce_numbers<D>(x, w, shared, int(threadIdx.x) - 32);
    }
  } else {
    ptx::more_registers<232>();
    consume<T, D>(x, w, shared, group - 1);
  }
#endif
}

// dq = scale dq_sum, rounded; a block to a tile of rows, its threads as the 256 of the main kernel had them.
template <class T, int D>
__global__ void __launch_bounds__(CONSUMERS) attention_finish_wgmma_kernel(const BackwardLaunch a, int tokens) {
  using L = Layout<D>;
  const Problem &s = a.shape;
  const int thread = threadIdx.x, lane = thread % 32, group = thread / 128, kv_head = blockIdx.x % s.kv_heads;
  int local;
  const Sequence seq = sequence_of(s, find_sequence(s.cu_q, s.sequences, 1, tokens, blockIdx.x / s.kv_heads, local));
  const int rows = min(tokens, seq.queries - local * tokens) * s.group;
  const float *const sum = a.dq_sum + int64_t(blockIdx.x) * (L::M * D);
  const StackedRows<T> to = stacked_rows<T>(a.dq, s, seq, kv_head, local * tokens * s.group);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = (L::BY_COLUMNS ? 0 : group * 64) + thread % 128 / 32 * 16 + lane / 4 + h * 8;
    if (row >= rows) continue;
    T *const line = to(row);
#pragma unroll
    for (int d = 0; d < 8; d++) {
      const float *const pair = sum + (d * CONSUMERS + thread) * 4 + 2 * h;
      store_pair(line, (L::BY_COLUMNS ? group * 64 : 0) + d * 8 + lane % 4 * 2, s.head_dim, a.dq.vector, pair[0] * s.scale,
                 pair[1] * s.scale);
    }
  }
}

template <class T, int D>
int backward(const WgmmaBackward &x, void *stream) {
  const Problem &s = x.a.shape;
  const int64_t tiles = wgmma_row_tiles(s, Layout<D>::M) * s.kv_heads, blocks = (s.keys / N + s.sequences) * s.kv_heads;
  if (int status = launch_prepare(x.a, tiles * Layout<D>::M * D, tiles, stream)) return status;
  if (int status = launch(attention_backward_wgmma_kernel<T, D>, dim3(unsigned(blocks)), dim3(THREADS), size_t(Layout<D>::BYTES),
                          stream, x)) {
    return status;
  }
  return launch(attention_finish_wgmma_kernel<T, D>, dim3(unsigned(tiles)), dim3(CONSUMERS), 0, stream, x.a, x.tokens);
}

}  // namespace

int launch_backward_wgmma(const BackwardLaunch &a, void *stream) {
  WgmmaBackward x;
  const bool narrow = a.shape.head_dim <= 64;
  x.a = a;
  x.tokens = wgmma_backward_rows(narrow ? 64 : 128) / a.shape.group;
  if (int status = map_queries(x.q, a.q, a.shape, x.tokens)) return status;
  if (int status = map_queries(x.dout, a.dout, a.shape, x.tokens)) return status;
  if (int status = map_keys(x.k, a.k, a.shape, N)) return status;
  if (int status = map_keys(x.v, a.v, a.shape, N)) return status;
  if (a.shape.bf16) return narrow ? backward<bf16, 64>(x, stream) : backward<bf16, 128>(x, stream);
  return narrow ? backward<fp16, 64>(x, stream) : backward<fp16, 128>(x, stream);
}

}  // namespace cuda
}  // namespace ep
