// c = a b + a2 b2, packed and blocked after Goto and van de Geijn 2008 ("Anatomy of High-Performance Matrix Multiplication").
//
// Both inputs are first copied into panels that the micro-kernel reads in order: a into panels of MR rows, b into panels of NR columns,
// k running fastest outside (k, MR) and (k, NR). The copy widens bfloat16 to float32, whichever way the input is transposed. The
// micro-kernel holds an MR x NR tile of c in registers and makes one fused multiply-add per element and k.
//
// NOTES: bfloat16 inputs are multiplied by float32 FMA. The bf16 dot product instruction (vdpbf16ps) has half the rate of two FMA
// ports on Intel's server cores (measured: oneDNN's bf16 product 77 GFLOP/s a core, this one above 120), and widening in the copy
// costs the same bytes as copying. The result is also closer: products are exact in float32, sums are rounded as float32.
//
// The order of summation over k is fixed by the shapes, so results do not depend on the thread count.
#include "enginepost/matmul.h"

#include "isa.h"
#include "parallel.h"
#include "simd.h"
#include "tensor.h"

namespace ep {

struct MatrixView {
  const char *data;
  int64_t row, col;  // strides in elements
  bool bf16;
};

struct Matmul {
  MatrixView a[2], b[2];
  int64_t depth[2];  // K, K2
  char *c;
  int64_t c_row, m, n;
  bool c_bf16, accumulate;
  float *workspace;
};

// Bounds of one packed block: PACK_BYTES for each of a and b, whatever the shape.
constexpr int64_t PACK_BYTES = 32 << 20;
constexpr int64_t ALIGN = 64;  // rows and columns of a block come in multiples of this, which every tile size below divides or pads to
static inline int64_t block_extent(int64_t extent, int64_t depth) {
  int64_t limit = PACK_BYTES / 4 / (depth > 0 ? depth : 1) / ALIGN * ALIGN;
  if (limit < 4 * ALIGN) limit = 4 * ALIGN;
  return extent < limit ? extent : limit;
}
static inline int64_t padded(int64_t extent) { return extent + 2 * ALIGN; }
constexpr int64_t SCRATCH = 64 * 512;  // floats of accumulator scratch per thread

}  // namespace ep

EP_KERNEL(matmul, Matmul)

#ifndef EP_API

namespace ep {
namespace EP_ISA {

#if defined(__AVX512F__)
constexpr int MR = 14, NV = 2;
#elif defined(__AVX2__)
constexpr int MR = 6, NV = 2;
#else
constexpr int MR = 4, NV = 1;
#endif
constexpr int NR = NV * N;
constexpr int64_t KC = 512;             // depth of one micro-kernel call: its b panel stays in the second-level cache
constexpr int64_t MB = 4 * MR, NB = 8 * NR;  // a task: four a panels against eight b panels
static_assert(MB * NB <= SCRATCH, "a task's tile must fit the scratch");

// Copies `count` lines (rows of a, columns of b) of depth k into a panel (k, WIDTH); lines beyond count are zero.
template <int WIDTH, class T>
static void pack_panel(const T *source, int64_t line_stride, int64_t k_stride, int count, int64_t k, float *panel) {
  if (line_stride == 1 && count == WIDTH) {
    for (int64_t p = 0; p < k; p++, source += k_stride, panel += WIDTH) {
      for (int i = 0; i < WIDTH; i++) panel[i] = to_float(source[i]);
    }
    return;
  }
  int64_t p = 0;
#if defined(__AVX512F__)
  // 16 lines x 16 k at a time through registers, so that both sides move whole cache lines.
  if (k_stride == 1) {
    for (; p + 16 <= k; p += 16) {
      for (int i0 = 0; i0 < WIDTH; i0 += 16) {
        __m512 r[16], t[16];
        for (int i = 0; i < 16; i++) r[i] = i0 + i < count ? load(source + (i0 + i) * line_stride + p).v : _mm512_setzero_ps();
        for (int i = 0; i < 16; i += 2) {
          t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
          t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {
          r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
          r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
          r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
          r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
        }
        for (int j = 0; j < 4; j++) {
          t[j] = _mm512_shuffle_f32x4(r[j], r[j + 4], 0x88);
          t[j + 4] = _mm512_shuffle_f32x4(r[j], r[j + 4], 0xdd);
          t[j + 8] = _mm512_shuffle_f32x4(r[j + 8], r[j + 12], 0x88);
          t[j + 12] = _mm512_shuffle_f32x4(r[j + 8], r[j + 12], 0xdd);
        }
        const int width = WIDTH - i0 < 16 ? WIDTH - i0 : 16;
        for (int j = 0; j < 4; j++) {
          store_n(panel + (p + j) * WIDTH + i0, V{_mm512_shuffle_f32x4(t[j], t[j + 8], 0x88)}, width);
          store_n(panel + (p + j + 4) * WIDTH + i0, V{_mm512_shuffle_f32x4(t[j + 4], t[j + 12], 0x88)}, width);
          store_n(panel + (p + j + 8) * WIDTH + i0, V{_mm512_shuffle_f32x4(t[j], t[j + 8], 0xdd)}, width);
          store_n(panel + (p + j + 12) * WIDTH + i0, V{_mm512_shuffle_f32x4(t[j + 4], t[j + 12], 0xdd)}, width);
        }
      }
    }
  }
#endif
  for (; p < k; p++) {
    for (int i = 0; i < WIDTH; i++) panel[p * WIDTH + i] = i < count ? to_float(source[i * line_stride + p * k_stride]) : 0.f;
  }
}

// Packs line panel `index` of both inputs of one side, one after the other along k.
template <int WIDTH>
static void pack(const MatrixView *inputs, bool rows, const int64_t *depth, int64_t first, int64_t end, float *panel) {
  const int count = int(end - first < WIDTH ? end - first : WIDTH);
  for (int part = 0; part < 2; part++) {
    const MatrixView &v = inputs[part];
    const int64_t line = rows ? v.row : v.col, step = rows ? v.col : v.row;
    if (depth[part] == 0) continue;
    if (v.bf16) {
      pack_panel<WIDTH>(reinterpret_cast<const bf16 *>(v.data) + first * line, line, step, count, depth[part], panel);
    } else {
      pack_panel<WIDTH>(reinterpret_cast<const float *>(v.data) + first * line, line, step, count, depth[part], panel);
    }
    panel += depth[part] * WIDTH;
  }
}

// tile (MR, NR) (+)= a panel (k, MR) times b panel (k, NR). The accumulators live in registers: MR * NV of them.
template <bool ADD>
static inline void micro(int64_t k, const float *__restrict a, const float *__restrict b, float *__restrict tile, int64_t ld) {
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) acc[i][j] = ADD ? load(tile + i * ld + j * N) : zero();
  }
  for (int64_t p = 0; p < k; p++, a += MR, b += NR) {
    V bv[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) bv[j] = load(b + j * N);
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      const V av = set1(a[i]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) acc[i][j] = fma(av, bv[j], acc[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) store(tile + i * ld + j * N, acc[i][j]);
  }
}

template <class C>
static void write_block(const Matmul &g, int64_t row, int64_t rows, int64_t col, int64_t cols, const float *tile) {
  for (int64_t i = 0; i < rows; i++) {
    C *c = reinterpret_cast<C *>(g.c) + (row + i) * g.c_row + col;
    const float *t = tile + i * NB;
    if (g.accumulate) {
      each(cols, [&](int64_t j, int n) { put(c + j, get(c + j, n) + get(t + j, n), n); });
    } else {
      each(cols, [&](int64_t j, int n) { put(c + j, get(t + j, n), n); });
    }
  }
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

void matmul(const Matmul &g) {
  const int64_t k = g.depth[0] + g.depth[1];
  const int64_t m_step = block_extent(g.m, k), n_step = block_extent(g.n, k);
  float *pack_a = g.workspace, *pack_b = pack_a + padded(m_step) * k, *scratch = pack_b + padded(n_step) * k;
  for (int64_t n0 = 0; n0 < g.n; n0 += n_step) {
    const int64_t n1 = least(n0 + n_step, g.n), b_panels = (n1 - n0 + NR - 1) / NR;
    for (int64_t m0 = 0; m0 < g.m; m0 += m_step) {
      const int64_t m1 = least(m0 + m_step, g.m), a_panels = (m1 - m0 + MR - 1) / MR;
      const int64_t fresh_a = g.m > m_step || n0 == 0 ? a_panels : 0, fresh_b = m0 == 0 ? b_panels : 0;
      constexpr int64_t GROUP = 4;
      const int64_t a_groups = (fresh_a + GROUP - 1) / GROUP, b_groups = (fresh_b + GROUP - 1) / GROUP;
      parallel_for(a_groups + b_groups, [&](int64_t task, int) {
        if (task < a_groups) {
          for (int64_t i = task * GROUP; i < least(fresh_a, (task + 1) * GROUP); i++) {
            pack<MR>(g.a, true, g.depth, m0 + i * MR, m1, pack_a + i * MR * k);
          }
        } else {
          task -= a_groups;
          for (int64_t i = task * GROUP; i < least(fresh_b, (task + 1) * GROUP); i++) {
            pack<NR>(g.b, false, g.depth, n0 + i * NR, n1, pack_b + i * NR * k);
          }
        }
      });
      const int64_t row_tasks = (m1 - m0 + MB - 1) / MB, col_tasks = (n1 - n0 + NB - 1) / NB;
      parallel_for(row_tasks * col_tasks, [&](int64_t task, int thread) {
        const int64_t row = m0 + task % row_tasks * MB, col = n0 + task / row_tasks * NB;
        const int64_t rows = least(MB, m1 - row), cols = least(NB, n1 - col);
        float *tile = scratch + thread * SCRATCH;
        for (int64_t p = 0; p < k || p == 0; p += KC) {
          const int64_t depth = least(KC, k - p);
          for (int64_t j = 0; j < cols; j += NR) {
            const float *b = pack_b + (col - n0 + j) * k + p * NR;
            for (int64_t i = 0; i < rows; i += MR) {
              const float *a = pack_a + (row - m0 + i) * k + p * MR;
              float *t = tile + i * NB + j;
              p == 0 ? micro<false>(depth, a, b, t, NB) : micro<true>(depth, a, b, t, NB);
            }
          }
        }
        g.c_bf16 ? write_block<bf16>(g, row, rows, col, cols, tile) : write_block<float>(g, row, rows, col, cols, tile);
      });
    }
  }
}

}  // namespace EP_ISA
}  // namespace ep

#else

using namespace ep;

// Any 2-D tensor with one contiguous dimension.
static bool strided(Tensor &out, const DLTensor *t, const char *fn, const char *name) {
  if (t == nullptr || t->ndim != 2 || t->strides == nullptr || t->shape == nullptr) return view(out, t, fn, name, 2, FLOATS);
  if (t->strides[1] == 1 || t->shape[1] == 1 || t->shape[0] == 0 || t->shape[1] == 0) return view(out, t, fn, name, 2, FLOATS);
  int64_t shape[2] = {t->shape[1], t->shape[0]}, strides[2] = {t->strides[1], t->strides[0]};
  DLTensor turned = *t;
  turned.shape = shape;
  turned.strides = strides;
  if (!view(out, &turned, fn, name, 2, FLOATS)) return false;
  int64_t extent = out.shape[0], stride = out.stride[0];
  out.shape[0] = out.shape[1], out.stride[0] = out.stride[1];
  out.shape[1] = extent, out.stride[1] = stride;
  return true;
}

extern "C" int64_t ep_matmul_workspace_bytes(int64_t m, int64_t n, int64_t k) {
  return ((padded(block_extent(m, k)) + padded(block_extent(n, k))) * k + int64_t(num_threads()) * SCRATCH) * 4;
}

extern "C" int ep_matmul(const DLTensor *a, const DLTensor *b, const DLTensor *a2, const DLTensor *b2, const DLTensor *c,
                         int accumulate, void *workspace, void *) {
  const char *fn = "matmul";
  Tensor av[2], bv[2];
  EP_VIEW(cv, c, 2, FLOATS);
  if (!strided(av[0], a, fn, "a") || !strided(bv[0], b, fn, "b")) return EP_INVALID_ARGUMENT;
  EP_REQUIRE((a2 == nullptr) == (b2 == nullptr), "%s: a2 and b2 come together", fn);
  if (a2 != nullptr && (!strided(av[1], a2, fn, "a2") || !strided(bv[1], b2, fn, "b2"))) return EP_INVALID_ARGUMENT;
  Matmul g{};
  g.m = cv.shape[0], g.n = cv.shape[1];
  for (int i = 0; i < (a2 == nullptr ? 1 : 2); i++) {
    EP_REQUIRE(av[i].shape[0] == g.m && bv[i].shape[1] == g.n && av[i].shape[1] == bv[i].shape[0],
               "%s: (%lld, %lld) times (%lld, %lld) does not make c (%lld, %lld)", fn, (long long)av[i].shape[0],
               (long long)av[i].shape[1], (long long)bv[i].shape[0], (long long)bv[i].shape[1], (long long)g.m, (long long)g.n);
    g.a[i] = {av[i].data, av[i].stride[0], av[i].stride[1], av[i].dtype == BF16};
    g.b[i] = {bv[i].data, bv[i].stride[0], bv[i].stride[1], bv[i].dtype == BF16};
    g.depth[i] = av[i].shape[1];
  }
  if (cv.size == 0) return EP_OK;
  EP_REQUIRE(cv.stride[0] >= g.n || g.m == 1, "%s: rows of c overlap", fn);
  EP_REQUIRE(workspace != nullptr && reinterpret_cast<uintptr_t>(workspace) % 64 == 0, "%s: workspace must be 64-byte aligned", fn);
  g.c = cv.data, g.c_row = cv.stride[0], g.c_bf16 = cv.dtype == BF16, g.accumulate = accumulate != 0;
  g.workspace = static_cast<float *>(workspace);
  EP_RUN(matmul, g);
  return EP_OK;
}

#endif
