// linear_logprob on the GPU: what csrc/cpu/linear_logprob.cpp hands over once it has checked the arguments.
#pragma once

#include <cstdint>

#include "matmul.h"

namespace ep {
namespace cuda {

struct LogprobProblem {
  const char *hidden, *weight;
  int64_t hidden_row, weight_row;  // strides in elements
  gemm::Kind kind;                 // of both, 16 bits
  const int64_t *targets;          // (T) in device memory: nobody has looked at them
  int64_t tokens, width, vocab;
  float softcap;
};

struct LogprobForward {
  LogprobProblem problem;
  float *logprob, *lse;
  float *entropy;    // or null
  float *direction;  // (T, K), or null
  int64_t direction_row;
  char *workspace;
};

struct LogprobBackward {
  LogprobProblem problem;
  const float *dlogprob, *dentropy, *lse, *entropy;  // dentropy and entropy may be null
  char *dhidden, *dweight;                           // either may be null
  int64_t dhidden_row, dweight_row;
  char *workspace;
};

int64_t linear_logprob_forward_workspace(int64_t tokens, int64_t width, int64_t vocab, bool direction, int multiprocessors);
int64_t linear_logprob_backward_workspace(int64_t tokens, int64_t width, int64_t vocab, bool dhidden, bool dweight,
                                          int multiprocessors);
int linear_logprob_forward(const LogprobForward &a, void *stream);
int linear_logprob_backward(const LogprobBackward &a, void *stream);

}  // namespace cuda
}  // namespace ep
