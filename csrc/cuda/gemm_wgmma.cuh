// The matrix product of gemm.cuh for sm_90a: the same problems and epilogues, by TMA and wgmma.
//
//   warpgroup 0      one thread brings steps of 64 in k, STAGES of them on their way, over all tiles of the block
//   warpgroups 1, 2  64 rows each of a tile of 128 x BN; float32 accumulators (BN / 2 a thread) in registers
//
//   stage   A: 128 x 64 | B: BN x 64, in rows of 128 bytes, swizzled: [128][64 of k], or across, panels [64 of k][64 of m or n]
//
// A block works on tiles blockIdx.x, blockIdx.x + gridDim.x, ..., so the loads of the next tile run behind the epilogue of this
// one. TMA fills with zeros beyond the edges of a matrix. What lies beyond *k_limit, which the host does not know, is cleared in
// shared memory; operands lie across k there, rows of it are rows of the tile.
//
// An epilogue sees the accumulators in pieces of 64 columns: acc[0][8][4] at row m, column n, as gemm.cuh says.
#pragma once

#include "gemm.cuh"
#include "hopper.cuh"

namespace ep {
namespace gemm {

constexpr int WGMMA_BM = 128, WGMMA_BK = 64, WGMMA_THREADS = 384;

struct WgmmaProblem {
  TensorMap a[MAX_SEGMENTS], b[MAX_SEGMENTS];
  Problem g;
};
static_assert(sizeof(WgmmaProblem) <= 3840, "with an epilogue, within the 4 KB of a kernel's arguments");

template <int BN_>
struct WgmmaTile {
  static constexpr int BM = WGMMA_BM, BN = BN_, WM = 16, WN = 64, MB = 1, NB = 8;  // WM, WN, MB, NB: of a piece
  static constexpr int A_BYTES = BM * 128, STAGE_BYTES = A_BYTES + BN * 128, STAGES = BN == 256 ? 4 : 6;
  static constexpr int BARRIERS = STAGES * STAGE_BYTES, SHARED_BYTES = BARRIERS + 16 * STAGES;
  static_assert(SHARED_BYTES <= 227 * 1024, "the shared memory of a block");
};

// Which steps of which tiles: the same for all roles of a block.
template <class TILE>
struct Walk {
  const Problem &g;
  int rows, first_depth, begin, steps, tiles;

  __device__ __forceinline__ explicit Walk(const Problem &problem)
      : g(problem), rows(problem.m), first_depth(problem.segment[0].k) {
    if (g.m_limit != nullptr) rows = min(rows, *g.m_limit - g.row0);
    if (g.k_limit != nullptr) first_depth = min(first_depth, *g.k_limit);
    int total = 0;
    for (int s = 0; s < g.segments; s++) total += steps_of(s);
    const int slice = (total + int(gridDim.y) - 1) / int(gridDim.y);
    begin = slice * int(blockIdx.y);
    steps = max(min(total - begin, slice), 0);
    tiles = ((g.m + TILE::BM - 1) / TILE::BM) * ((g.n + TILE::BN - 1) / TILE::BN);
  }
  __device__ __forceinline__ int steps_of(int segment) const {
    return ((segment == 0 ? first_depth : g.segment[segment].k) + WGMMA_BK - 1) / WGMMA_BK;
  }
};

template <class TILE, bool A_ACROSS, bool B_ACROSS>
__device__ __forceinline__ void produce(const WgmmaProblem &x, uint32_t shared) {
  const Walk<TILE> walk(x.g);
  int stage = 0, round = 0;
  for (int tile = int(blockIdx.x); tile < walk.tiles; tile += int(gridDim.x)) {
    const Place at = place_of<TILE>(x.g, tile);
    if (at.m0 >= walk.rows) continue;
    int segment = 0, step = walk.begin;
    for (int t = 0; t < walk.steps; t++, step++) {
      while (step >= walk.steps_of(segment)) step -= walk.steps_of(segment++);
      const uint32_t full = shared + TILE::BARRIERS + 8 * stage, a = shared + stage * TILE::STAGE_BYTES, b = a + TILE::A_BYTES;
      ptx::mbarrier_wait(full + 8 * TILE::STAGES, (round & 1) ^ 1);
      ptx::mbarrier_arrive_expect(full, TILE::STAGE_BYTES);
      const int k0 = step * WGMMA_BK;
      if (A_ACROSS) {
#pragma unroll
        for (int p = 0; p < TILE::BM / 64; p++) ptx::tma_load(a + p * 8192, x.a[segment], full, at.m0 + p * 64, k0);
      } else {
        ptx::tma_load(a, x.a[segment], full, k0, at.m0);
      }
      if (B_ACROSS) {
#pragma unroll
        for (int p = 0; p < TILE::BN / 64; p++) ptx::tma_load(b + p * 8192, x.b[segment], full, at.n0 + p * 64, k0);
      } else {
        ptx::tma_load(b, x.b[segment], full, k0, at.n0);
      }
      if (++stage == TILE::STAGES) stage = 0, round++;
    }
  }
}

// Clears rows [from, 64) of k: of this warpgroup's panel of A, and of B, where the other warpgroup writes the same.
template <class TILE>
__device__ __forceinline__ void clear_depth(uint32_t stage, uint32_t shared, int from, int thread, int group) {
  unsigned char *a = shared_memory<unsigned char>() + (stage - shared);
  const int chunks = (WGMMA_BK - from) * 8;
#pragma unroll 1
  for (int panel = 0; panel <= TILE::BN / 64; panel++) {
    unsigned char *at = panel == 0 ? a + group * 8192 : a + TILE::A_BYTES + (panel - 1) * 8192;
    for (int i = thread; i < chunks; i += 128) *reinterpret_cast<uint4 *>(at + from * 128 + i * 16) = make_uint4(0, 0, 0, 0);
  }
  ptx::fence_async();
  ptx::named_barrier_sync(1 + group, 128);
}

template <class T, class TILE, bool A_ACROSS, bool B_ACROSS, class EPILOGUE>
__device__ __forceinline__ void consume(const WgmmaProblem &x, const EPILOGUE &epilogue, uint32_t shared, int group) {
  const Walk<TILE> walk(x.g);
  const int thread = int(threadIdx.x) % 128, lane = thread % 32;
  const int clear_step = x.g.k_limit != nullptr && walk.first_depth % WGMMA_BK != 0 ? walk.steps_of(0) - 1 - walk.begin : -1;
  constexpr int A_STEP = A_ACROSS ? 2048 : 32, B_STEP = B_ACROSS ? 2048 : 32;
  int stage = 0, round = 0;
  for (int tile = int(blockIdx.x); tile < walk.tiles; tile += int(gridDim.x)) {
    const Place at = place_of<TILE>(x.g, tile);
    if (at.m0 >= walk.rows) continue;
    float acc[TILE::BN / 8][4];
#pragma unroll
    for (int j = 0; j < TILE::BN / 8; j++) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.f;
    uint32_t before = 0;  // the mbarrier of the stage that is released next
#pragma unroll 1
    for (int t = 0; t < walk.steps; t++) {
      const uint32_t full = shared + TILE::BARRIERS + 8 * stage, from = shared + stage * TILE::STAGE_BYTES;
      ptx::mbarrier_wait(full, round & 1);
      if constexpr (A_ACROSS && B_ACROSS) {
        if (t == clear_step) clear_depth<TILE>(from, shared, walk.first_depth % WGMMA_BK, thread, group);
      }
      const uint64_t a = ptx::matrix(from + group * 8192, 0, 1024),
                     b = ptx::matrix(from + TILE::A_BYTES, B_ACROSS ? 8192 : 0, 1024);
      ptx::wgmma_hold(acc);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < WGMMA_BK / 16; k++) {
        ptx::wgmma<T, A_ACROSS, B_ACROSS>(acc, ptx::moved(a, k * A_STEP), ptx::moved(b, k * B_STEP), true);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (t > 0 && lane == 0) ptx::mbarrier_arrive(before);
      before = full + 8 * TILE::STAGES;
      if (++stage == TILE::STAGES) stage = 0, round++;
    }
    ptx::wgmma_wait<0>(acc);
    if (walk.steps > 0 && lane == 0) ptx::mbarrier_arrive(before);
    const int columns = (x.g.n + 127) / 128 * 128;  // what epilogues have room for
#pragma unroll
    for (int p = 0; p < TILE::BN / 64; p++) {
      if (at.n0 + p * 64 >= columns) break;
      float (&piece)[1][8][4] = *reinterpret_cast<float (*)[1][8][4]>(&acc[p * 8]);
      epilogue.template operator()<T, TILE>(x.g, piece, at.m0 + group * 64 + thread / 32 * 16, at.n0 + p * 64, walk.rows);
    }
  }
}

template <class T, class TILE, bool A_ACROSS, bool B_ACROSS, class EPILOGUE>
__global__ void __launch_bounds__(WGMMA_THREADS, 1) product_wgmma(const __grid_constant__ WgmmaProblem x, const EPILOGUE epilogue) {
#if EP_SM90A
  const uint32_t shared = ptx::shared_address(shared_memory<unsigned char>());
  const int group = int(threadIdx.x) / 128;
  if (threadIdx.x == 0) {
    for (int i = 0; i < TILE::STAGES; i++) {
      ptx::mbarrier_init(shared + TILE::BARRIERS + 8 * i, 1);
      ptx::mbarrier_init(shared + TILE::BARRIERS + 8 * (TILE::STAGES + i), 8);  // a warp of the two warpgroups each
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (group == 0) {
    ptx::fewer_registers<24>();
    if (threadIdx.x < 32 && ptx::elected()) produce<TILE, A_ACROSS, B_ACROSS>(x, shared);
  } else {
    ptx::more_registers<240>();
    consume<T, TILE, A_ACROSS, B_ACROSS>(x, epilogue, shared, group - 1);
  }
#endif
}

// Whether the kernel above takes this product: every line of every operand at a multiple of 16 bytes, and k_limit only where both
// operands lie across.
inline bool wgmma_takes(const Problem &g, bool a_across, bool b_across) {
  bool takes =
      g.segments >= 1 && g.m > 0 && g.n > 0 && !(a_across && !b_across) && (g.k_limit == nullptr || (a_across && b_across));
  for (int s = 0; s < g.segments; s++) takes = takes && g.segment[s].a_aligned && g.segment[s].b_aligned && g.segment[s].k > 0;
  return takes;
}

// `lines` lines of `width` elements; boxes of 64 elements by box_lines.
inline int map_operand(TensorMap &map, const uint16_t *data, int64_t ld, int64_t lines, int64_t width, int box_lines) {
  const uint64_t extent[] = {uint64_t(width), uint64_t(lines)};
  const uint64_t stride[] = {uint64_t(lines > 1 ? ld : (width + 7) / 8 * 8) * 2};
  const uint32_t box[] = {64, uint32_t(box_lines)};
  return make_tensor_map(map, data, 2, extent, stride, box);
}

template <class T, int BN, bool A_ACROSS, bool B_ACROSS, class EPILOGUE>
int start_wgmma(const Problem &g, const EPILOGUE &epilogue, int slices, int multiprocessors, void *stream) {
  using TILE = WgmmaTile<BN>;
  WgmmaProblem x;
  x.g = g;
  for (int s = 0; s < g.segments; s++) {
    const Segment &of = g.segment[s];
    if (int status =
            A_ACROSS ? map_operand(x.a[s], of.a, of.lda, of.k, g.m, 64) : map_operand(x.a[s], of.a, of.lda, g.m, of.k, TILE::BM))
      return status;
    if (int status = B_ACROSS ? map_operand(x.b[s], of.b, of.ldb, of.k, g.n, 64) : map_operand(x.b[s], of.b, of.ldb, g.n, of.k, BN))
      return status;
  }
  const int64_t tiles = ceil_div(g.m, TILE::BM) * ceil_div(g.n, BN),
                places = multiprocessors / slices > 1 ? multiprocessors / slices : 1;
  const dim3 grid(unsigned(tiles < places ? tiles : places), unsigned(slices));
  return launch(&product_wgmma<T, TILE, A_ACROSS, B_ACROSS, EPILOGUE>, grid, WGMMA_THREADS, TILE::SHARED_BYTES, stream, x,
                epilogue);
}

}  // namespace gemm
}  // namespace ep
