// Attention on a GPU: the problem as the kernels take it, the tiles, and what they cost in shared memory.
//
// The query heads of one key head are stacked, as on the CPU: row r of a sequence is query token r / group, head r % group of the
// group. A tile of M rows then reads each key once for the whole group, a tile covers few tokens (so little of it lies beyond the
// diagonal), and dk and dv are summed over the group where they are made.
//
// Which tiles there are must be known without reading cu_seqlens on the host. Sequence b gets the tile numbers from
// floor(cu[b] * group / M) + b on: since ceil((y - x) / M) <= floor(y / M) - floor(x / M) + 1, no two sequences share one, the grid
// floor(T * group / M) + S is enough, and a block finds its sequence by bisection in cu_seqlens. Numbers that no row needs end at
// once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor.h"

#if defined(__CUDACC__)
#define EP_HOST_DEVICE __host__ __device__
#else
#define EP_HOST_DEVICE
#endif

namespace ep {
namespace cuda {

// A100, H100 and B200 have 163 KB or more of shared memory per block; consumer parts of the same generations have 99 KB, half the
// rate of fp32-accumulating mma.sync, and 16 rows per warp are enough to feed it.
enum class TileFamily { LARGE, SMALL };

// `architecture` is major * 10 + minor of the code that runs (what nvcc compiled for).
EP_HOST_DEVICE constexpr TileFamily tile_family(int architecture) {
  return architecture == 80 || architecture == 90 || architecture == 100 || architecture == 103 ? TileFamily::LARGE
                                                                                                : TileFamily::SMALL;
}

// Whether the code that is being compiled is for this family; the emulator has both.
EP_HOST_DEVICE constexpr bool compiles(TileFamily family) {
#if defined(__CUDA_ARCH__)
  return tile_family(__CUDA_ARCH__ / 10) == family;
#else
  return family == TileFamily::LARGE || family == TileFamily::SMALL;
#endif
}

EP_HOST_DEVICE constexpr int64_t shared_memory_limit(TileFamily family) { return (family == TileFamily::LARGE ? 163 : 99) * 1024; }

// Head dimensions that kernels are compiled for; others run in the next one, zeros beside them. 0: none.
EP_HOST_DEVICE constexpr int padded_head_dim(int64_t head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 96 ? 96 : head_dim <= 128 ? 128 : head_dim <= 192 ? 192 : head_dim <= 256 ? 256 : 0;
}

// Forward: a block holds `rows` rows of Q, and one tile each of K and V, loaded while the other is in use. A warp has rows / warps
// rows: 32 halve what it reads from shared memory, 16 leave registers for the output of wide heads (rows / warps * D / 32 of them).
struct ForwardTile {
  int rows, keys, warps;
  bool q_in_registers;
};

EP_HOST_DEVICE constexpr ForwardTile forward_tile(int head_dim, TileFamily family) {
  const bool large = family == TileFamily::LARGE;
  switch (head_dim) {
    case 64: return {128, 64, 4, false};                                                      // 32 KB
    case 96: return {128, 64, 4, false};                                                      // 48 KB
    case 128: return large ? ForwardTile{128, 48, 4, false} : ForwardTile{64, 64, 4, true};   // 56 KB, 48 KB
    case 192: return {128, 64, 8, false};                                                     // 96 KB
    default: return large ? ForwardTile{128, 64, 8, false} : ForwardTile{128, 32, 8, false};  // 128 KB, 96 KB
  }
}

EP_HOST_DEVICE constexpr int64_t forward_shared_memory(int head_dim, TileFamily family) {
  const ForwardTile t = forward_tile(head_dim, family);
  return int64_t(t.rows + 2 * t.keys) * head_dim * 2;
}

// Backward: a block keeps `keys` keys of K and V and walks over tiles of `rows` rows of Q and dout. It makes S^T and dP^T, 16 keys
// to a warp; where dK and dV of 16 keys do not fit a warp's registers, `split` warps share them, each with D / split columns.
struct BackwardTile {
  int rows, keys, warps, dout_stages;
  EP_HOST_DEVICE constexpr int split() const { return warps / (keys / 16); }
};

EP_HOST_DEVICE constexpr BackwardTile backward_tile(int head_dim, TileFamily family) {
  const bool large = family == TileFamily::LARGE;
  switch (head_dim) {
    case 64: return {64, 128, 8, 2};                                                     // 81 KB
    case 96: return large ? BackwardTile{64, 128, 8, 2} : BackwardTile{64, 64, 4, 2};    // 113 KB, 89 KB
    case 128: return large ? BackwardTile{32, 128, 8, 2} : BackwardTile{32, 128, 8, 1};  // 104.5 KB, 96.5 KB
    case 192: return large ? BackwardTile{64, 64, 8, 1} : BackwardTile{32, 64, 8, 1};    // 137 KB, 92.5 KB
    default: return large ? BackwardTile{32, 64, 8, 2} : BackwardTile{32, 32, 4, 1};     // 136.5 KB, 84.5 KB
  }
}

EP_HOST_DEVICE constexpr int64_t backward_shared_memory(int head_dim, TileFamily family) {
  const BackwardTile t = backward_tile(head_dim, family);
  const int64_t elements =
      int64_t(2 * t.keys + (2 + t.dout_stages) * t.rows) * head_dim + int64_t(t.split() > 1 ? 2 : 1) * t.keys * t.rows;
  return elements * 2 + 2 * 2 * t.rows * int64_t(sizeof(float));  // lse and delta of two tiles
}

// Decoding: 16 rows against a stretch of keys. Each warp has 16 keys of K and V in shared memory and the next 16 on their way; no
// warp waits for another before the end.
constexpr int DECODE_ROWS = 16, DECODE_KEYS = 16;
EP_HOST_DEVICE constexpr int decode_warps(int head_dim) { return head_dim > 128 ? 2 : 4; }
EP_HOST_DEVICE constexpr int64_t decode_shared_memory(int head_dim) {
  return int64_t(decode_warps(head_dim) * 2 * 2 * DECODE_KEYS + DECODE_ROWS) * head_dim * 2;
}

// Keys of a stretch, when a tile of rows sees a span of `keys`. It depends on nothing else, so a sequence's result is the same in
// every batch.
constexpr int MOST_SPLITS = 32, SPLIT_KEYS = 256;
EP_HOST_DEVICE constexpr int split_keys(int keys) {
  const int even = (keys + MOST_SPLITS - 1) / MOST_SPLITS;
  return even <= SPLIT_KEYS ? SPLIT_KEYS : (even + 63) / 64 * 64;
}
EP_HOST_DEVICE constexpr int split_count(int keys) {
  return keys <= SPLIT_KEYS ? 1 : (keys + split_keys(keys) - 1) / split_keys(keys);
}

// What every choice above has to keep to: shared memory of the family, whole 16 x 16 pieces, whole rows for the threads that load.
constexpr bool tiles_fit(int head_dim, TileFamily family) {
  const ForwardTile f = forward_tile(head_dim, family);
  const BackwardTile b = backward_tile(head_dim, family);
  const int split = b.split(), row_groups = b.rows / 16;
  return forward_shared_memory(head_dim, family) <= shared_memory_limit(family) && f.rows % (16 * f.warps) == 0 &&
         f.keys % 16 == 0 && backward_shared_memory(head_dim, family) <= shared_memory_limit(family) && b.keys % 16 == 0 &&
         b.warps % (b.keys / 16) == 0 && b.rows % (16 * split) == 0 && head_dim % (16 * split) == 0 && b.warps % row_groups == 0 &&
         head_dim % (16 * (b.warps / row_groups)) == 0 && decode_shared_memory(head_dim) <= shared_memory_limit(TileFamily::SMALL);
}
constexpr bool all_tiles_fit(TileFamily family) {
  return tiles_fit(64, family) && tiles_fit(96, family) && tiles_fit(128, family) && tiles_fit(192, family) &&
         tiles_fit(256, family);
}
static_assert(all_tiles_fit(TileFamily::LARGE) && all_tiles_fit(TileFamily::SMALL), "a tile does not fit its family");

struct Rows {  // (tokens, heads, head_dim) or pages of them; strides in elements
  void *data = nullptr;
  int64_t token = 0, head = 0, page = 0;
  bool vector = false;  // every row begins at a multiple of 16 bytes
};

// What a product q . k goes through on its way into an exponent of base 2. The running maximum is taken after `before` and the
// softcap, and before `after`, which is therefore positive.
struct ScoreScale {
  enum Kind : int32_t { PLAIN, SCALED, CAPPED } kind = PLAIN;  // x; x before; cap tanh(x before)
  float before = 1, cap = 0, after = 1;
};
inline ScoreScale score_scale(float scale, float softcap) {
  constexpr float LOG2E = 1.44269504088896341f;
  if (softcap > 0) return {ScoreScale::CAPPED, scale / softcap, softcap * LOG2E, 1.f};
  if (scale > 0) return {ScoreScale::PLAIN, 1.f, 0.f, scale * LOG2E};
  return {ScoreScale::SCALED, scale * LOG2E, 0.f, 1.f};
}

struct Problem {
  const int32_t *cu_q = nullptr, *cu_k = nullptr, *used_k = nullptr, *block_table = nullptr;  // device memory
  int32_t sequences = 0, tokens = 0, heads = 0, kv_heads = 0, group = 1, head_dim = 0;
  int32_t window = 0, page_size = 0;
  int64_t table_row = 0, keys = 0;  // keys: rows of k; with pages, the most that a row of block_table can hold
  float scale = 0;                  // of the products, as the caller gave it
  ScoreScale score;
  bool causal = false, bf16 = false;
};

struct ForwardLaunch {
  Problem shape;
  Rows q, k, v, out;
  float *lse = nullptr;
  float *part_out = nullptr, *part_lse = nullptr;  // decoding: (T, H, splits, padded head dim) and (T, H, splits), base 2
  int32_t splits = 1;
};

struct BackwardLaunch {
  Problem shape;
  Rows dout, q, k, v, out, dq, dk, dv;
  const float *lse = nullptr;
  float *delta = nullptr;     // (H, T)
  float *dq_sum = nullptr;    // (tile, kv head, rows * padded head dim), in the order of the accumulators of a block
  int32_t *turn = nullptr;    // (tile, kv head): how many key blocks have added to it
  int32_t *ticket = nullptr;  // the next key block to be worked on
  bool ordered = true;
};

// Few queries with many keys, which is what generation does. A pure function of what the host knows.
EP_HOST_DEVICE constexpr bool decodes(const Problem &s) {
  return (s.page_size > 0 || s.cu_k != nullptr) && int64_t(s.tokens) * s.group <= int64_t(2 * DECODE_ROWS) * s.sequences;
}

// No more tiles than this, whatever the lengths.
EP_HOST_DEVICE constexpr int64_t row_tiles(const Problem &s, int rows) { return int64_t(s.tokens) * s.group / rows + s.sequences; }

// The backward kernel for sm_90a: rows of a tile, which is a whole number of tokens, and how many tiles there are at most.
EP_HOST_DEVICE constexpr int wgmma_backward_rows(int head_dim) { return head_dim <= 64 ? 128 : 64; }
EP_HOST_DEVICE constexpr int64_t wgmma_row_tiles(const Problem &s, int rows) {
  return s.group > rows ? 0 : int64_t(s.tokens) / (rows / s.group) + s.sequences;
}

// Where the parts of a workspace are (null: nowhere, to count alone); bytes of the whole.
inline int64_t carve(ForwardLaunch &x, void *workspace) {
  const int64_t rows = int64_t(x.shape.tokens) * x.shape.heads;
  x.splits = split_count(int(x.shape.keys));
  if (x.splits == 1) return 0;
  Carver at{static_cast<char *>(workspace)};
  x.part_out = at.take<float>(rows * x.splits * padded_head_dim(x.shape.head_dim));
  x.part_lse = at.take<float>(rows * x.splits);
  return at.bytes;
}
inline int64_t carve(BackwardLaunch &x, void *workspace) {
  const Problem &s = x.shape;
  const int64_t dim = padded_head_dim(s.head_dim);
  int64_t tiles = 0, sums = 0;  // enough for every family
  const auto room_for = [&](int64_t count, int rows) {
    count *= s.kv_heads;
    tiles = count > tiles ? count : tiles, sums = count * rows > sums ? count * rows : sums;
  };
  for (TileFamily family : {TileFamily::LARGE, TileFamily::SMALL}) {
    const int rows = backward_tile(int(dim), family).rows;
    room_for(row_tiles(s, rows), rows);
  }
  if (dim == 64 || dim == 128) room_for(wgmma_row_tiles(s, wgmma_backward_rows(int(dim))), wgmma_backward_rows(int(dim)));
  Carver at{static_cast<char *>(workspace)};
  x.delta = at.take<float>(int64_t(s.tokens) * s.heads);
  x.dq_sum = at.take<float>(sums * dim);
  x.turn = at.take<int32_t>(tiles);
  x.ticket = at.take<int32_t>(1);
  return at.bytes;
}

int launch_forward(const ForwardLaunch &a, TileFamily family, void *stream);
// The same for sm_90a (attention_forward_wgmma.cu), and whether it takes this problem: heads of 64 or 128 (or what is padded to
// them), rows that TMA can read. A pure function of shape and strides.
int launch_forward_wgmma(const ForwardLaunch &a, void *stream);
inline bool wgmma_reads(const Rows &x, int64_t tokens, int64_t heads) {
  return x.vector && tokens > 0 && (tokens == 1 || x.token > 0) && (heads == 1 || x.head > 0);
}
inline bool wgmma_takes(const ForwardLaunch &a) {
  const Problem &s = a.shape;
  const int dim = padded_head_dim(s.head_dim);
  return (dim == 64 || dim == 128) && s.page_size == 0 && s.group <= 128 && wgmma_reads(a.q, s.tokens, s.heads) &&
         wgmma_reads(a.k, s.keys, s.kv_heads) && wgmma_reads(a.v, s.keys, s.kv_heads);
}
int launch_decode(const ForwardLaunch &a, void *stream);
inline bool wgmma_takes(const BackwardLaunch &a) {
  const Problem &s = a.shape;
  const int dim = padded_head_dim(s.head_dim);
  return (dim == 64 || dim == 128) && s.group <= wgmma_backward_rows(dim) && wgmma_reads(a.q, s.tokens, s.heads) &&
         wgmma_reads(a.dout, s.tokens, s.heads) && wgmma_reads(a.k, s.keys, s.kv_heads) && wgmma_reads(a.v, s.keys, s.kv_heads);
}
int launch_backward(const BackwardLaunch &a, TileFamily family, void *stream);
int launch_backward_wgmma(const BackwardLaunch &a, void *stream);
// delta of every row, zeros in `sums` elements of dq_sum and `turns` of turn: what comes before either.
int launch_prepare(const BackwardLaunch &a, int64_t sums, int64_t turns, void *stream);

}  // namespace cuda
}  // namespace ep
