// What the attention kernels for sm_90a share: the tensor maps by which TMA reads rows and keys, and the clearing of what it read
// beyond a sequence. Tiles in shared memory are [D / 64][rows][64] in rows of 128 bytes, swizzled (hopper.cuh).
#pragma once

#include "attention.h"
#include "hopper.cuh"
#include "launch.cuh"

namespace ep {
namespace cuda {

// Clears rows [from, to) of a tile for the products of the 128 threads that call this, which meet at `barrier`. Other warpgroups
// that read the tile clear it too: the same zeros.
template <int D, int ROWS>
__device__ __forceinline__ void clear_rows(unsigned char *tile, int from, int to, int thread, int barrier) {
#pragma unroll 1
  for (int i = thread; i < (to - from) * (D / 8); i += 128) {
    const int row = from + i / (D / 8), chunk = i % (D / 8);
    *reinterpret_cast<uint4 *>(tile + chunk / 8 * (ROWS * 128) + row * 128 + chunk % 8 * 16) = make_uint4(0, 0, 0, 0);
  }
  ptx::fence_async();
  ptx::named_barrier_sync(barrier, 128);
}

// A dimension of one element may have any stride, so it gets a lawful one; in bytes.
inline uint64_t lawful_stride(int64_t stride, int64_t extent, int64_t head_dim) {
  return extent > 1 ? uint64_t(stride) * 2 : uint64_t((head_dim + 7) / 8 * 16);
}
// (keys, key heads, D), in boxes of one head and `box_keys` keys.
inline int map_keys(TensorMap &map, const Rows &x, const Problem &s, int box_keys) {
  const uint64_t extent[] = {uint64_t(s.head_dim), uint64_t(s.kv_heads), uint64_t(s.keys)};
  const uint64_t stride[] = {lawful_stride(x.head, s.kv_heads, s.head_dim), lawful_stride(x.token, s.keys, s.head_dim)};
  const uint32_t box[] = {64, 1, uint32_t(box_keys)};
  return make_tensor_map(map, x.data, 3, extent, stride, box);
}
// (tokens, key heads, heads of a group, D), in boxes of a group and `tokens` tokens: stacked rows.
inline int map_queries(TensorMap &map, const Rows &x, const Problem &s, int tokens) {
  const uint64_t extent[] = {uint64_t(s.head_dim), uint64_t(s.group), uint64_t(s.kv_heads), uint64_t(s.tokens)};
  const uint64_t stride[] = {lawful_stride(x.head, s.group, s.head_dim), lawful_stride(x.head * s.group, s.kv_heads, s.head_dim),
                             lawful_stride(x.token, s.tokens, s.head_dim)};
  const uint32_t box[] = {64, uint32_t(s.group), 1, uint32_t(tokens)};
  return make_tensor_map(map, x.data, 4, extent, stride, box);
}

}  // namespace cuda
}  // namespace ep
