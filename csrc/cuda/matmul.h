// Matrix products on the GPU as the kernel families ask for them. The kernel is in gemm.cuh, the planning in matmul.cu.
//
//   c (+)= a b + a2 b2
//
// Operands are float32, bfloat16 or float16 in any mix, each contiguous along one of its two dimensions. The tensor cores multiply
// one 16-bit type T: that of a and b where they share one, bfloat16 otherwise. An operand of another type is split into parts of
// type T, x = hi + mid + lo, and the product is the sum of those products of parts that matter:
//
//   bfloat16 times float32 -> float32      3 products      float32's own precision
//   float32 times float32 -> float32       6 products      the same
//   ... -> a 16-bit c                      2 or 3          an error of 2^-16 where c itself rounds at 2^-9 or 2^-12
#pragma once

#include <cstdint>

namespace ep {
namespace gemm {

enum class Kind { f32, bf16, f16 };

struct Operand {
  const char *data = nullptr;
  int64_t row = 0, col = 0;  // strides in elements, one of them 1
  Kind kind = Kind::f32;
};

struct Product {
  Operand a[2], b[2];  // (m, depth), (depth, n)
  int64_t depth[2] = {0, 0};
  int64_t m = 0, n = 0;
  char *c = nullptr;
  int64_t c_row = 0;
  Kind c_kind = Kind::f32;
  bool accumulate = false;
  const float *alpha = nullptr;  // one number in device memory that multiplies the product, or null
  // Integers in device memory, or null: rows of a from *m_limit - row0 on and steps of the first depth from *k_limit on do not
  // exist; rows of c from there on are left as they are.
  const int *m_limit = nullptr, *k_limit = nullptr;
  int64_t row0 = 0;
};

// Which tile, and into how many slices the depth is cut, each summed on its own and added in order by a second kernel. A pure
// function of the problem and the number of multiprocessors.
//
//   large   128 x 128, 4 warps of 64 x 64, 3 stages = 48 KB: two blocks on every multiprocessor from sm_80 on
//   small    64 x  64, 4 warps of 32 x 32, 4 stages = 32 KB
//
// A warp of the large tile reads 16 KB of shared memory for 131,072 multiply-adds, one of the small tile 8 KB for 32,768: large
// wins wherever its blocks fill the card.
struct Choice {
  bool large;
  int slices;
};
Choice choose(int64_t m, int64_t n, int64_t depth, int multiprocessors);

// Columns of a tile of 128 rows where wgmma takes the place of the large tile (gemm_wgmma.cuh): 256 where such tiles fill the card.
inline int wgmma_columns(int64_t m, int64_t n, int slices, int multiprocessors) {
  return (m + 127) / 128 * ((n + 255) / 256) * slices >= multiprocessors ? 256 : 128;
}

int64_t workspace_bytes(const Product &p, int multiprocessors);
// An ep status. The workspace is 64-byte aligned.
int run(const Product &p, int multiprocessors, void *workspace, void *stream);

}  // namespace gemm
}  // namespace ep
