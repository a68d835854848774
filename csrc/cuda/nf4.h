// Quantised tensors on the GPU: what csrc/cpu/{nf4,nf4_blockwise8,matmul}.cpp hand over once they have checked the arguments.
#pragma once

#include <cstdint>

#include "matmul.h"

namespace ep {
namespace cuda {

struct Nf4Tensor {
  const uint8_t *packed;
  const float *absmax;  // null when nested
  const uint8_t *absmax8;
  const float *nested_absmax, *nested_code;
  float offset;
  int shift;  // blocksize = 1 << shift
  float code[16];
  int64_t size;
};

struct Nf4Quantize {
  const char *x;
  gemm::Kind kind;
  int64_t size;
  uint8_t *packed;
  float *absmax;
  int shift;
  float thresholds[15];
  uint8_t order[16];
};
int nf4_quantize(const Nf4Quantize &a, void *stream);

struct Nf4Dequantize {
  Nf4Tensor w;
  char *out;
  gemm::Kind kind;
};
int nf4_dequantize(const Nf4Dequantize &a, void *stream);

struct Blockwise8Quantize {
  const char *x;
  gemm::Kind kind;
  int64_t size;
  uint8_t *q;
  float *absmax;
  int shift;
  const float *midpoints;  // 255, in CPU memory
};
int blockwise8_quantize(const Blockwise8Quantize &a, void *stream);

struct Blockwise8Dequantize {
  const uint8_t *q;
  const float *absmax, *code;
  int64_t size;
  char *out;
  gemm::Kind kind;
  int shift;
  float offset;
};
int blockwise8_dequantize(const Blockwise8Dequantize &a, void *stream);

// product.b[0] is the weight (n, k), transposed or not, as in nf4_matmul of the C API; its Operand stays empty.
struct Nf4Matmul {
  gemm::Product product;
  Nf4Tensor weight;
  int64_t n, k;
  bool transposed;
};
int64_t nf4_matmul_workspace(const Nf4Matmul &a, int multiprocessors);
int nf4_matmul(const Nf4Matmul &a, int multiprocessors, void *workspace, void *stream);

}  // namespace cuda
}  // namespace ep
