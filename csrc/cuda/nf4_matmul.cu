// Matrix products with a weight of 4 bits. Few rows: the weight is decoded on its way to the tensor core (few_rows.cuh), so no more
// than its 4.5 bits a number are read. Many rows: it is decoded into the workspace, rounded to the type that is multiplied, and one
// product follows (the same numbers, as the few rows' are rounded too). Decoding moves 2.5 bytes a number, a product of m rows
// takes 2 m FLOP for it: 40 % of the time at 512 rows, 5 % at 4096.
#include "device.h"
#include "few_rows.cuh"
#include "nf4.cuh"

namespace ep {
namespace cuda {

using gemm::Kind;

namespace {

constexpr int64_t FEW = 64;

// Rows of k numbers of 4 bits, k a multiple of 32.
template <class T>
struct Packed {
  static constexpr int UNIT = 32, SHARED_BYTES = Codebook::SHARED_BYTES;
  Nf4Tensor w;
  int64_t k;

  struct Held {
    uint4 bits;
    float scale;
  };
  struct Reader {
    Nf4Tensor w;
    int64_t k;
    Codebook book;

    __device__ __forceinline__ Held load(int64_t row, int64_t column) const {
      const int64_t at = row * k + column;
      return {ptx::load_once(reinterpret_cast<const uint4 *>(w.packed + at / 2)), scale_of(w, at >> w.shift)};
    }
    __device__ __forceinline__ void operands(const Held &h, int s, uint32_t &b0, uint32_t &b1) const {
      const uint32_t word = s / 2 == 0 ? h.bits.x : s / 2 == 1 ? h.bits.y : s / 2 == 2 ? h.bits.z : h.bits.w;
      const uint32_t bytes = word >> (s % 2 * 16);  // element 2 i is the high half of byte i
      b0 = pack<T>(book.number(bytes >> 4, h.scale), book.number(bytes, h.scale));
      b1 = pack<T>(book.number(bytes >> 12, h.scale), book.number(bytes >> 8, h.scale));
    }
  };
  __device__ __forceinline__ Reader prepare() const { return {w, k, Codebook(w)}; }
  __device__ __forceinline__ static Held none() { return {make_uint4(0, 0, 0, 0), 0.f}; }
};

bool few(const Nf4Matmul &a) {
  const gemm::Operand &x = a.product.a[0];
  return !a.transposed && a.product.m <= FEW && a.k > 0 && a.k % 32 == 0 && x.kind != Kind::f32 && x.col == 1 && x.row % 8 == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && reinterpret_cast<uintptr_t>(a.weight.packed) % 16 == 0;
}

// The product with the weight as numbers at `weight`.
gemm::Product dense(const Nf4Matmul &a, char *weight) {
  gemm::Product p = a.product;
  p.b[0] = {weight, a.transposed ? a.k : 1, a.transposed ? 1 : a.k, p.a[0].kind};
  return p;
}

int64_t weight_bytes(const Nf4Matmul &a) { return (a.weight.size * (a.product.a[0].kind == Kind::f32 ? 4 : 2) + 255) / 256 * 256; }

template <class T, int MB>
int run_few(const Nf4Matmul &a, void *stream) {
  const gemm::Product &p = a.product;
  const gemm::Target target{p.c, p.c_row, p.c_kind, p.accumulate, false, nullptr, nullptr};
  const int shared = Packed<T>::SHARED_BYTES + gemm::FEW_SUMS_BYTES;
  return launch(&gemm::few_rows<T, Packed<T>, MB>, dim3(unsigned(ceil_div(a.n, gemm::FEW_COLUMNS))), gemm::FEW_WARPS * 32, shared,
                stream, reinterpret_cast<const uint16_t *>(p.a[0].data), p.a[0].row, int(p.m), int(a.n), a.k,
                Packed<T>{a.weight, a.k}, gemm::Update{p.a[1], p.b[1], int(p.depth[1])}, target);
}

template <class T>
int run_few(const Nf4Matmul &a, void *stream) {
  return a.product.m <= 16 ? run_few<T, 1>(a, stream) : run_few<T, 4>(a, stream);
}

}  // namespace

int64_t nf4_matmul_workspace(const Nf4Matmul &a, int multiprocessors) {
  return few(a) ? 0 : weight_bytes(a) + gemm::workspace_bytes(dense(a, nullptr), multiprocessors);
}

int nf4_matmul(const Nf4Matmul &a, int multiprocessors, void *workspace, void *stream) {
  if (few(a)) return a.product.a[0].kind == Kind::bf16 ? run_few<bf16>(a, stream) : run_few<fp16>(a, stream);
  char *weight = static_cast<char *>(workspace);
  if (a.weight.size > 0) {
    if (int status = nf4_dequantize({a.weight, weight, a.product.a[0].kind}, stream)) return status;
  }
  return gemm::run(dense(a, weight), multiprocessors, weight + weight_bytes(a), stream);
}

}  // namespace cuda
}  // namespace ep
