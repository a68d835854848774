// Matrix products: operands made ready (see matmul.h: parts of numbers that are not of the type that is multiplied), the tile
// chosen, the product, the slices added. Up to 16 rows against a matrix that lies along the depth go to few_rows.cuh.
#include <cstdint>

#include "device.h"
#include "few_rows.cuh"
#include "gemm_wgmma.cuh"

namespace ep {
namespace gemm {

// The parts of an operand whose element (outer, inner) lies at outer * outer_stride + inner * inner_stride, as [part][outer][ld].
// The first part is the number rounded to T, the next what is missing, rounded; an infinity has no more parts.
template <class T, class S>
__global__ void split(const S *source, int64_t outer_stride, int64_t inner_stride, int64_t outer, int64_t inner, int64_t ld,
                      int parts, uint16_t *out) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < outer * inner; i += step) {
    const bool along = inner_stride == 1;
    const int64_t row = along ? i / inner : i % outer, column = along ? i % inner : i / outer;
    float x = to_float(source[row * outer_stride + column * inner_stride]);
    for (int p = 0; p < parts; p++) {
      const T part = from_float<T>(x);
      out[(p * outer + row) * ld + column] = part.bits;
      const float rest = x - to_float(part);
      x = rest - rest == 0.f ? rest : 0.f;
    }
  }
}

namespace {

struct Side {  // one operand made ready
  const uint16_t *part[3];
  int64_t ld;
  int parts;
  bool aligned;
};

struct Plan {
  Problem problem;
  bool a_across, b_across;
  Kind type;
  Choice choice;
  int64_t partials;  // where the slices lie in the workspace
  int64_t bytes;
};

int64_t rounded(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

int parts_of(Kind kind, Kind type, Kind c) {
  if (kind == type) return 1;
  return kind == Kind::f16 || c != Kind::f32 ? 2 : 3;
}

template <class T>
int launch_split(const Operand &x, int64_t outer_stride, int64_t inner_stride, int64_t outer, int64_t inner, int64_t ld, int parts,
                 uint16_t *out, void *stream) {
  const int64_t blocks = ceil_div(outer * inner, 256);
  const dim3 grid(unsigned(blocks < 4096 ? blocks : 4096));
  if (x.kind == Kind::f32) {
    return launch(&split<T, float>, grid, 256, 0, stream, reinterpret_cast<const float *>(x.data), outer_stride, inner_stride,
                  outer, inner, ld, parts, out);
  }
  if (x.kind == Kind::bf16) {
    return launch(&split<T, bf16>, grid, 256, 0, stream, reinterpret_cast<const bf16 *>(x.data), outer_stride, inner_stride, outer,
                  inner, ld, parts, out);
  }
  return launch(&split<T, fp16>, grid, 256, 0, stream, reinterpret_cast<const fp16 *>(x.data), outer_stride, inner_stride, outer,
                inner, ld, parts, out);
}

// `lines` rows of a or columns of b, `depth` long; across: stored [depth][lines]. Takes `bytes` of the workspace and moves it on.
// With a null workspace it only counts.
int ready(Side &side, const Operand &x, int64_t line_stride, int64_t depth_stride, int64_t lines, int64_t depth, bool across,
          Kind type, Kind c, char *workspace, int64_t &bytes, void *stream) {
  side.parts = parts_of(x.kind, type, c);
  const int64_t outer = across ? depth : lines, inner = across ? lines : depth;
  const int64_t outer_stride = across ? depth_stride : line_stride, inner_stride = across ? line_stride : depth_stride;
  if (side.parts == 1 && (inner_stride == 1 || inner <= 1)) {
    side.part[0] = reinterpret_cast<const uint16_t *>(x.data);
    side.ld = outer_stride;
    side.aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && outer_stride % 8 == 0;
    return EP_OK;
  }
  side.ld = rounded(inner, 8), side.aligned = true;
  const int64_t size = outer * side.ld;
  const int64_t begin = bytes;
  bytes += rounded(side.parts * size * 2, 256);
  if (workspace == nullptr) return EP_OK;
  uint16_t *out = reinterpret_cast<uint16_t *>(workspace + begin);
  for (int p = 0; p < side.parts; p++) side.part[p] = out + p * size;
  if (size == 0) return EP_OK;
  return type == Kind::bf16 ? launch_split<bf16>(x, outer_stride, inner_stride, outer, inner, side.ld, side.parts, out, stream)
                            : launch_split<fp16>(x, outer_stride, inner_stride, outer, inner, side.ld, side.parts, out, stream);
}

int make(Plan &plan, const Product &p, int multiprocessors, char *workspace, void *stream) {
  const Operand &a = p.a[0], &b = p.b[0];
  plan.type = a.kind == b.kind && a.kind != Kind::f32 ? a.kind : Kind::bf16;
  plan.a_across = a.col != 1 && p.depth[0] > 1;
  plan.b_across = b.row != 1 && p.depth[0] > 1;
  Problem &g = plan.problem;
  g.segments = 0, g.m = int(p.m), g.n = int(p.n), g.row0 = int(p.row0), g.m_limit = p.m_limit, g.k_limit = p.k_limit;
  int64_t bytes = 0, steps = 0;
  for (int i = 0; i < 2; i++) {
    if (p.depth[i] == 0) continue;
    Side x{}, y{};
    int status =
        ready(x, p.a[i], p.a[i].row, p.a[i].col, p.m, p.depth[i], plan.a_across, plan.type, p.c_kind, workspace, bytes, stream);
    if (status != EP_OK) return status;
    status =
        ready(y, p.b[i], p.b[i].col, p.b[i].row, p.n, p.depth[i], plan.b_across, plan.type, p.c_kind, workspace, bytes, stream);
    if (status != EP_OK) return status;
    const int order = x.parts > y.parts ? x.parts : y.parts;
    for (int u = 0; u < x.parts; u++) {
      for (int v = 0; v < y.parts && u + v < order; v++) {
        g.segment[g.segments++] = {x.part[u], y.part[v], x.ld, y.ld, int(p.depth[i]), x.aligned, y.aligned};
        steps += ceil_div(p.depth[i], BK);
      }
    }
  }
  plan.choice = choose(p.m, p.n, steps * BK, multiprocessors);
  if (plan.a_across && !plan.b_across) plan.choice.large = false;  // a layout that nobody asks for has one tile
  plan.partials = bytes;
  plan.bytes = bytes + (plan.choice.slices > 1 ? plan.choice.slices * p.m * p.n * 4 : 0);
  return EP_OK;
}

template <class T, class TILE, bool A_ACROSS, bool B_ACROSS>
int start(const Plan &plan, const Target &target, void *stream) {
  const Problem &g = plan.problem;
  const dim3 grid(unsigned(ceil_div(g.m, TILE::BM) * ceil_div(g.n, TILE::BN)), unsigned(plan.choice.slices));
  return launch(&product<T, TILE, A_ACROSS, B_ACROSS, Store>, grid, TILE::THREADS, TILE::SHARED_BYTES, stream, g, Store{target});
}

template <class T, class TILE>
int start(const Plan &plan, const Target &target, void *stream) {
  if (!plan.a_across) {
    return plan.b_across ? start<T, TILE, false, true>(plan, target, stream) : start<T, TILE, false, false>(plan, target, stream);
  }
  if (plan.b_across) return start<T, TILE, true, true>(plan, target, stream);
  return start<T, Small, true, false>(plan, target, stream);
}

template <class T, int BN>
int start_wgmma(const Plan &plan, const Target &target, int multiprocessors, void *stream) {
  const Problem &g = plan.problem;
  const int slices = plan.choice.slices;
  if (plan.a_across) return start_wgmma<T, BN, true, true>(g, Store{target}, slices, multiprocessors, stream);
  return plan.b_across ? start_wgmma<T, BN, false, true>(g, Store{target}, slices, multiprocessors, stream)
                       : start_wgmma<T, BN, false, false>(g, Store{target}, slices, multiprocessors, stream);
}

template <class T>
int start(const Plan &plan, const Target &target, const cuda::Device &device, void *stream) {
  const Problem &g = plan.problem;
  if (device.wgmma && plan.choice.large && wgmma_takes(g, plan.a_across, plan.b_across)) {
    return wgmma_columns(g.m, g.n, plan.choice.slices, device.multiprocessors) == 256
               ? start_wgmma<T, 256>(plan, target, device.multiprocessors, stream)
               : start_wgmma<T, 128>(plan, target, device.multiprocessors, stream);
  }
  return plan.choice.large ? start<T, Large>(plan, target, stream) : start<T, Small>(plan, target, stream);
}

constexpr int64_t FEW = 16, MOST_RANK = 256;

bool aligned(const Operand &x, int64_t line) { return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && line % 8 == 0; }

bool few(const Product &p) {
  const Operand &a = p.a[0], &b = p.b[0];
  return p.m <= FEW && p.depth[0] > 0 && p.depth[0] % Dense<bf16>::UNIT == 0 && p.depth[1] <= MOST_RANK && a.kind == b.kind &&
         a.kind != Kind::f32 && a.col == 1 && b.row == 1 && aligned(a, p.m > 1 ? a.row : 0) && aligned(b, p.n > 1 ? b.col : 0) &&
         p.m_limit == nullptr && p.k_limit == nullptr && p.alpha == nullptr;
}

template <class T>
int run_few(const Product &p, const Target &target, void *stream) {
  const Dense<T> weight{reinterpret_cast<const uint16_t *>(p.b[0].data), p.b[0].col};
  return launch(&few_rows<T, Dense<T>, 1>, dim3(unsigned(ceil_div(p.n, FEW_COLUMNS))), FEW_WARPS * 32, FEW_SUMS_BYTES, stream,
                reinterpret_cast<const uint16_t *>(p.a[0].data), p.a[0].row, int(p.m), int(p.n), p.depth[0], weight,
                Update{p.a[1], p.b[1], int(p.depth[1])}, target);
}

}  // namespace

Choice choose(int64_t m, int64_t n, int64_t depth, int multiprocessors) {
  constexpr int64_t FEWEST_STEPS = 8, MOST_SLICES = 16;
  const int64_t large = ceil_div(m, Large::BM) * ceil_div(n, Large::BN), small = ceil_div(m, Small::BM) * ceil_div(n, Small::BN);
  Choice choice{};
  choice.large = large >= multiprocessors && m > Small::BM && n > Small::BN;
  const int64_t blocks = choice.large ? large : small, places = multiprocessors * (choice.large ? 2 : 3);
  int64_t slices = blocks > 0 ? places / blocks : 1;
  const int64_t most = ceil_div(depth, BK) / FEWEST_STEPS;
  slices = slices < most ? slices : most;
  choice.slices = int(slices < 1 ? 1 : slices > MOST_SLICES ? MOST_SLICES : slices);
  return choice;
}

int64_t workspace_bytes(const Product &p, int multiprocessors) {
  if (few(p)) return 0;
  Plan plan;
  make(plan, p, multiprocessors, nullptr, nullptr);
  return plan.bytes;
}

int run(const Product &p, int multiprocessors, void *workspace, void *stream) {
  if (p.m == 0 || p.n == 0) return EP_OK;
  if (few(p)) {
    const Target target{p.c, p.c_row, p.c_kind, p.accumulate, false, nullptr, nullptr};
    return p.a[0].kind == Kind::bf16 ? run_few<bf16>(p, target, stream) : run_few<fp16>(p, target, stream);
  }
  Plan plan;
  int status = make(plan, p, multiprocessors, static_cast<char *>(workspace), stream);
  if (status != EP_OK) return status;
  const int size = p.c_kind == Kind::f32 ? 4 : 2;
  const bool c_aligned = reinterpret_cast<uintptr_t>(p.c) % 16 == 0 && p.c_row * size % 16 == 0;
  float *partial = plan.choice.slices > 1 ? reinterpret_cast<float *>(static_cast<char *>(workspace) + plan.partials) : nullptr;
  const Target target{p.c, p.c_row, p.c_kind, p.accumulate, c_aligned, p.alpha, partial};
  cuda::Device device;
  status = cuda::current_device(device);
  if (status != EP_OK) return status;
  status = plan.type == Kind::bf16 ? start<bf16>(plan, target, device, stream) : start<fp16>(plan, target, device, stream);
  if (status != EP_OK || partial == nullptr) return status;
  const int64_t blocks = ceil_div(p.m * p.n, 256);
  return launch(&add_slices, dim3(unsigned(blocks < 4096 ? blocks : 4096)), 256, 0, stream, target, int(p.m), int(p.n),
                plan.choice.slices, p.m_limit, int(p.row0));
}

}  // namespace gemm
}  // namespace ep
