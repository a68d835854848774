// Forward attention after Dao 2023 (FlashAttention-2, arXiv 2307.08691, algorithm 1) with mma.sync.
//
// A block has one tile of stacked rows of one (sequence, key head), `rows / warps` rows to a warp, and walks over the tiles of keys
// that any of its rows sees, from the last to the first. The loads of V hide behind S = Q K^T, those of the next K behind the
// softmax and O += P V, so one tile of each is enough. P goes from accumulators to operands without leaving the registers. Only
// tiles that some row does not see in full look at the mask.
#include "attention_tile.cuh"

namespace ep {
namespace cuda {

template <int D, TileFamily F>
constexpr int forward_threads = forward_tile(D, F).warps * 32;

template <class T, int D, TileFamily F>
__global__ void __launch_bounds__(forward_threads<D, F>) attention_forward_kernel(const ForwardLaunch a) {
  if constexpr (compiles(F)) {
    constexpr ForwardTile tile = forward_tile(D, F);
    constexpr int M = tile.rows, N = tile.keys, THREADS = forward_threads<D, F>, WARP_ROWS = M / tile.warps, MT = WARP_ROWS / 16;
    constexpr int SLICES = D / 16;  // of the depth of S = Q K^T
    T *const q_tile = shared_memory<T>(), *const k_tile = q_tile + M * D, *const v_tile = k_tile + N * D;
    const Problem &s = a.shape;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;

    // The last tiles see most: they go first, all heads side by side.
    const int kv_head = blockIdx.x % s.kv_heads, number = gridDim.x / s.kv_heads - 1 - blockIdx.x / s.kv_heads;
    int local;
    const Sequence seq = sequence_of(s, find_sequence(s.cu_q, s.sequences, s.group, M, number, local));
    const int rows = seq.queries * s.group, r0 = local * M;
    if (r0 >= rows) return;
    const int row_count = min(M, rows - r0);
    const Span first = visible(s, seq, r0 / s.group), last = visible(s, seq, (r0 + row_count - 1) / s.group);
    const int tile_begin = first.begin / N, tile_end = last.end > first.begin ? (last.end + N - 1) / N : tile_begin;

    const int warp_row = warp * WARP_ROWS;
    const Span warp_last = visible(s, seq, (r0 + warp_row + WARP_ROWS - 1) / s.group);
    const int warp_begin = visible(s, seq, (r0 + warp_row) / s.group).begin, warp_end = warp_last.end;

    float out[MT][D / 8][4], row_max[MT][2], row_sum[MT][2];
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
      clear(out[mt]);
      row_max[mt][0] = row_max[mt][1] = -EP_INFINITY;
      row_sum[mt][0] = row_sum[mt][1] = 0.f;
    }

    if (tile_begin < tile_end) {
      const int k0 = (tile_end - 1) * N;
      load_stack<D, M, THREADS>(q_tile, a.q, s, seq, kv_head, r0, row_count, thread);
      load_keys<D, N, THREADS>(k_tile, a.k, s, seq, kv_head, k0, seq.keys - k0, thread);
      ptx::cp_async_commit();
    }
    uint32_t q_held[tile.q_in_registers ? SLICES : 1][MT][4];

    for (int t = tile_end - 1; t >= tile_begin; t--) {
      const int k0 = t * N, lane = ptx::opaque(thread % 32);  // addresses are cheaper to make again than to keep
      const Pieces<D> q_pieces(q_tile + warp_row * D, lane), k_pieces(k_tile, lane), v_pieces(v_tile, lane);
      ptx::cp_async_wait<0>();
      __syncthreads();  // K is in; nobody reads V of the tile before
      load_keys<D, N, THREADS>(v_tile, a.v, s, seq, kv_head, k0, seq.keys - k0, thread);
      ptx::cp_async_commit();
      if constexpr (tile.q_in_registers) {
        if (t == tile_end - 1) {
#pragma unroll
          for (int kk = 0; kk < SLICES; kk++) {
#pragma unroll
            for (int mt = 0; mt < MT; mt++) ptx::ldmatrix_x4(q_held[kk][mt], q_pieces.at(mt, kk * 2));
          }
        }
      }

      const bool sees = k0 < warp_end && k0 + N > warp_begin;  // some row of this warp sees some of these keys
      float p[MT][N / 8][4];
      if (sees) {
#pragma unroll
        for (int mt = 0; mt < MT; mt++) clear(p[mt]);
#pragma unroll
        for (int kk = 0; kk < SLICES; kk++) {
          uint32_t q[MT][4];
#pragma unroll
          for (int mt = 0; mt < MT; mt++) {
            if constexpr (tile.q_in_registers) {
#pragma unroll
              for (int e = 0; e < 4; e++) q[mt][e] = q_held[kk][mt][e];
            } else {
              ptx::ldmatrix_x4(q[mt], q_pieces.at(mt, kk * 2));
            }
          }
#pragma unroll
          for (int n = 0; n < N / 16; n++) {
            uint32_t k[4];
            ptx::ldmatrix_x4(k, k_pieces.at(n, kk * 2));
#pragma unroll
            for (int mt = 0; mt < MT; mt++) {
              ptx::mma_m16n8k16<T>(p[mt][2 * n], q[mt], k[0], k[2]);
              ptx::mma_m16n8k16<T>(p[mt][2 * n + 1], q[mt], k[1], k[3]);
            }
          }
        }
      }
      ptx::cp_async_wait<0>();
      __syncthreads();  // V is in; nobody reads this K any more
      if (t > tile_begin) {
        load_keys<D, N, THREADS>(k_tile, a.k, s, seq, kv_head, k0 - N, N, thread);
        ptx::cp_async_commit();
      }
      if (!sees) continue;

#pragma unroll
      for (int mt = 0; mt < MT; mt++) transform(p[mt], s.score);
      if (k0 < last.begin || k0 + N > first.end) {
#pragma unroll
        for (int mt = 0; mt < MT; mt++) {
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const Span span = visible(s, seq, (r0 + warp_row + mt * 16 + h * 8 + lane / 4) / s.group);
            mask_row(p[mt], h, span.begin - k0, span.end - k0, lane);
          }
        }
      }
      float rescale[MT][2];
      bool same = true;
#pragma unroll
      for (int mt = 0; mt < MT; mt++) {
        softmax_step(p[mt], s.score.after, row_max[mt], row_sum[mt], rescale[mt]);
        same = same && rescale[mt][0] == 1.f && rescale[mt][1] == 1.f;
      }
      // Maxima seldom grow after the first tiles; but where every register is in use, a branch costs more than it saves.
      if (MT * D >= 256 || !__all_sync(~0u, same)) {
#pragma unroll
        for (int mt = 0; mt < MT; mt++) rescale_rows(out[mt], rescale[mt]);
      }
#pragma unroll
      for (int kk = 0; kk < N / 16; kk++) {
        uint32_t weights[MT][4];
#pragma unroll
        for (int mt = 0; mt < MT; mt++) as_operand<T>(weights[mt], p[mt], kk);
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
          uint32_t v[4];
          ptx::ldmatrix_x4_trans(v, v_pieces.at(kk, d * 2));
#pragma unroll
          for (int mt = 0; mt < MT; mt++) {
            ptx::mma_m16n8k16<T>(out[mt][2 * d], weights[mt], v[0], v[1]);
            ptx::mma_m16n8k16<T>(out[mt][2 * d + 1], weights[mt], v[2], v[3]);
          }
        }
      }
    }

    const StackedRows<T> out_rows = stacked_rows<T>(a.out, s, seq, kv_head, r0);
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float sum = row_total(row_sum[mt][h]);
        const int row = warp_row + mt * 16 + h * 8 + lane / 4;
        if (row >= row_count) continue;
        const bool blind = row_max[mt][h] == -EP_INFINITY && sum == 0.f;
        const float factor = blind ? 0.f : 1.f / sum;
        T *to = out_rows(row);
#pragma unroll
        for (int d = 0; d < D / 8; d++) {
          store_pair(to, d * 8 + lane % 4 * 2, s.head_dim, a.out.vector, out[mt][d][2 * h] * factor,
                     out[mt][d][2 * h + 1] * factor);
        }
        if (lane % 4 == 0) {
          const int of = (r0 + row) / s.group;
          a.lse[int64_t(kv_head * s.group + r0 + row - of * s.group) * s.tokens + seq.q0 + of] =
              blind ? -EP_INFINITY : row_max[mt][h] * s.score.after * LN2 + logf(sum);
        }
      }
    }
  }
}

template <class T, int D, TileFamily F>
static int forward(const ForwardLaunch &a, void *stream) {
  constexpr ForwardTile tile = forward_tile(D, F);
  const int64_t blocks = row_tiles(a.shape, tile.rows) * a.shape.kv_heads;
  return launch(attention_forward_kernel<T, D, F>, dim3(unsigned(blocks)), dim3(forward_threads<D, F>),
                size_t(forward_shared_memory(D, F)), stream, a);
}

template <class T, TileFamily F>
static int forward(const ForwardLaunch &a, void *stream) {
  switch (padded_head_dim(a.shape.head_dim)) {
    case 64: return forward<T, 64, F>(a, stream);
    case 96: return forward<T, 96, F>(a, stream);
    case 128: return forward<T, 128, F>(a, stream);
    case 192: return forward<T, 192, F>(a, stream);
    default: return forward<T, 256, F>(a, stream);
  }
}

int launch_forward(const ForwardLaunch &a, TileFamily family, void *stream) {
  if (a.shape.bf16) {
    return family == TileFamily::LARGE ? forward<bf16, TileFamily::LARGE>(a, stream) : forward<bf16, TileFamily::SMALL>(a, stream);
  }
  return family == TileFamily::LARGE ? forward<fp16, TileFamily::LARGE>(a, stream) : forward<fp16, TileFamily::SMALL>(a, stream);
}

}  // namespace cuda
}  // namespace ep
