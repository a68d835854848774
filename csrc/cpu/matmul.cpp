// c = a b + a2 b2, packed and blocked after Goto and van de Geijn 2008 ("Anatomy of High-Performance Matrix Multiplication").
//
// a is copied once into panels of MR rows, b block by block into panels of NR columns, each panel holding its lines side by side
// for every k. The copy widens bfloat16 to float32, whichever way the input is transposed. The micro-kernel keeps an MR x NR tile
// of c in registers, so c is touched once. A block of b is packed by the thread that uses it. A group of panels of a lies in the
// second-level cache while the panels of b pass, and a run of one panel of b in the first-level cache while the group passes.
//
// A product with few rows (generation) is bound by the reading of b, so it packs nothing: columns of b that lie contiguously are
// multiplied where they lie.
//
// NOTES: bfloat16 inputs are multiplied by float32 FMA. The bf16 dot product instruction (vdpbf16ps) has half the rate of two FMA
// ports on Intel's server cores (oneDNN's bf16 product runs at half of MKL's float32 product there), and widening in the copy
// costs no more than copying. The result is also closer: products are exact in float32.
//
// Every element is summed in an order that depends on k alone, by one thread, so results depend neither on the blocking nor on the
// thread count. Runs of up to DEPTH products are summed on their own and then added up, which keeps the rounding error of a long
// sum down; a2 b2 has runs of its own, so that c is the same to the bit without it as with an a2 of zeros. What is zero at the ends
// of a panel of b2 is left out: in a fused projection b2 has the updates of its matrices on diagonal blocks.
//
// A weight in 4 bits (b alone) is decoded where bfloat16 would be widened: in the copy into panels, so that no more of it than a
// block is ever held as numbers.
#include "enginepost/matmul.h"

#include <algorithm>

#include "dispatch.h"
#include "enginepost/nf4.h"
#include "gemm.h"
#include "isa.h"
#include "nf4_matvec.h"
#include "nf4_tile.h"
#include "parallel.h"
#include "tensor.h"

namespace ep {

struct MatrixView {
  const char *data;
  int64_t row, col;  // strides in elements
  bool bf16;
  const Nf4 *quantized;  // a weight in 4 bits instead of data, or NULL
};

struct Matmul {
  MatrixView a[2], b[2];
  int64_t depth[2];  // K, K2
  char *c;
  int64_t c_row, m, n;
  bool c_bf16, accumulate;
  float *workspace;
  bool turned = false;  // c^T is wanted: row i of the product is column i of c
};

constexpr int64_t A_BYTES = 32 << 20;                  // packed rows of a at a time
constexpr int64_t B_BYTES = 3 << 17;                   // one thread's packed block of b: inside a second-level cache of 512 KB
constexpr int64_t A_ALIGN = 14 * 6 * 4, B_ALIGN = 32;  // multiples of every instruction set's tile
constexpr int64_t DEPTH = 512;                         // products in one run, at most
constexpr int64_t FEW_ROWS = 16, FEW_ALIGN = 16;       // rows that are not packed, and what their depth is padded to
constexpr int64_t FEW_COLS = 64;                       // columns up to which a product may be turned (see `turn`)

static inline int64_t blocked(int64_t extent, int64_t depth, int64_t bytes, int64_t align) {
  int64_t limit = bytes / 4 / (depth > 0 ? depth : 1) / align * align;
  if (limit < align) limit = align;
  const int64_t all = (extent + align - 1) / align * align;
  return all < limit ? all : limit;
}
struct Filled {
  int64_t first, last;
};
// What one thread packs of b, in floats: its block, and for each panel (of 8 columns at least) which lines are filled.
static inline int64_t block_floats(int64_t cols, int64_t depth) { return cols * depth + cols / 8 * int64_t(sizeof(Filled) / 4); }
static inline int64_t block_rows(int64_t m, int64_t depth) { return blocked(m, depth, A_BYTES, A_ALIGN); }
static inline int64_t block_cols(int64_t n, int64_t depth) { return blocked(n, depth, B_BYTES, B_ALIGN); }

}  // namespace ep

EP_KERNEL(matmul, Matmul)

#ifndef EP_API

namespace ep {
namespace EP_ISA {

constexpr int64_t GROUP = 72 / MR;        // panels of a that a panel of b is used for before the next one comes
constexpr int64_t GROUP_BYTES = 3 << 16;  // and their bytes at most, unless one has more: inside a second-level cache, beside b

static_assert(A_ALIGN % MR == 0 && B_ALIGN % NR == 0, "blocks hold whole panels");

// Copies `count` lines (rows of a, columns of b) of depth k into a panel (k, WIDTH); lines beyond count are zero.
template <int WIDTH, class T>
static void pack_panel(const T *source, int64_t line_stride, int64_t k_stride, int count, int64_t k, float *panel) {
  if (line_stride == 1) {
    int64_t p = 0;
    if (count == WIDTH) {
      // Whole vectors, as masks are slow on some processors: the next line overwrites what is written beyond a line of the panel,
      // and what is read beyond a line of the source lies before the end of the last one.
      constexpr int64_t WHOLE = (WIDTH + N - 1) / N * N;
      const int64_t end = WHOLE == WIDTH ? k : k - 1;
      for (; p < end && (k - 1 - p) * k_stride + WIDTH >= WHOLE; p++, source += k_stride, panel += WIDTH) {
        for (int i = 0; i < WIDTH; i += N) store(panel + i, load(source + i));
      }
    }
    for (; p < k; p++, source += k_stride, panel += WIDTH) {
      for (int i = 0; i < WIDTH; i += N) {
        const int width = WIDTH - i < N ? WIDTH - i : N, left = count - i < width ? count - i : width;
        put(panel + i, left <= 0 ? zero() : get(source + i, left), width);
      }
    }
    return;
  }
  if (k_stride == 1) return pack_columns<WIDTH>([&](int i) { return source + i * line_stride; }, count, k, 1.f, panel);
  for (int64_t p = 0; p < k; p++) {
    for (int i = 0; i < WIDTH; i++) panel[p * WIDTH + i] = i < count ? to_float(source[i * line_stride + p * k_stride]) : 0.f;
  }
}

// The same for a weight in 4 bits: lines are its rows (line_stride > 1), decoded a stretch at a time, or its columns.
template <int WIDTH>
static void pack_panel(const Nf4 &w, int64_t first, int64_t line_stride, int64_t k_stride, int count, int64_t k, float *panel) {
  constexpr int64_t STRETCH = 128;
  alignas(64) float rows[WIDTH][STRETCH];
  if (k_stride == 1) {
    for (int64_t p = 0; p < k; p += STRETCH) {
      const int64_t steps = k - p < STRETCH ? k - p : STRETCH;
      for (int i = 0; i < count; i++) decode(w, (first + i) * line_stride + p, steps, rows[i]);
      pack_columns<WIDTH>([&](int i) { return rows[i]; }, count, steps, 1.f, panel + p * WIDTH);
    }
    return;
  }
  for (int64_t p = 0; p < k; p++, panel += WIDTH) {
    decode(w, p * k_stride + first, count, panel);
    for (int i = count; i < WIDTH; i++) panel[i] = 0.f;
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
    if (WIDTH == NR && v.quantized != nullptr) {
      pack_panel<NR>(*v.quantized, first, line, step, count, depth[part], panel);
    } else if (v.bf16) {
      pack_panel<WIDTH>(reinterpret_cast<const bf16 *>(v.data) + first * line, line, step, count, depth[part], panel);
    } else {
      pack_panel<WIDTH>(reinterpret_cast<const float *>(v.data) + first * line, line, step, count, depth[part], panel);
    }
    panel += depth[part] * WIDTH;
  }
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t chunks(int64_t extent, int64_t size) { return (extent + size - 1) / size; }

// Lines of a panel (k, NR) that are not zero: those before first and from last on are.
static inline Filled filled(const float *panel, int64_t k) {
  const auto empty = [&](int64_t p) {
    for (int i = 0; i < NR; i++) {
      if (panel[p * NR + i] != 0.f) return false;
    }
    return true;
  };
  Filled lines{0, k};
  while (lines.first < k && empty(lines.first)) lines.first++;
  while (lines.last > lines.first && empty(lines.last - 1)) lines.last--;
  return lines;
}

// c tile (rows, cols) = or += what is in `sum` (MR, NR); with `turned` it is c that has cols rows.
template <class C>
static inline void put_tile(const float *sum, C *c, int64_t c_row, int rows, int cols, bool accumulate, bool turned) {
  if (turned) {
    for (int j = 0; j < cols; j++, c += c_row) {
      for (int i = 0; i < rows; i++) from_float(accumulate ? to_float(c[i]) + sum[i * NR + j] : sum[i * NR + j], c + i);
    }
    return;
  }
  for (int i = 0; i < rows; i++, c += c_row) {
    const float *line = sum + i * NR;
    each(cols, [&](int64_t j, int n) { put(c + j, accumulate ? get(c + j, n) + get(line + j, N) : get(line + j, N), n); });
  }
}

// sums (count, MR, NR) = count panels of a, each (k, MR), times one panel of b (k, NR), k both depths, of the second only the
// filled lines. A run of b's panel fits the first-level cache, and all panels of a pass over it before the next run.
static inline void multiply(const int64_t *depth, const Filled &second, const float *a, int64_t count, const float *b,
                            float *sums) {
  const int64_t a_panel = (depth[0] + depth[1]) * MR;
  bool begun = false;
  for (int part = 0; part < 2; part++) {
    if (part == 1) a += second.first * MR, b += second.first * NR;
    const int64_t k = part == 0 ? depth[0] : second.last - second.first;
    const int64_t runs = chunks(k, DEPTH), run = runs > 0 ? chunks(k, runs) : 0;
    for (int64_t p = 0; p < k; p += run, begun = true) {
      const int64_t steps = least(run, k - p);
      for (int64_t i = 0; i < count; i++) {
        float *sum = sums + i * MR * NR;
        const float *lines = a + i * a_panel;
        begun ? micro<1, MR, true>(steps, lines, b, NR, sum, NR) : micro<1, MR, false>(steps, lines, b, NR, sum, NR);
      }
      a += steps * MR, b += steps * NR;
    }
  }
  for (int64_t i = 0; i < count && !begun; i++) micro<1, MR, false>(0, a, b, NR, sums + i * MR * NR, NR);
}

template <class C>
static void product(const Matmul &g) {
  const int64_t k = g.depth[0] + g.depth[1], threads = num_threads();
  const int64_t m_step = block_rows(g.m, k), n_step = block_cols(g.n, k);
  float *pack_a = g.workspace, *pack_b = pack_a + m_step * k;
  Filled *lines = reinterpret_cast<Filled *>(pack_b + threads * n_step * k);
  for (int64_t m0 = 0; m0 < g.m; m0 += m_step) {
    const int64_t m1 = least(m0 + m_step, g.m), panels = chunks(m1 - m0, MR);
    parallel_for(chunks(panels, 4), [&](int64_t task, int) {
      for (int64_t i = task * 4; i < least(panels, task * 4 + 4); i++) {
        pack<MR>(g.a, true, g.depth, m0 + i * MR, m1, pack_a + i * MR * k);
      }
    });
    // One task per block of b, then row by row groups where there are too few blocks for the threads. Any split gives the same
    // bits.
    const int64_t whole = chunks(g.n, n_step), even = chunks(whole, threads) * threads;
    const int64_t cols = least(n_step, chunks(chunks(g.n, even), NR) * NR), col_tasks = chunks(g.n, cols);
    const int64_t row_tasks = col_tasks >= threads ? 1 : least(chunks(threads, col_tasks), chunks(panels, 4));
    const int64_t row_panels = chunks(panels, row_tasks);
    parallel_for(row_tasks * col_tasks, [&](int64_t task, int thread) {
      const int64_t n0 = task / row_tasks * cols, n1 = least(n0 + cols, g.n), first = task % row_tasks * row_panels;
      float *mine = pack_b + thread * n_step * k;
      Filled *second = lines + thread * (n_step / NR);
      for (int64_t j = n0; j < n1; j += NR) {
        float *panel = mine + (j - n0) * k;
        pack<NR>(g.b, false, g.depth, j, n1, panel);
        second[(j - n0) / NR] = filled(panel + g.depth[0] * NR, g.depth[1]);
      }
      const int64_t last = least(panels, first + row_panels), fitting = GROUP_BYTES / 4 / (MR * std::max<int64_t>(k, 1));
      const int64_t group = std::max<int64_t>(1, least(GROUP, fitting));
      alignas(64) float sums[GROUP * MR * NR];
      for (int64_t i0 = first; i0 < last; i0 += group) {
        const int64_t count = least(group, last - i0);
        for (int64_t j = n0; j < n1; j += NR) {
          multiply(g.depth, second[(j - n0) / NR], pack_a + i0 * MR * k, count, mine + (j - n0) * k, sums);
          for (int64_t i = 0; i < count; i++) {
            const int64_t row = m0 + (i0 + i) * MR;
            C *c = reinterpret_cast<C *>(g.c) + (g.turned ? row + j * g.c_row : row * g.c_row + j);
            put_tile(sums + i * MR * NR, c, g.c_row, int(least(MR, m1 - row)), int(least(NR, n1 - j)), g.accumulate, g.turned);
          }
        }
      }
    });
  }
}

// R rows of x (widened, zero beyond the depth) times W columns of both b's, with W accumulators a row.
template <int R, int W, class C>
static inline void few(const Matmul &g, const float *x, const int64_t *padded, int64_t row, int64_t col) {
  V acc[R][W];
  for (int i = 0; i < R; i++) {
    for (int w = 0; w < W; w++) acc[i][w] = zero();
  }
  const int64_t ld = padded[0] + padded[1];
  x += row * ld;
  for (int part = 0; part < 2; x += padded[part], part++) {
    const MatrixView &b = g.b[part];
    const auto run = [&](auto *first) {
      each(g.depth[part], [&](int64_t p, int n) {
        V xv[R];
        for (int i = 0; i < R; i++) xv[i] = load(x + i * ld + p);
        for (int w = 0; w < W; w++) {
          const V bv = get(first + w * b.col + p, n);
          for (int i = 0; i < R; i++) acc[i][w] = fma(xv[i], bv, acc[i][w]);
        }
      });
    };
    b.bf16 ? run(reinterpret_cast<const bf16 *>(b.data) + col * b.col) : run(reinterpret_cast<const float *>(b.data) + col * b.col);
  }
  for (int i = 0; i < R; i++) {
    C *c = reinterpret_cast<C *>(g.c) + (row + i) * g.c_row + col;
    for (int w = 0; w < W; w++) from_float(g.accumulate ? to_float(c[w]) + sum(acc[i][w]) : sum(acc[i][w]), c + w);
  }
}

template <int W, class C>
static inline void few_columns(const Matmul &g, const float *x, const int64_t *padded, int64_t col) {
  int64_t row = 0;
  for (; row + 4 <= g.m; row += 4) few<4, W, C>(g, x, padded, row, col);
  if (g.m - row == 3) few<3, W, C>(g, x, padded, row, col);
  if (g.m - row == 2) few<2, W, C>(g, x, padded, row, col);
  if (g.m - row == 1) few<1, W, C>(g, x, padded, row, col);
}

static bool few_rows(const Matmul &g) {
  if (g.b[0].quantized != nullptr) return false;
  for (int part = 0; part < 2; part++) {
    if (g.depth[part] > 0 && (g.a[part].col != 1 || g.b[part].row != 1)) return false;
  }
  return g.m <= FEW_ROWS;
}

template <class C>
static void few_product(const Matmul &g) {
  constexpr int64_t COLS = 64;
  constexpr int W = N == 16 ? 4 : 2;
  int64_t padded[2];
  for (int part = 0; part < 2; part++) padded[part] = chunks(g.depth[part], FEW_ALIGN) * FEW_ALIGN;
  const int64_t ld = padded[0] + padded[1];
  for (int part = 0; part < 2; part++) {
    const MatrixView &a = g.a[part];
    float *x = g.workspace + (part ? padded[0] : 0);
    const auto widen_rows = [&](auto *first) {
      for (int64_t i = 0; i < g.m; i++) {
        pack_rows([&](int64_t) { return first + i * a.row; }, 1, g.depth[part], padded[part], x + i * ld);
      }
    };
    if (g.depth[part] == 0) continue;
    a.bf16 ? widen_rows(reinterpret_cast<const bf16 *>(a.data)) : widen_rows(reinterpret_cast<const float *>(a.data));
  }
  parallel_for(chunks(g.n, COLS), [&](int64_t task, int) {
    int64_t col = task * COLS;
    const int64_t end = least(col + COLS, g.n);
    for (; col + W <= end; col += W) few_columns<W, C>(g, g.workspace, padded, col);
    for (; col < end; col++) few_columns<1, C>(g, g.workspace, padded, col);
  });
}

// c^T = b^T a^T for the products of a backward pass that have many rows, few columns and an a whose rows lie across (dy^T s, x^T
// ds): copied into panels of MR lines it would be cut into pieces that fill no vector, and as b^T it is copied in whole ones.
static bool turn(const Matmul &g, Matmul &t) {
  if (g.n > FEW_COLS || g.m <= g.n || g.depth[1] > 0 || g.a[0].row != 1 || g.a[0].col == 1 || g.b[0].quantized != nullptr)
    return false;
  t = g;
  t.m = g.n, t.n = g.m, t.turned = true;
  t.a[0] = {g.b[0].data, g.b[0].col, g.b[0].row, g.b[0].bf16, nullptr};
  t.b[0] = {g.a[0].data, g.a[0].col, g.a[0].row, g.a[0].bf16, nullptr};
  return true;
}

void matmul(const Matmul &g) {
  if (few_rows(g)) return g.c_bf16 ? few_product<bf16>(g) : few_product<float>(g);
  Matmul t;
  if (turn(g, t)) return g.c_bf16 ? product<bf16>(t) : product<float>(t);
  g.c_bf16 ? product<bf16>(g) : product<float>(g);
}

}  // namespace EP_ISA
}  // namespace ep

#else

#include "device_nf4.h"

using namespace ep;

constexpr unsigned NUMBERS = FLOATS | GPU;
constexpr int64_t MOST_EXTENT = int64_t(1) << 36;  // beyond, no memory would do, and the bytes might overflow

// Any 2-D tensor with one contiguous dimension.
static bool strided(Tensor &out, const DLTensor *t, const char *fn, const char *name) {
  if (t == nullptr || t->ndim != 2 || t->strides == nullptr || t->shape == nullptr) return view(out, t, fn, name, 2, NUMBERS);
  if (t->strides[1] == 1 || t->shape[1] == 1 || t->shape[0] == 0 || t->shape[1] == 0) return view(out, t, fn, name, 2, NUMBERS);
  int64_t shape[2] = {t->shape[1], t->shape[0]}, strides[2] = {t->strides[1], t->strides[0]};
  DLTensor turned = *t;
  turned.shape = shape;
  turned.strides = strides;
  if (!view(out, &turned, fn, name, 2, NUMBERS)) return false;
  int64_t extent = out.shape[0], stride = out.stride[0];
  out.shape[0] = out.shape[1], out.stride[0] = out.stride[1];
  out.shape[1] = extent, out.stride[1] = stride;
  return true;
}

extern "C" int64_t ep_matmul_workspace_bytes(int64_t m, int64_t n, int64_t k) {
  const auto packed = [&](int64_t rows, int64_t cols) {
    return block_rows(rows, k) * k + block_floats(block_cols(cols, k), k) * int64_t(num_threads());
  };
  int64_t most = packed(m, n);
  if (n <= FEW_COLS && packed(n, m) > most) most = packed(n, m);
  if (m <= FEW_ROWS && m * (k + 2 * FEW_ALIGN) > most) most = m * (k + 2 * FEW_ALIGN);
  return most * 4;
}

namespace {
struct Arguments {
  Tensor a[2], b[2], c;
};
}  // namespace

static int check_matmul(Arguments &x, const DLTensor *a, const DLTensor *b, const DLTensor *a2, const DLTensor *b2,
                        const DLTensor *c) {
  const char *fn = "matmul";
  if (!view(x.c, c, fn, "c", 2, NUMBERS) || !strided(x.a[0], a, fn, "a") || !strided(x.b[0], b, fn, "b"))
    return EP_INVALID_ARGUMENT;
  EP_REQUIRE((a2 == nullptr) == (b2 == nullptr), "%s: a2 and b2 come together", fn);
  if (a2 != nullptr && (!strided(x.a[1], a2, fn, "a2") || !strided(x.b[1], b2, fn, "b2"))) return EP_INVALID_ARGUMENT;
  const int64_t m = x.c.shape[0], n = x.c.shape[1];
  for (int i = 0; i < (a2 == nullptr ? 1 : 2); i++) {
    EP_REQUIRE(x.a[i].shape[0] == m && x.b[i].shape[1] == n && x.a[i].shape[1] == x.b[i].shape[0],
               "%s: (%lld, %lld) times (%lld, %lld) does not make c (%lld, %lld)", fn, (long long)x.a[i].shape[0],
               (long long)x.a[i].shape[1], (long long)x.b[i].shape[0], (long long)x.b[i].shape[1], (long long)m, (long long)n);
  }
  EP_REQUIRE(x.c.size == 0 || x.c.stride[0] >= n || m == 1, "%s: rows of c overlap", fn);
  return check_one_device(fn, {&x.c, &x.a[0], &x.b[0], &x.a[1], &x.b[1]});
}

extern "C" int64_t ep_matmul_workspace_bytes_for(const DLTensor *a, const DLTensor *b, const DLTensor *a2, const DLTensor *b2,
                                                 const DLTensor *c) {
  Arguments x;
  if (check_matmul(x, a, b, a2, b2, c) != EP_OK || x.c.size == 0) return 0;
  if (x.c.shape[0] > MOST_EXTENT || x.c.shape[1] > MOST_EXTENT || x.a[0].shape[1] + x.a[1].shape[1] > MOST_EXTENT) return 0;
#if defined(EP_GPU)
  if (on_gpu(x.c.device)) return device_product_bytes(device_product(x.a, x.b, x.c, 0), x.c.device);
#endif
  return ep_matmul_workspace_bytes(x.c.shape[0], x.c.shape[1], x.a[0].shape[1] + x.a[1].shape[1]);
}

extern "C" int ep_matmul(const DLTensor *a, const DLTensor *b, const DLTensor *a2, const DLTensor *b2, const DLTensor *c,
                         int accumulate, void *workspace, void *stream) {
  const char *fn = "matmul";
  Arguments x;
  if (int status = check_matmul(x, a, b, a2, b2, c)) return status;
  if (x.c.size == 0) return EP_OK;
#if defined(EP_GPU)
  if (on_gpu(x.c.device)) return run_device_product(fn, device_product(x.a, x.b, x.c, accumulate), x.c.device, workspace, stream);
#endif
  (void)stream;
  EP_REQUIRE(workspace != nullptr && reinterpret_cast<uintptr_t>(workspace) % 64 == 0, "%s: workspace must be 64-byte aligned", fn);
  Matmul g{};
  g.m = x.c.shape[0], g.n = x.c.shape[1];
  for (int i = 0; i < 2; i++) {
    g.a[i] = {x.a[i].data, x.a[i].stride[0], x.a[i].stride[1], x.a[i].dtype == BF16, nullptr};
    g.b[i] = {x.b[i].data, x.b[i].stride[0], x.b[i].stride[1], x.b[i].dtype == BF16, nullptr};
    g.depth[i] = x.a[i].shape[1];
  }
  g.c = x.c.data, g.c_row = x.c.stride[0], g.c_bf16 = x.c.dtype == BF16, g.accumulate = accumulate != 0;
  g.workspace = static_cast<float *>(workspace);
  EP_RUN(matmul, g);
  return EP_OK;
}

// Rows that the fused kernel takes; from 16 on, decoding into panels is worth its while.
static bool fused(int64_t m, int64_t k, int transposed) { return m < FEW_ROWS && k % 64 == 0 && !transposed; }

extern "C" int64_t ep_nf4_matmul_workspace_bytes(int64_t m, int64_t n, int64_t k, int transposed, int64_t k2) {
  if (fused(m, k, transposed)) return m * (k + (k2 + 15) / 16 * 16) * 4;
  return ep_matmul_workspace_bytes(m, transposed ? k : n, (transposed ? n : k) + k2);
}

namespace {
struct Nf4Arguments {
  Tensor a[2], b[2], c;  // b[0], the weight, stays empty
  Nf4 w;
};
}  // namespace

static int check_nf4_matmul(Nf4Arguments &x, const DLTensor *a, const ep_nf4_tensor &weight, int64_t n, int64_t k, int transposed,
                            const DLTensor *a2, const DLTensor *b2, const DLTensor *c) {
  const char *fn = "nf4_matmul";
  if (!view(x.c, c, fn, "c", 2, NUMBERS)) return EP_INVALID_ARGUMENT;
  EP_REQUIRE(n >= 0 && k >= 0 && (k == 0 || n < (int64_t(1) << 56) / k), "%s: weight (%lld, %lld) is an impossible shape", fn,
             (long long)n, (long long)k);
  if (int status = nf4_view(x.w, weight, n * k, fn)) return status;
  if (!strided(x.a[0], a, fn, "a")) return EP_INVALID_ARGUMENT;
  EP_REQUIRE((a2 == nullptr) == (b2 == nullptr), "%s: a2 and b2 come together", fn);
  if (a2 != nullptr && (!strided(x.a[1], a2, fn, "a2") || !strided(x.b[1], b2, fn, "b2"))) return EP_INVALID_ARGUMENT;
  const int64_t m = x.c.shape[0], columns = transposed ? k : n, depth = transposed ? n : k;
  EP_REQUIRE(x.a[0].shape[0] == m && x.a[0].shape[1] == depth && x.c.shape[1] == columns,
             "%s: a (%lld, %lld) and a weight (%lld, %lld)%s do not make c (%lld, %lld)", fn, (long long)x.a[0].shape[0],
             (long long)x.a[0].shape[1], (long long)n, (long long)k, transposed ? ", transposed," : "", (long long)m,
             (long long)x.c.shape[1]);
  EP_REQUIRE(a2 == nullptr || (x.a[1].shape[0] == m && x.b[1].shape[1] == columns && x.b[1].shape[0] == x.a[1].shape[1]),
             "%s: a2 (%lld, %lld) and b2 (%lld, %lld) do not make c (%lld, %lld)", fn, (long long)x.a[1].shape[0],
             (long long)x.a[1].shape[1], (long long)x.b[1].shape[0], (long long)x.b[1].shape[1], (long long)m, (long long)columns);
  EP_REQUIRE(x.c.size == 0 || x.c.stride[0] >= columns || m == 1, "%s: rows of c overlap", fn);
  return check_one_device(fn, {&x.c, &x.a[0], &x.a[1], &x.b[1]});
}

#if defined(EP_GPU)
static cuda::Nf4Matmul device_nf4_matmul(const Nf4Arguments &x, int64_t n, int64_t k, int transposed, int accumulate) {
  cuda::Nf4Matmul on{device_product(x.a, x.b, x.c, accumulate), device_nf4(x.w), n, k, transposed != 0};
  on.product.a[0] = operand_of(x.a[0]), on.product.depth[0] = x.a[0].shape[1];
  return on;
}
#endif

extern "C" int64_t ep_nf4_matmul_workspace_bytes_for(const DLTensor *a, ep_nf4_tensor weight, int64_t n, int64_t k, int transposed,
                                                     const DLTensor *a2, const DLTensor *b2, const DLTensor *c) {
  Nf4Arguments x;
  if (check_nf4_matmul(x, a, weight, n, k, transposed, a2, b2, c) != EP_OK || x.c.size == 0) return 0;
  if (x.c.shape[0] > MOST_EXTENT || n > MOST_EXTENT || k > MOST_EXTENT || x.b[1].shape[0] > MOST_EXTENT) return 0;
#if defined(EP_GPU)
  if (on_gpu(x.c.device)) {
    cuda::UseDevice use(x.c.device.device_id);
    cuda::Device device;
    if (cuda::current_device(device) != EP_OK) return 0;
    return cuda::nf4_matmul_workspace(device_nf4_matmul(x, n, k, transposed, 0), device.multiprocessors);
  }
#endif
  return ep_nf4_matmul_workspace_bytes(x.c.shape[0], n, k, transposed, x.b[1].shape[0]);
}

extern "C" int ep_nf4_matmul(const DLTensor *a, ep_nf4_tensor weight, int64_t n, int64_t k, int transposed, const DLTensor *a2,
                             const DLTensor *b2, const DLTensor *c, int accumulate, void *workspace, void *stream) {
  const char *fn = "nf4_matmul";
  Nf4Arguments x;
  if (int status = check_nf4_matmul(x, a, weight, n, k, transposed, a2, b2, c)) return status;
  if (x.c.size == 0) return EP_OK;
#if defined(EP_GPU)
  if (on_gpu(x.c.device)) {
    cuda::UseDevice use(x.c.device.device_id);
    cuda::Device device;
    if (int status = cuda::current_device(device)) return status;
    const cuda::Nf4Matmul on = device_nf4_matmul(x, n, k, transposed, accumulate);
    if (int status = check_device_product(fn, on.product)) return status;
    EP_REQUIRE(cuda::nf4_matmul_workspace(on, device.multiprocessors) == 0 ||
                   (workspace != nullptr && reinterpret_cast<uintptr_t>(workspace) % 16 == 0),
               "%s: workspace must be 16-byte aligned", fn);
    return cuda::nf4_matmul(on, device.multiprocessors, workspace, stream);
  }
#endif
  (void)stream;
  EP_REQUIRE(workspace != nullptr && reinterpret_cast<uintptr_t>(workspace) % 64 == 0, "%s: workspace must be 64-byte aligned", fn);
  const Tensor *av = x.a, &bv = x.b[1], &cv = x.c;
  const Nf4 &w = x.w;
  const int64_t m = cv.shape[0], columns = transposed ? k : n, depth = transposed ? n : k, depth2 = av[1].shape[1];
  if (fused(m, k, transposed) && av[0].stride[1] == 1) {
    Nf4Few f{w,
             m,
             n,
             k,
             av[0].data,
             av[0].stride[0],
             av[0].dtype == BF16,
             av[1].data,
             bv.data,
             depth2,
             av[1].stride[0],
             av[1].stride[1],
             bv.stride[0],
             bv.stride[1],
             av[1].dtype == BF16,
             bv.dtype == BF16,
             cv.data,
             cv.stride[0],
             cv.dtype == BF16,
             accumulate != 0,
             static_cast<float *>(workspace)};
    EP_RUN(nf4_few, f);
    return EP_OK;
  }
  Matmul g{};
  g.m = m, g.n = columns, g.depth[0] = depth, g.depth[1] = depth2;
  g.a[0] = {av[0].data, av[0].stride[0], av[0].stride[1], av[0].dtype == BF16, nullptr};
  g.a[1] = {av[1].data, av[1].stride[0], av[1].stride[1], av[1].dtype == BF16, nullptr};
  g.b[0] = {nullptr, transposed ? k : 1, transposed ? 1 : k, false, &w};
  g.b[1] = {bv.data, bv.stride[0], bv.stride[1], bv.dtype == BF16, nullptr};
  g.c = cv.data, g.c_row = cv.stride[0], g.c_bf16 = cv.dtype == BF16, g.accumulate = accumulate != 0;
  g.workspace = static_cast<float *>(workspace);
  EP_RUN(matmul, g);
  return EP_OK;
}

#endif
