// Backward attention after Dao 2023 (FlashAttention-2, arXiv 2307.08691, algorithm 2) with mma.sync. With P = exp(S - lse) made
// again:
//
//   delta_i = dout_i . out_i        dP = dout V^T        dS = P (dP - delta) (1 - tanh^2 where there is a softcap)
//   dV = P^T dout        dK = scale dS^T Q        dQ = scale dS K
//
// Three kernels. `prepare` makes delta and clears the sums. The main one: a block has one tile of keys of one (sequence, key head)
// and walks over the tiles of stacked rows that see them. It makes S^T and dP^T rather than S and dP, so that P^T and dS^T are
// operands of dV and dK as they lie in the registers; dS^T also goes through shared memory, as an operand of dQ that warps share
// otherwise. dK and dV are sums of the block's own; its part of dQ is added to `dq_sum` in global memory, which `finish` rounds.
//
// Additions to dq_sum come in one order, from the last tile of keys to the first: `turn` counts those that are in, and a block
// waits for its turn. Blocks take their work by ticket, in that same order, so a block waits only for blocks that run already, and
// in a causal sequence, where tile n begins at the row tile that tile n + 1 has just left, hardly ever. Without `ordered` nobody
// waits and the last bits of dQ depend on who came first.
#include "attention_tile.cuh"

namespace ep {
namespace cuda {

template <int D, TileFamily F>
constexpr int backward_threads = backward_tile(D, F).warps * 32;

// Element e of a thread's part of a tile of dq_sum: neighbouring threads side by side, four elements at once where one instruction
// adds four.
template <int THREADS>
__device__ __forceinline__ int dq_at(int thread, int e) {
  return ptx::RED_WIDTH == 4 ? (e / 4 * THREADS + thread) * 4 + e % 4 : e * THREADS + thread;
}

// Stacked rows [begin, end) of a sequence that see key j, as it were without end of the sequence.
struct RowSpan {
  int begin, end;
};
__device__ __forceinline__ RowSpan seeing(const Problem &s, const Sequence &seq, int j) {
  constexpr int FAR = 0x40000000;
  if (j >= seq.keys) return {FAR, FAR};
  const int token = j - (seq.keys - seq.queries);
  return {s.causal ? max(token, 0) * s.group : 0, s.window > 0 ? (token + s.window) * s.group : FAR};
}

// A block's warps: where each makes its 16 keys by MW rows of S^T, sums its 16 keys by DW columns of dK and dV, and its 16 rows by
// QW columns of dQ.
template <int D, TileFamily F>
struct BackwardLayout {
  static constexpr BackwardTile TILE = backward_tile(D, F);
  static constexpr int M = TILE.rows, N = TILE.keys, THREADS = TILE.warps * 32, SPLIT = TILE.split();
  static constexpr int MW = M / SPLIT, DW = D / SPLIT, ROW_GROUPS = M / 16, QW = D / (TILE.warps / ROW_GROUPS);
  static_assert(MW % 16 == 0 && DW % 16 == 0 && QW % 16 == 0 && TILE.warps % ROW_GROUPS == 0, "pieces are 16 x 16");
  int keys, rows, columns, q_rows, q_columns;
  __device__ __forceinline__ explicit BackwardLayout(int warp)
      : keys(warp % (N / 16) * 16),
        rows(warp / (N / 16) * MW),
        columns(warp / (N / 16) * DW),
        q_rows(warp % ROW_GROUPS * 16),
        q_columns(warp / ROW_GROUPS * QW) {}
};

template <class T, int D, TileFamily F>
__global__ void __launch_bounds__(backward_threads<D, F>) attention_backward_kernel(const BackwardLaunch a) {
  if constexpr (compiles(F)) {
    using L = BackwardLayout<D, F>;
    constexpr int M = L::M, N = L::N, THREADS = L::THREADS, STAGES = L::TILE.dout_stages;
    T *const k_tile = shared_memory<T>(), *const v_tile = k_tile + N * D, *const q_tile = v_tile + N * D;
    T *const dout_tile = q_tile + 2 * M * D, *const ds_tile = dout_tile + STAGES * M * D;
    T *const p_tile = ds_tile + (L::SPLIT > 1 ? N * M : 0);
    float *const lse_tile = reinterpret_cast<float *>(p_tile + N * M), *const delta_tile = lse_tile + 2 * M;
    const Problem &s = a.shape;
    const int thread = threadIdx.x, lane = thread % 32;
    const L mine(thread / 32);

    if (thread == 0) *reinterpret_cast<int *>(lse_tile) = atomicAdd(a.ticket, 1);
    __syncthreads();
    const int ticket = *reinterpret_cast<int *>(lse_tile);
    __syncthreads();
    const int kv_head = ticket % s.kv_heads, number = gridDim.x / s.kv_heads - 1 - ticket / s.kv_heads;
    int local;
    const Sequence seq = sequence_of(s, find_sequence(s.cu_k != nullptr ? s.cu_k : s.cu_q, s.sequences, 1, N, number, local));
    const int k0 = local * N;
    if (k0 >= seq.slot) return;

    const int rows = seq.queries * s.group;
    const RowSpan first = seeing(s, seq, k0), last = seeing(s, seq, min(k0 + N, seq.keys) - 1);
    const int tile_begin = first.begin / M, tile_end = k0 < seq.keys ? (min(last.end, rows) + M - 1) / M : 0;
    const int first_tile = (s.cu_q[seq.b] * s.group / M + seq.b) * s.kv_heads + kv_head;  // of dq_sum and turn
    const RowSpan whole = seeing(s, seq, k0 + N - 1);  // rows that see the last key of a full tile

    auto load_rows_of = [&](int i, bool q, bool dout) {
      const int r0 = i * M, count = rows - r0;
      if (q) {
        load_stack<D, M, THREADS>(q_tile + (i - tile_begin) % 2 * M * D, a.q, s, seq, kv_head, r0, count, thread);
        for (int r = thread; r < M; r += THREADS) {
          const int of = (r0 + r) / s.group, at = (i - tile_begin) % 2 * M + r;
          const int64_t from = int64_t(kv_head * s.group + r0 + r - of * s.group) * s.tokens + seq.q0 + of;
          const float lse = r < count ? a.lse[from] : EP_INFINITY;
          lse_tile[at] = lse == -EP_INFINITY ? EP_INFINITY : lse * LOG2E;  // no key: P is 0 there
          delta_tile[at] = r < count ? a.delta[from] : 0.f;
        }
      }
      if (dout)
        load_stack<D, M, THREADS>(dout_tile + (i - tile_begin) % STAGES * M * D, a.dout, s, seq, kv_head, r0, count, thread);
    };

    float dk[L::DW / 8][4], dv[L::DW / 8][4];
    clear(dk), clear(dv);
    if (tile_begin < tile_end) {
      load_keys<D, N, THREADS>(k_tile, a.k, s, seq, kv_head, k0, seq.keys - k0, thread);
      load_keys<D, N, THREADS>(v_tile, a.v, s, seq, kv_head, k0, seq.keys - k0, thread);
      load_rows_of(tile_begin, true, STAGES == 2);
      ptx::cp_async_commit();
    }

    for (int i = tile_begin; i < tile_end; i++) {
      const int stage = (i - tile_begin) % 2, lane = ptx::opaque(thread % 32);  // addresses are cheaper to make again than to keep
      ptx::cp_async_wait<0>();
      __syncthreads();  // this tile of Q is in; nobody reads the one before
      if (a.ordered && thread == 0 && i > tile_begin) ptx::add_release(a.turn + first_tile + (i - 1) * s.kv_heads, 1);
      if (STAGES == 1) {
        load_rows_of(i, false, true);
        ptx::cp_async_commit();
      }
      if (i + 1 < tile_end) load_rows_of(i + 1, true, STAGES == 2);
      ptx::cp_async_commit();

      float p[L::MW / 8][4], ds[L::MW / 8][4];
      clear(p), clear(ds);
      const Pieces<D> k_pieces(k_tile + mine.keys * D, lane), v_pieces(v_tile + mine.keys * D, lane);
      const Pieces<D> q_pieces(q_tile + (stage * M + mine.rows) * D, lane);
#pragma unroll
      for (int kk = 0; kk < D / 16; kk++) {
        uint32_t k[4], q[4];
        ptx::ldmatrix_x4(k, k_pieces.at(0, kk * 2));
#pragma unroll
        for (int n = 0; n < L::MW / 16; n++) {
          ptx::ldmatrix_x4(q, q_pieces.at(n, kk * 2));
          ptx::mma_m16n8k16<T>(p[2 * n], k, q[0], q[2]);
          ptx::mma_m16n8k16<T>(p[2 * n + 1], k, q[1], q[3]);
        }
      }
      if (STAGES == 1) {
        ptx::cp_async_wait<1>();
        __syncthreads();  // dout is in
      }
      const T *const dout = dout_tile + (STAGES == 2 ? stage : 0) * M * D;
      const Pieces<D> dout_pieces(dout + mine.rows * D, lane);
#pragma unroll
      for (int kk = 0; kk < D / 16; kk++) {
        uint32_t v[4], o[4];
        ptx::ldmatrix_x4(v, v_pieces.at(0, kk * 2));
#pragma unroll
        for (int n = 0; n < L::MW / 16; n++) {
          ptx::ldmatrix_x4(o, dout_pieces.at(n, kk * 2));
          ptx::mma_m16n8k16<T>(ds[2 * n], v, o[0], o[2]);
          ptx::mma_m16n8k16<T>(ds[2 * n + 1], v, o[1], o[3]);
        }
      }

      // Element e of p[n]: key mine.keys + lane / 4 + e / 2 * 8, row mine.rows + n * 8 + lane % 4 * 2 + e % 2.
      if (s.score.kind != ScoreScale::PLAIN) {
#pragma unroll
        for (int n = 0; n < L::MW / 8; n++) {
          const int r = stage * M + mine.rows + n * 8 + lane % 4 * 2;
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const float x = p[n][e] * s.score.before, t = tanh_of(x);
            p[n][e] = ptx::exp2((s.score.kind == ScoreScale::CAPPED ? s.score.cap * t : x) - lse_tile[r + e % 2]);
            ds[n][e] = p[n][e] * (ds[n][e] - delta_tile[r + e % 2]) * (s.score.kind == ScoreScale::CAPPED ? 1.f - t * t : 1.f);
          }
        }
      } else {
#pragma unroll
        for (int n = 0; n < L::MW / 8; n++) {
          const int r = stage * M + mine.rows + n * 8 + lane % 4 * 2;
          const float2 lse = *reinterpret_cast<const float2 *>(lse_tile + r),
                       delta = *reinterpret_cast<const float2 *>(delta_tile + r);
#pragma unroll
          for (int e = 0; e < 4; e++) {
            p[n][e] = ptx::exp2(p[n][e] * s.score.after - (e % 2 == 0 ? lse.x : lse.y));
            ds[n][e] = p[n][e] * (ds[n][e] - (e % 2 == 0 ? delta.x : delta.y));
          }
        }
      }
      if (i * M < whole.begin || (i + 1) * M > first.end) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const RowSpan span = seeing(s, seq, k0 + mine.keys + lane / 4 + h * 8);
          const int at = i * M + mine.rows + lane % 4 * 2, begin = span.begin - at, end = span.end - at;
#pragma unroll
          for (int n = 0; n < L::MW / 8; n++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
              if (n * 8 + e < begin || n * 8 + e >= end) p[n][2 * h + e] = 0.f, ds[n][2 * h + e] = 0.f;
            }
          }
        }
      }

      uint32_t p_held[L::MW / 16][4], ds_held[L::MW / 16][4];  // as operands A
#pragma unroll
      for (int n = 0; n < L::MW / 8; n++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          p_held[n / 2][n % 2 * 2 + h] = pack<T>(p[n][2 * h], p[n][2 * h + 1]);
          ds_held[n / 2][n % 2 * 2 + h] = pack<T>(ds[n][2 * h], ds[n][2 * h + 1]);
          const int key = mine.keys + lane / 4 + h * 8, chunk = (mine.rows / 8 + n) ^ row_mix<M>(lane / 4);
          const int at = key * M + chunk * 8 + lane % 4 * 2;
          *reinterpret_cast<uint32_t *>(ds_tile + at) = ds_held[n / 2][n % 2 * 2 + h];
          if (L::SPLIT > 1) *reinterpret_cast<uint32_t *>(p_tile + at) = p_held[n / 2][n % 2 * 2 + h];
        }
      }
      __syncthreads();  // dS^T is whole

      const Pieces<D> dout_columns(dout, lane), q_columns(q_tile + stage * M * D, lane);
      const Pieces<M> p_rows(p_tile + mine.keys * M, lane), ds_rows(ds_tile + mine.keys * M, lane);
#pragma unroll
      for (int kk = 0; kk < M / 16; kk++) {
        uint32_t weights[4], b[4];
        if constexpr (L::SPLIT > 1) {
          ptx::ldmatrix_x4(weights, p_rows.at(0, kk * 2));
        } else {
#pragma unroll
          for (int e = 0; e < 4; e++) weights[e] = p_held[kk][e];
        }
#pragma unroll
        for (int d = 0; d < L::DW / 16; d++) {
          ptx::ldmatrix_x4_trans(b, dout_columns.at(kk, mine.columns / 8 + d * 2));
          ptx::mma_m16n8k16<T>(dv[2 * d], weights, b[0], b[1]);
          ptx::mma_m16n8k16<T>(dv[2 * d + 1], weights, b[2], b[3]);
        }
      }
#pragma unroll
      for (int kk = 0; kk < M / 16; kk++) {
        uint32_t weights[4], b[4];
        if constexpr (L::SPLIT > 1) {
          ptx::ldmatrix_x4(weights, ds_rows.at(0, kk * 2));
        } else {
#pragma unroll
          for (int e = 0; e < 4; e++) weights[e] = ds_held[kk][e];
        }
#pragma unroll
        for (int d = 0; d < L::DW / 16; d++) {
          ptx::ldmatrix_x4_trans(b, q_columns.at(kk, mine.columns / 8 + d * 2));
          ptx::mma_m16n8k16<T>(dk[2 * d], weights, b[0], b[1]);
          ptx::mma_m16n8k16<T>(dk[2 * d + 1], weights, b[2], b[3]);
        }
      }

      float dq[L::QW / 8][4];
      clear(dq);
      const Pieces<D> k_columns(k_tile, lane);
      const Pieces<M> ds_columns(ds_tile, lane);
#pragma unroll
      for (int kk = 0; kk < N / 16; kk++) {
        uint32_t r[4], b[4];
        ptx::ldmatrix_x4_trans(r, ds_columns.at(kk, mine.q_rows / 8));
        const uint32_t weights[4] = {r[0], r[2], r[1], r[3]};
#pragma unroll
        for (int d = 0; d < L::QW / 16; d++) {
          ptx::ldmatrix_x4_trans(b, k_columns.at(kk, mine.q_columns / 8 + d * 2));
          ptx::mma_m16n8k16<T>(dq[2 * d], weights, b[0], b[1]);
          ptx::mma_m16n8k16<T>(dq[2 * d + 1], weights, b[2], b[3]);
        }
      }
      const int64_t tile_number = first_tile + i * s.kv_heads;
      if (a.ordered) {
        if (thread == 0) {
          // Key tiles that see this row tile: up to the one that the last row's diagonal passes through.
          const int last_token = ((i + 1) * M - 1) / s.group, all = (seq.keys - 1) / N;
          const int highest = s.causal ? min((last_token + seq.keys - seq.queries) / N, all) : all;
          while (ptx::load_acquire(a.turn + tile_number) != highest - local) __nanosleep(64);
        }
        __syncthreads();
      }
      float *const sum = a.dq_sum + tile_number * (M * D);
#pragma unroll
      for (int d = 0; d < L::QW / 8; d++) {
        if constexpr (ptx::RED_WIDTH == 4) {
          ptx::red_add_x4(sum + dq_at<THREADS>(thread, d * 4), dq[d]);
        } else {
#pragma unroll
          for (int e = 0; e < 4; e++) ptx::red_add(sum + dq_at<THREADS>(thread, d * 4 + e), dq[d][e]);
        }
      }
      if (a.ordered) __threadfence();
    }
    if (a.ordered && tile_begin < tile_end) {
      __syncthreads();
      if (thread == 0) ptx::add_release(a.turn + first_tile + (tile_end - 1) * s.kv_heads, 1);
    }

    const KeyRows<T> dk_rows = key_rows<T>(a.dk, s, seq, kv_head, k0), dv_rows = key_rows<T>(a.dv, s, seq, kv_head, k0);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int key = mine.keys + lane / 4 + h * 8;
      if (k0 + key >= seq.slot) continue;
      T *const to_k = dk_rows(key), *const to_v = dv_rows(key);
#pragma unroll
      for (int d = 0; d < L::DW / 8; d++) {
        const int column = mine.columns + d * 8 + lane % 4 * 2;
        store_pair(to_k, column, s.head_dim, a.dk.vector, dk[d][2 * h] * s.scale, dk[d][2 * h + 1] * s.scale);
        store_pair(to_v, column, s.head_dim, a.dv.vector, dv[d][2 * h], dv[d][2 * h + 1]);
      }
    }
  }
}

// delta of every row, a warp to a row; and zeros where the main kernel adds and counts.
constexpr int PREPARE_THREADS = 256;
template <class T>
__global__ void __launch_bounds__(PREPARE_THREADS) attention_prepare_kernel(const BackwardLaunch a, int64_t sums, int64_t turns) {
  const Problem &s = a.shape;
  const int64_t step = int64_t(gridDim.x) * PREPARE_THREADS, at = int64_t(blockIdx.x) * PREPARE_THREADS + threadIdx.x;
  for (int64_t i = at; i < sums / 4; i += step) reinterpret_cast<float4 *>(a.dq_sum)[i] = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int64_t i = at; i < turns; i += step) a.turn[i] = 0;
  if (at == 0) *a.ticket = 0;
  const int lane = threadIdx.x % 32;
  for (int64_t row = at / 32; row < int64_t(s.tokens) * s.heads; row += step / 32) {
    const int64_t token = row / s.heads, head = row - token * s.heads;
    const uint16_t *out = static_cast<const uint16_t *>(a.out.data) + token * a.out.token + head * a.out.head;
    const uint16_t *dout = static_cast<const uint16_t *>(a.dout.data) + token * a.dout.token + head * a.dout.head;
    float sum = 0.f;
    if (a.out.vector && a.dout.vector) {
      for (int d = lane * 2; d < s.head_dim; d += 64) {
        const float2 x = unpack<T>(*reinterpret_cast<const uint32_t *>(out + d)),
                     y = unpack<T>(*reinterpret_cast<const uint32_t *>(dout + d));
        sum += x.x * y.x + x.y * y.y;
      }
    } else {
      for (int d = lane; d < s.head_dim; d += 32) sum += to_float(T{out[d]}) * to_float(T{dout[d]});
    }
#pragma unroll
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
    if (lane == 0) a.delta[head * s.tokens + token] = sum;
  }
}

// dq = scale dq_sum, rounded; a block to a tile, whose threads have what those of the main kernel had.
template <class T, int D, TileFamily F>
__global__ void __launch_bounds__(backward_threads<D, F>) attention_finish_kernel(const BackwardLaunch a) {
  if constexpr (compiles(F)) {
    using L = BackwardLayout<D, F>;
    const Problem &s = a.shape;
    const int thread = threadIdx.x, lane = thread % 32;
    const L mine(thread / 32);
    const int kv_head = blockIdx.x % s.kv_heads;
    int local;
    const Sequence seq = sequence_of(s, find_sequence(s.cu_q, s.sequences, s.group, L::M, blockIdx.x / s.kv_heads, local));
    const int rows = seq.queries * s.group, r0 = local * L::M;
    if (r0 >= rows) return;
    const float *const sum = a.dq_sum + int64_t(blockIdx.x) * (L::M * D);
    const StackedRows<T> to = stacked_rows<T>(a.dq, s, seq, kv_head, r0);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = mine.q_rows + lane / 4 + h * 8;
      if (r0 + row >= rows) continue;
      T *const line = to(row);
#pragma unroll
      for (int d = 0; d < L::QW / 8; d++) {
        const float x = sum[dq_at<L::THREADS>(thread, d * 4 + 2 * h)], y = sum[dq_at<L::THREADS>(thread, d * 4 + 2 * h + 1)];
        store_pair(line, mine.q_columns + d * 8 + lane % 4 * 2, s.head_dim, a.dq.vector, x * s.scale, y * s.scale);
      }
    }
  }
}

template <class T, int D, TileFamily F>
static int backward(const BackwardLaunch &a, void *stream) {
  constexpr BackwardTile tile = backward_tile(D, F);
  const Problem &s = a.shape;
  const int64_t tiles = row_tiles(s, tile.rows) * s.kv_heads, blocks = (s.keys / tile.keys + s.sequences) * s.kv_heads;
  if (int status = launch_prepare(a, tiles * tile.rows * D, tiles, stream)) return status;
  if (int status = launch(attention_backward_kernel<T, D, F>, dim3(unsigned(blocks)), dim3(backward_threads<D, F>),
                          size_t(backward_shared_memory(D, F)), stream, a)) {
    return status;
  }
  return launch(attention_finish_kernel<T, D, F>, dim3(unsigned(tiles)), dim3(backward_threads<D, F>), 0, stream, a);
}

template <class T, TileFamily F>
static int backward(const BackwardLaunch &a, void *stream) {
  switch (padded_head_dim(a.shape.head_dim)) {
    case 64: return backward<T, 64, F>(a, stream);
    case 96: return backward<T, 96, F>(a, stream);
    case 128: return backward<T, 128, F>(a, stream);
    case 192: return backward<T, 192, F>(a, stream);
    default: return backward<T, 256, F>(a, stream);
  }
}

int launch_prepare(const BackwardLaunch &a, int64_t sums, int64_t turns, void *stream) {
  const int64_t work = ceil_div(int64_t(a.shape.tokens) * a.shape.heads, PREPARE_THREADS / 32);
  const dim3 blocks(unsigned(work < 4096 ? work : 4096) + 1);
  return launch(a.shape.bf16 ? &attention_prepare_kernel<bf16> : &attention_prepare_kernel<fp16>, blocks, dim3(PREPARE_THREADS), 0,
                stream, a, sums, turns);
}

int launch_backward(const BackwardLaunch &a, TileFamily family, void *stream) {
  if (a.shape.bf16) {
    return family == TileFamily::LARGE ? backward<bf16, TileFamily::LARGE>(a, stream)
                                       : backward<bf16, TileFamily::SMALL>(a, stream);
  }
  return family == TileFamily::LARGE ? backward<fp16, TileFamily::LARGE>(a, stream) : backward<fp16, TileFamily::SMALL>(a, stream);
}

}  // namespace cuda
}  // namespace ep
