// Few rows times a quantised weight: what csrc/cpu/matmul.cpp hands to csrc/cpu/nf4_matvec.cpp.
#pragma once

#include "isa.h"
#include "nf4_tile.h"

namespace ep {

struct Nf4Few {
  Nf4 w;
  int64_t m, n, k;  // k a multiple of 64
  const char *a;    // (m, k), rows at a_row elements
  int64_t a_row;
  bool a_bf16;
  // optional low-rank update: a2 (m, k2), b2 (k2, n), strides in elements
  const char *a2, *b2;
  int64_t k2, a2_row, a2_col, b2_row, b2_col;
  bool a2_bf16, b2_bf16;
  char *c;
  int64_t c_row;
  bool c_bf16, accumulate;
  float *workspace;  // m * (k + k2 padded to 16)
};

}  // namespace ep

EP_KERNEL(nf4_few, Nf4Few)
