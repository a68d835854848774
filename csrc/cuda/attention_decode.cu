// Attention of few queries over many keys (Dao et al. 2023, "Flash-Decoding"): the keys of a tile of 16 stacked rows are split
// among blocks, and in a block among warps, 16 keys at a time. A warp keeps loading its next keys while it works on these and waits
// for nobody; the parts are brought together at the end of the block in the order of the warps, and over blocks in the order of the
// splits by a second kernel. How keys are split depends on the tile's own span of keys alone, so a sequence has the same bits in
// any batch, and in pages as in one piece.
#include "attention_tile.cuh"

namespace ep {
namespace cuda {

template <int D>
constexpr int decode_threads = decode_warps(D) * 32;

struct Stretch {  // of keys, of one split of a tile of rows
  int begin, end, count;
};

// What split number `split` of the rows [r0, r0 + rows) has to read, and how many splits there are.
__device__ __forceinline__ Stretch stretch_of(const Problem &s, const Sequence &seq, int r0, int rows, int split) {
  const int low = visible(s, seq, r0 / s.group).begin / DECODE_KEYS * DECODE_KEYS,
            high = visible(s, seq, (r0 + rows - 1) / s.group).end;
  const int span = max(high - low, 0), step = split_keys(span), begin = low + split * step;
  return {begin, min(begin + step, high), split_count(span)};
}

template <class T, int D>
__global__ void __launch_bounds__(decode_threads<D>) attention_decode_kernel(const ForwardLaunch a) {
  constexpr int WARPS = decode_warps(D), SLICES = D / 16, LINE = D + 8;  // floats from row to row of a part, off the same banks
  static_assert(WARPS * DECODE_ROWS * (LINE + 2) * sizeof(float) <= size_t(decode_shared_memory(D)), "parts lie where keys lay");
  const Problem &s = a.shape;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  T *const q_tile = shared_memory<T>();
  T *const k_tiles = q_tile + (DECODE_ROWS + warp * 4 * DECODE_KEYS) * D, *const v_tiles = k_tiles + 2 * DECODE_KEYS * D;

  const int split = blockIdx.x % a.splits, kv_head = blockIdx.x / a.splits % s.kv_heads,
            number = blockIdx.x / a.splits / s.kv_heads;
  int local;
  const Sequence seq = sequence_of(s, find_sequence(s.cu_q, s.sequences, s.group, DECODE_ROWS, number, local));
  const int r0 = local * DECODE_ROWS, row_count = min(DECODE_ROWS, seq.queries * s.group - r0);
  if (row_count <= 0) return;
  const Stretch stretch = stretch_of(s, seq, r0, row_count, split);
  if (split >= stretch.count) return;

  const int first = stretch.begin + warp * DECODE_KEYS, step = WARPS * DECODE_KEYS;
  auto load = [&](int k0) {
    const int at = (k0 - first) / step % 2 * DECODE_KEYS * D;
    load_keys<D, DECODE_KEYS, 32>(k_tiles + at, a.k, s, seq, kv_head, k0, seq.keys - k0, lane);
    load_keys<D, DECODE_KEYS, 32>(v_tiles + at, a.v, s, seq, kv_head, k0, seq.keys - k0, lane);
  };
  load_stack<D, DECODE_ROWS, decode_threads<D>>(q_tile, a.q, s, seq, kv_head, r0, row_count, thread);
  ptx::cp_async_commit();
  if (first < stretch.end) load(first);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  __syncthreads();  // Q is in
  // Of 256 elements the sums alone fill half of the registers: there Q stays in shared memory and is read with every tile of keys.
  constexpr bool HELD = D <= 192;
  uint32_t q[HELD ? SLICES : 1][4];
  const Pieces<D> q_pieces(q_tile, lane);
  if constexpr (HELD) {
#pragma unroll
    for (int kk = 0; kk < SLICES; kk++) ptx::ldmatrix_x4(q[kk], q_pieces.at(0, kk * 2));
  }

  Span span[2];
#pragma unroll
  for (int h = 0; h < 2; h++) span[h] = visible(s, seq, (r0 + min(lane / 4 + h * 8, row_count - 1)) / s.group);
  float out[D / 8][4], row_max[2] = {-EP_INFINITY, -EP_INFINITY}, row_sum[2] = {0.f, 0.f};
  clear(out);
  for (int k0 = first; k0 < stretch.end; k0 += step) {
    if (k0 + step < stretch.end) load(k0 + step);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncwarp();  // these keys are in
    const int at = (k0 - first) / step % 2 * DECODE_KEYS * D;
    const Pieces<D> k_pieces(k_tiles + at, lane), v_pieces(v_tiles + at, lane);
    float p[2][4];
    clear(p);
#pragma unroll
    for (int kk = 0; kk < SLICES; kk++) {
      uint32_t k[4];
      ptx::ldmatrix_x4(k, k_pieces.at(0, kk * 2));
      uint32_t (&slice)[4] = q[HELD ? kk : 0];
      if constexpr (!HELD) ptx::ldmatrix_x4(slice, q_pieces.at(0, kk * 2));
      ptx::mma_m16n8k16<T>(p[0], slice, k[0], k[2]);
      ptx::mma_m16n8k16<T>(p[1], slice, k[1], k[3]);
    }
    transform(p, s.score);
#pragma unroll
    for (int h = 0; h < 2; h++) mask_row(p, h, span[h].begin - k0, min(span[h].end, stretch.end) - k0, lane);
    float rescale[2];
    softmax_step(p, s.score.after, row_max, row_sum, rescale);
    rescale_rows(out, rescale);
    uint32_t weights[4];
    as_operand<T>(weights, p, 0);
#pragma unroll
    for (int d = 0; d < D / 16; d++) {
      uint32_t v[4];
      ptx::ldmatrix_x4_trans(v, v_pieces.at(0, d * 2));
      ptx::mma_m16n8k16<T>(out[2 * d], weights, v[0], v[1]);
      ptx::mma_m16n8k16<T>(out[2 * d + 1], weights, v[2], v[3]);
    }
    __syncwarp();  // the next keys but one may come
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // nobody reads Q, K or V any more

  float *const parts = shared_memory<float>(), *const part_max = parts + WARPS * DECODE_ROWS * LINE;
  float *const part_sum = part_max + WARPS * DECODE_ROWS;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = warp * DECODE_ROWS + lane / 4 + h * 8;
    const float sum = row_total(row_sum[h]);
    if (lane % 4 == 0) part_max[row] = row_max[h], part_sum[row] = sum;
#pragma unroll
    for (int d = 0; d < D / 8; d++) {
      *reinterpret_cast<float2 *>(parts + row * LINE + d * 8 + lane % 4 * 2) = make_float2(out[d][2 * h], out[d][2 * h + 1]);
    }
  }
  __syncthreads();
  const StackedRows<T> out_rows = stacked_rows<T>(a.out, s, seq, kv_head, r0);
  for (int row = warp; row < row_count; row += WARPS) {
    float high = -EP_INFINITY, sum = 0.f, weight[WARPS];
#pragma unroll
    for (int w = 0; w < WARPS; w++) high = fmaxf(high, part_max[w * DECODE_ROWS + row]);
    const float shift = high == -EP_INFINITY ? 0.f : high * s.score.after;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      weight[w] = ptx::exp2(part_max[w * DECODE_ROWS + row] * s.score.after - shift);
      sum += part_sum[w * DECODE_ROWS + row] * weight[w];
    }
    const bool blind = high == -EP_INFINITY && sum == 0.f;
    const float factor = blind ? 0.f : 1.f / sum, lse = blind ? -EP_INFINITY : shift + ptx::log2(sum);
    const int of = (r0 + row) / s.group, head = kv_head * s.group + r0 + row - of * s.group;
    const int64_t token = seq.q0 + of, part = (token * s.heads + head) * a.splits + split;
    for (int d = lane * 2; d < s.head_dim; d += 64) {
      float x = 0.f, y = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float2 of_warp = *reinterpret_cast<const float2 *>(parts + (w * DECODE_ROWS + row) * LINE + d);
        x += of_warp.x * weight[w], y += of_warp.y * weight[w];
      }
      if (stretch.count == 1) {
        store_pair(out_rows(row), d, s.head_dim, a.out.vector, x * factor, y * factor);
      } else {
        *reinterpret_cast<float2 *>(a.part_out + part * D + d) = make_float2(x * factor, y * factor);
      }
    }
    if (lane == 0)
      (stretch.count == 1 ? a.lse[int64_t(head) * s.tokens + token] : a.part_lse[part]) = stretch.count == 1 ? lse * LN2 : lse;
  }
}

// The splits of every row brought together, a warp to a row.
constexpr int COMBINE_THREADS = 128;
template <class T, int D>
__global__ void __launch_bounds__(COMBINE_THREADS) attention_combine_kernel(const ForwardLaunch a) {
  const Problem &s = a.shape;
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * (COMBINE_THREADS / 32) + threadIdx.x / 32, token = row / s.heads;
  if (token >= s.tokens) return;
  const int head = int(row - token * s.heads);
  int b = int(token);
  if (s.cu_q != nullptr) {
    int low = 0, high = s.sequences;  // the last sequence that begins at or before the token: it is not empty
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (s.cu_q[middle] <= token ? low : high) = middle;
    }
    b = low;
  }
  const Sequence seq = sequence_of(s, b);
  const int r0 = (int(token - seq.q0) * s.group + head % s.group) / DECODE_ROWS * DECODE_ROWS;
  const int count = stretch_of(s, seq, r0, min(DECODE_ROWS, seq.queries * s.group - r0), 0).count;
  if (count == 1) return;  // the block has written the result
  const float *const lse = a.part_lse + row * a.splits, *const parts = a.part_out + row * a.splits * D;
  float high = -EP_INFINITY, sum = 0.f;
  for (int i = 0; i < count; i++) high = fmaxf(high, lse[i]);
  const float shift = high == -EP_INFINITY ? 0.f : high;
  float out[D / 64 + 1][2];
#pragma unroll
  for (int d = 0; d <= D / 64; d++) out[d][0] = out[d][1] = 0.f;
  for (int i = 0; i < count; i++) {
    const float weight = ptx::exp2(lse[i] - shift);
    sum += weight;
#pragma unroll
    for (int d = 0; d <= D / 64; d++) {
      const int at = d * 64 + lane * 2;
      if (at >= s.head_dim) continue;
      const float2 part = *reinterpret_cast<const float2 *>(parts + i * D + at);
      out[d][0] += part.x * weight, out[d][1] += part.y * weight;
    }
  }
  const bool blind = high == -EP_INFINITY && sum == 0.f;
  const float factor = blind ? 0.f : 1.f / sum;
  T *const to = static_cast<T *>(a.out.data) + token * a.out.token + head * a.out.head;
#pragma unroll
  for (int d = 0; d <= D / 64; d++)
    store_pair(to, d * 64 + lane * 2, s.head_dim, a.out.vector, out[d][0] * factor, out[d][1] * factor);
  if (lane == 0) a.lse[int64_t(head) * s.tokens + token] = blind ? -EP_INFINITY : (shift + ptx::log2(sum)) * LN2;
}

template <class T, int D>
static int decode(const ForwardLaunch &a, void *stream) {
  const int64_t blocks = row_tiles(a.shape, DECODE_ROWS) * a.shape.kv_heads * a.splits,
                rows = int64_t(a.shape.tokens) * a.shape.heads;
  const int status = launch(attention_decode_kernel<T, D>, dim3(unsigned(blocks)), dim3(decode_threads<D>),
                            size_t(decode_shared_memory(D)), stream, a);
  if (status != EP_OK || a.splits == 1) return status;
  return launch(attention_combine_kernel<T, D>, dim3(unsigned(ceil_div(rows, COMBINE_THREADS / 32))), dim3(COMBINE_THREADS), 0,
                stream, a);
}

template <class T>
static int decode(const ForwardLaunch &a, void *stream) {
  switch (padded_head_dim(a.shape.head_dim)) {
    case 64: return decode<T, 64>(a, stream);
    case 96: return decode<T, 96>(a, stream);
    case 128: return decode<T, 128>(a, stream);
    case 192: return decode<T, 192>(a, stream);
    default: return decode<T, 256>(a, stream);
  }
}

int launch_decode(const ForwardLaunch &a, void *stream) { return a.shape.bf16 ? decode<bf16>(a, stream) : decode<fp16>(a, stream); }

}  // namespace cuda
}  // namespace ep
