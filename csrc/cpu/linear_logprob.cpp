// Checks and entry points of linear_logprob; the passes are in linear_logprob_forward.cpp and linear_logprob_backward.cpp.
#include "enginepost/linear_logprob.h"

#include <cstring>

#include "device_product.h"
#include "linear_logprob.h"
#include "parallel.h"

#ifdef EP_API

#if defined(EP_GPU)
#include "../cuda/linear_logprob.h"
#endif

using namespace ep;

constexpr unsigned NUMBERS = FLOATS | GPU, SINGLES = F32 | GPU;

constexpr int64_t SKIPPED = -100;

// A vector with one entry per token.
static int check_vector(const char *fn, const char *name, const Tensor &t, int64_t tokens) {
  EP_REQUIRE(t.shape[0] == tokens && t.contiguous, "%s: %s must be contiguous with one element per row of hidden, %lld, got %lld",
             fn, name, (long long)tokens, (long long)t.shape[0]);
  return EP_OK;
}

static int check_matrix(const char *fn, const char *name, const Tensor &t, const char *like, const Tensor &of) {
  EP_REQUIRE(t.shape[0] == of.shape[0] && t.shape[1] == of.shape[1],
             "%s: %s must have the shape of %s, (%lld, %lld), got (%lld, %lld)", fn, name, like, (long long)of.shape[0],
             (long long)of.shape[1], (long long)t.shape[0], (long long)t.shape[1]);
  EP_REQUIRE(t.shape[0] <= 1 || t.shape[1] == 0 || t.stride[0] >= t.shape[1], "%s: rows of %s overlap", fn, name);
  return EP_OK;
}

namespace {
struct Inputs {
  Tensor hidden, weight, targets, lse;
  LogprobShape shape;
};
}  // namespace

static int check_inputs(const char *fn, Inputs &in, const DLTensor *hidden, const DLTensor *weight, const DLTensor *targets,
                        const DLTensor *lse, double softcap, int64_t first = 0, int64_t whole_vocab = -1) {
  if (!view(in.hidden, hidden, fn, "hidden", 2, NUMBERS) || !view(in.weight, weight, fn, "weight", 2, NUMBERS) ||
      !view(in.targets, targets, fn, "targets", 1, I64 | GPU) || !view(in.lse, lse, fn, "lse", 1, SINGLES)) {
    return EP_INVALID_ARGUMENT;
  }
  const int64_t tokens = in.hidden.shape[0], width = in.hidden.shape[1], rows = in.weight.shape[0];
  const int64_t vocab = whole_vocab < 0 ? rows : whole_vocab;
  EP_REQUIRE(in.weight.shape[1] == width, "%s: weight must have the width of hidden, %lld, got (%lld, %lld)", fn, (long long)width,
             (long long)rows, (long long)in.weight.shape[1]);
  EP_REQUIRE(width >= 1 && rows >= 1, "%s: weight (%lld, %lld) is empty", fn, (long long)rows, (long long)width);
  EP_REQUIRE(first >= 0 && first % SPLIT == 0 && first <= vocab && rows <= vocab - first,
             "%s: rows [%lld, +%lld) are not a part of %lld; parts begin at multiples of %d", fn, (long long)first, (long long)rows,
             (long long)vocab, int(SPLIT));
  EP_REQUIRE(first + rows == vocab || rows % SPLIT == 0, "%s: a part before the last has %lld rows, not a multiple of %d", fn,
             (long long)rows, int(SPLIT));
  EP_REQUIRE(vocab <= int64_t(1) << 31, "%s: weight has %lld rows; up to 2^31 are supported", fn, (long long)vocab);
  if (int status = check_vector(fn, "targets", in.targets, tokens)) return status;
  if (int status = check_vector(fn, "lse", in.lse, tokens)) return status;
  EP_REQUIRE(softcap >= 0 && softcap - softcap == 0, "%s: softcap must be 0 (none) or positive, got %g", fn, softcap);
  if (int status = check_one_device(fn, {&in.hidden, &in.weight, &in.targets, &in.lse})) return status;
  const int64_t *y = reinterpret_cast<const int64_t *>(in.targets.data);
  int64_t kept = 0;
  const bool gpu = on_gpu(in.hidden.device);  // there the targets cannot be read
  EP_REQUIRE(!gpu || (in.hidden.dtype == in.weight.dtype && in.hidden.dtype != F32),
             "%s: on a GPU hidden and weight must both be bfloat16 or both float16", fn);
  EP_REQUIRE(!gpu || (tokens < int64_t(1) << 30 && width < int64_t(1) << 30 && vocab < int64_t(1) << 30),
             "%s: on a GPU up to 2^30 rows, columns and entries are supported", fn);
  for (int64_t t = 0; t < tokens && !gpu; t++) {
    EP_REQUIRE(y[t] == SKIPPED || (y[t] >= 0 && y[t] < vocab),
               "%s: targets[%lld] = %lld is not in the vocabulary of %lld entries, nor -100 (skipped)", fn, (long long)t,
               (long long)y[t], (long long)vocab);
    kept += y[t] != SKIPPED;
  }
  in.shape = {in.hidden.data,
              in.weight.data,
              in.hidden.stride[0],
              in.weight.stride[0],
              in.hidden.dtype == BF16,
              in.weight.dtype == BF16,
              y,
              nullptr,
              tokens,
              kept,
              width,
              vocab,
              float(softcap),
              first,
              first + rows};
  return EP_OK;
}

static void list_rows(const LogprobShape &s) {
  for (int64_t t = 0, i = 0; t < s.tokens; t++) {
    if (s.targets[t] != SKIPPED) s.rows[i++] = t;
  }
}

static void clear_rows(const LogprobShape &s, char *data, int64_t row_bytes, int64_t bytes) {
  for (int64_t t = 0; t < s.tokens; t++) {
    if (s.targets[t] == SKIPPED) std::memset(data + t * row_bytes, 0, size_t(bytes));
  }
}

static int64_t carve_forward(LogprobForward &a, char *workspace, int64_t rows, int64_t width) {
  Carver at{workspace};
  a.shape.rows = at.take<int64_t>(rows);
  a.turn = at.take<int32_t>(blocks_of(rows, ROWS));
  a.row_max = at.take<float>(padded_rows(rows));
  a.row_sum = at.take<float>(padded_rows(rows));
  a.row_spread = at.take<float>(padded_rows(rows));
  a.target_logit = at.take<float>(padded_rows(rows));
  a.hidden_panels = at.take<float>(panel_floats(rows, width));
  a.scratch = at.take<float>(forward_scratch(rows, width) * num_threads());
  return at.bytes;
}

static int64_t carve_backward(LogprobBackward &a, char *workspace, int64_t rows, int64_t width) {
  Carver at{workspace};
  a.shape.rows = at.take<int64_t>(rows);
  a.turn = at.take<int32_t>(blocks_of(rows, ROWS));
  a.row_values = at.take<float>(4 * padded_rows(rows));
  a.hidden_panels = at.take<float>(panel_floats(rows, width));
  a.dhidden_panels = at.take<float>(panel_floats(rows, width));
  a.hidden_lines = at.take<float>(line_floats(rows, width));
  a.scratch = at.take<float>(backward_scratch(rows, width) * num_threads());
  return at.bytes;
}

// A matrix of a size that can be: its bytes, and those of workspaces in its proportion, do not overflow.
static bool possible(const DLTensor *t) {
  constexpr int64_t MOST = int64_t(1) << 40;
  if (t == nullptr || t->ndim != 2 || t->shape == nullptr || t->shape[0] < 0 || t->shape[1] < 0) return false;
  return t->shape[0] <= MOST && t->shape[1] <= MOST && (t->shape[1] == 0 || t->shape[0] <= MOST / t->shape[1]);
}

#if defined(EP_GPU)
static cuda::LogprobProblem device_problem(const Inputs &in) {
  const LogprobShape &s = in.shape;
  return {s.hidden,  s.weight, s.hidden_row, s.weight_row, kind_of(in.hidden.dtype),
          s.targets, s.tokens, s.width,      s.vocab,      s.softcap};
}

static int check_device_workspace(const char *fn, const void *workspace) {
  EP_REQUIRE(workspace != nullptr && reinterpret_cast<uintptr_t>(workspace) % 16 == 0, "%s: workspace must be 16-byte aligned", fn);
  return EP_OK;
}

// Calls bytes(tokens, width, vocab, multiprocessors) with the sizes of two matrices on a GPU; -1 where they are not on one.
template <class Bytes>
static int64_t device_bytes(const DLTensor *hidden, const DLTensor *weight, Bytes &&bytes) {
  if (!possible(hidden) || !possible(weight) || !on_gpu(hidden->device)) return -1;
  cuda::UseDevice use(hidden->device.device_id);
  cuda::Device device;
  if (cuda::current_device(device) != EP_OK) return 0;
  return bytes(hidden->shape[0], hidden->shape[1], weight->shape[0], device.multiprocessors);
}
#endif

extern "C" int64_t ep_linear_logprob_forward_workspace_bytes_for(const DLTensor *hidden, const DLTensor *weight,
                                                                 const DLTensor *direction) {
#if defined(EP_GPU)
  const int64_t bytes = device_bytes(hidden, weight, [&](int64_t tokens, int64_t width, int64_t vocab, int processors) {
    return cuda::linear_logprob_forward_workspace(tokens, width, vocab, direction != nullptr, processors);
  });
  if (bytes >= 0) return bytes;
#endif
  (void)weight, (void)direction;
  return possible(hidden) ? ep_linear_logprob_forward_workspace_bytes(hidden->shape[0], hidden->shape[1]) : 0;
}

extern "C" int64_t ep_linear_logprob_backward_workspace_bytes_for(const DLTensor *hidden, const DLTensor *weight,
                                                                  const DLTensor *dhidden, const DLTensor *dweight) {
#if defined(EP_GPU)
  const int64_t bytes = device_bytes(hidden, weight, [&](int64_t tokens, int64_t width, int64_t vocab, int processors) {
    return cuda::linear_logprob_backward_workspace(tokens, width, vocab, dhidden != nullptr, dweight != nullptr, processors);
  });
  if (bytes >= 0) return bytes;
#endif
  (void)weight, (void)dhidden, (void)dweight;
  return possible(hidden) ? ep_linear_logprob_backward_workspace_bytes(hidden->shape[0], hidden->shape[1]) : 0;
}

extern "C" int64_t ep_linear_logprob_forward_workspace_bytes(int64_t tokens, int64_t width) {
  LogprobForward unused{};
  return carve_forward(unused, nullptr, tokens, width);
}

extern "C" int64_t ep_linear_logprob_backward_workspace_bytes(int64_t tokens, int64_t width) {
  LogprobBackward unused{};
  return carve_backward(unused, nullptr, tokens, width);
}

static int check_workspace(const char *fn, const void *workspace) {
  EP_REQUIRE(workspace != nullptr && reinterpret_cast<uintptr_t>(workspace) % 64 == 0, "%s: workspace must be 64-byte aligned", fn);
  return EP_OK;
}

static float *floats(const Tensor &t) { return reinterpret_cast<float *>(t.data); }

namespace {
// Where the weight comes in parts: the rows that the targets name, the running values of the rows between the calls, and which
// rows of how many the weight has.
struct Parts {
  const DLTensor *target_rows, *state;
  int64_t first, vocab;
};
}  // namespace

static int forward(const char *fn, const DLTensor *hidden, const DLTensor *weight, const DLTensor *targets, const DLTensor *logprob,
                   const DLTensor *lse, const DLTensor *entropy, const DLTensor *direction, double softcap, void *workspace,
                   void *stream, const Parts *parts = nullptr) {
  Inputs in;
  const int64_t first = parts == nullptr ? 0 : parts->first, vocab = parts == nullptr ? -1 : parts->vocab;
  if (int status = check_inputs(fn, in, hidden, weight, targets, lse, softcap, first, vocab)) return status;
  EP_VIEW(logprobv, logprob, 1, SINGLES);
  EP_VIEW_OPTIONAL(entropyv, entropy, 1, SINGLES);
  EP_VIEW_OPTIONAL(directionv, direction, 2, SINGLES);
  const LogprobShape &s = in.shape;
  if (int status = check_vector(fn, "logprob", logprobv, s.tokens)) return status;
  if (entropy != nullptr) {
    if (int status = check_vector(fn, "entropy", entropyv, s.tokens)) return status;
  }
  if (direction != nullptr) {
    if (int status = check_matrix(fn, "direction", directionv, "hidden", in.hidden)) return status;
  }
  if (int status = check_apart(fn, "logprob", logprobv, "targets", in.targets)) return status;
  if (int status = check_apart(fn, "lse", in.lse, "targets", in.targets)) return status;
  if (int status = check_apart(fn, "entropy", entropyv, "targets", in.targets)) return status;
  if (int status = check_apart(fn, "direction", directionv, "targets", in.targets)) return status;
  if (int status = check_one_device(fn, {&in.hidden, &logprobv, &entropyv, &directionv})) return status;
  Tensor target_rows{}, state{};
  if (parts != nullptr) {
    EP_REQUIRE(!on_gpu(in.hidden.device), "%s: a weight in parts is for CPU memory", fn);
    EP_REQUIRE((parts->target_rows == nullptr) == (direction == nullptr), "%s: target_rows and direction come together", fn);
    if (!view(state, parts->state, fn, "state", 2, F32)) return EP_INVALID_ARGUMENT;
    EP_REQUIRE(state.shape[0] == 4 && state.shape[1] == s.tokens && state.contiguous,
               "%s: state must be contiguous (4, %lld), got (%lld, %lld)", fn, (long long)s.tokens, (long long)state.shape[0],
               (long long)state.shape[1]);
    if (direction != nullptr) {
      if (!view(target_rows, parts->target_rows, fn, "target_rows", 2, FLOATS)) return EP_INVALID_ARGUMENT;
      if (int status = check_matrix(fn, "target_rows", target_rows, "hidden", in.hidden)) return status;
      EP_REQUIRE(target_rows.dtype == in.weight.dtype, "%s: target_rows must have the dtype of weight", fn);
    }
    if (int status = check_apart(fn, "state", state, "targets", in.targets)) return status;
    if (int status = check_one_device(fn, {&in.hidden, &state, &target_rows})) return status;
  }
#if defined(EP_GPU)
  if (on_gpu(in.hidden.device)) {
    if (s.tokens == 0) return EP_OK;
    if (int status = check_device_workspace(fn, workspace)) return status;
    cuda::UseDevice use(in.hidden.device.device_id);
    return cuda::linear_logprob_forward({device_problem(in), floats(logprobv), floats(in.lse), floats(entropyv), floats(directionv),
                                         directionv.stride[0], static_cast<char *>(workspace)},
                                        stream);
  }
#endif
  (void)stream;
  if (direction != nullptr && first == 0) clear_rows(s, directionv.data, directionv.stride[0] * 4, s.width * 4);
  clear_rows(s, logprobv.data, 4, 4);
  clear_rows(s, in.lse.data, 4, 4);
  if (entropy != nullptr) clear_rows(s, entropyv.data, 4, 4);
  if (s.kept == 0) return EP_OK;
  if (int status = check_workspace(fn, workspace)) return status;
  LogprobForward a{};
  a.shape = s;
  a.logprob = floats(logprobv), a.lse = floats(in.lse), a.entropy = floats(entropyv), a.direction = floats(directionv);
  a.direction_row = directionv.stride[0];
  carve_forward(a, static_cast<char *>(workspace), s.kept, s.width);
  if (parts != nullptr) {
    a.row_max = floats(state), a.row_sum = a.row_max + s.tokens, a.row_spread = a.row_sum + s.tokens;
    a.target_logit = a.row_spread + s.tokens;
    a.target_rows = target_rows.data, a.target_row = target_rows.stride[0];
  }
  list_rows(a.shape);
  EP_RUN(linear_logprob_forward, a);
  return EP_OK;
}

extern "C" int ep_linear_logprob_forward(const DLTensor *hidden, const DLTensor *weight, const DLTensor *targets,
                                         const DLTensor *logprob, const DLTensor *lse, const DLTensor *entropy,
                                         const DLTensor *direction, double softcap, void *workspace, void *stream) {
  return forward("linear_logprob_forward", hidden, weight, targets, logprob, lse, entropy, direction, softcap, workspace, stream);
}

extern "C" int ep_linear_logprob_forward_part(const DLTensor *hidden, const DLTensor *weight, const DLTensor *targets,
                                              const DLTensor *target_rows, const DLTensor *state, const DLTensor *logprob,
                                              const DLTensor *lse, const DLTensor *entropy, const DLTensor *direction,
                                              double softcap, int64_t first, int64_t vocab, void *workspace, void *stream) {
  const Parts parts{target_rows, state, first, vocab};
  return forward("linear_logprob_forward_part", hidden, weight, targets, logprob, lse, entropy, direction, softcap, workspace,
                 stream, &parts);
}

extern "C" int ep_linear_logprob_backward(const DLTensor *dlogprob, const DLTensor *dentropy, const DLTensor *hidden,
                                          const DLTensor *weight, const DLTensor *targets, const DLTensor *lse,
                                          const DLTensor *entropy, const DLTensor *dhidden, const DLTensor *dweight, double softcap,
                                          void *workspace, void *stream) {
  const char *fn = "linear_logprob_backward";
  Inputs in;
  if (int status = check_inputs(fn, in, hidden, weight, targets, lse, softcap)) return status;
  EP_VIEW(dlogprobv, dlogprob, 1, SINGLES);
  EP_VIEW_OPTIONAL(dentropyv, dentropy, 1, SINGLES);
  EP_VIEW_OPTIONAL(entropyv, entropy, 1, SINGLES);
  EP_VIEW_OPTIONAL(dhiddenv, dhidden, 2, NUMBERS);
  EP_VIEW_OPTIONAL(dweightv, dweight, 2, NUMBERS);
  const LogprobShape &s = in.shape;
  if (int status = check_vector(fn, "dlogprob", dlogprobv, s.tokens)) return status;
  EP_REQUIRE((dentropy == nullptr) == (entropy == nullptr), "%s: dentropy and entropy come together", fn);
  if (dentropy != nullptr) {
    if (int status = check_vector(fn, "dentropy", dentropyv, s.tokens)) return status;
    if (int status = check_vector(fn, "entropy", entropyv, s.tokens)) return status;
  }
  if (int status = check_apart(fn, "dhidden", dhiddenv, "targets", in.targets)) return status;
  if (int status = check_apart(fn, "dweight", dweightv, "targets", in.targets)) return status;
  if (int status = check_one_device(fn, {&in.hidden, &dlogprobv, &dentropyv, &entropyv, &dhiddenv, &dweightv})) return status;
  const bool gpu = on_gpu(in.hidden.device);
  if (dhidden != nullptr) {
    if (int status = check_matrix(fn, "dhidden", dhiddenv, "hidden", in.hidden)) return status;
    EP_REQUIRE(dhiddenv.dtype == in.hidden.dtype, "%s: dhidden must have the dtype of hidden", fn);
    const int64_t bytes = s.hidden_bf16 ? 2 : 4;
    if (!gpu) clear_rows(s, dhiddenv.data, dhiddenv.stride[0] * bytes, s.width * bytes);
  }
  if (dweight != nullptr) {
    if (int status = check_matrix(fn, "dweight", dweightv, "weight", in.weight)) return status;
    EP_REQUIRE(dweightv.dtype == in.weight.dtype, "%s: dweight must have the dtype of weight", fn);
    const int64_t bytes = s.weight_bf16 ? 2 : 4;
    for (int64_t v = 0; v < s.vocab && s.kept == 0 && !gpu; v++) {
      std::memset(dweightv.data + v * dweightv.stride[0] * bytes, 0, size_t(s.width * bytes));
    }
  }
  if (dhidden == nullptr && dweight == nullptr) return EP_OK;
#if defined(EP_GPU)
  if (gpu) {
    if (int status = check_device_workspace(fn, workspace)) return status;
    cuda::UseDevice use(in.hidden.device.device_id);
    return cuda::linear_logprob_backward(
        {device_problem(in), floats(dlogprobv), floats(dentropyv), floats(in.lse), floats(entropyv), dhiddenv.data, dweightv.data,
         dhiddenv.stride[0], dweightv.stride[0], static_cast<char *>(workspace)},
        stream);
  }
#endif
  (void)stream;
  if (s.kept == 0) return EP_OK;
  if (int status = check_workspace(fn, workspace)) return status;
  LogprobBackward a{};
  a.shape = s;
  a.dlogprob = floats(dlogprobv), a.dentropy = floats(dentropyv), a.lse = floats(in.lse), a.entropy = floats(entropyv);
  a.dhidden = dhiddenv.data, a.dweight = dweightv.data;
  a.dhidden_row = dhiddenv.stride[0], a.dweight_row = dweightv.stride[0];
  carve_backward(a, static_cast<char *>(workspace), s.kept, s.width);
  list_rows(a.shape);
  EP_RUN(linear_logprob_backward, a);
  return EP_OK;
}

#endif
