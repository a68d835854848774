// The kernels from a plain C++ program: no Python, no torch. Packed attention over two sequences, checked against a naive loop.
#include <enginepost/attention.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr int64_t T = 60, H = 4, HK = 2, D = 32;

// A row-major tensor that owns its numbers, and the DLTensor that describes them.
template <class Number>
struct Array {
  std::vector<int64_t> shape;
  std::vector<Number> data;
  DLTensor tensor{};

  Array(std::vector<int64_t> s, DLDataType type) : shape(std::move(s)) {
    size_t size = 1;
    for (int64_t n : shape) size *= size_t(n);
    data.resize(size);
    tensor.data = data.data();
    tensor.device = {kDLCPU, 0};
    tensor.ndim = int32_t(shape.size());
    tensor.dtype = type;
    tensor.shape = shape.data();  // strides stay NULL: contiguous
  }
};

constexpr DLDataType FLOAT32{kDLFloat, 32, 1}, INT32{kDLInt, 32, 1};

// The largest difference from softmax(q k^T / sqrt(D)) v, computed in double, query by query.
double worst_error(const Array<float> &q, const Array<float> &k, const Array<float> &v, const Array<int32_t> &starts,
                   const Array<float> &out) {
  double worst = 0;
  for (size_t b = 0; b + 1 < starts.data.size(); b++) {
    for (int64_t i = starts.data[b]; i < starts.data[b + 1]; i++) {
      for (int64_t h = 0; h < H; h++) {
        const int64_t kv = h / (H / HK);
        double total = 0, sum[D] = {};
        for (int64_t j = starts.data[b]; j <= i; j++) {
          double score = 0;
          for (int64_t d = 0; d < D; d++) score += double(q.data[(i * H + h) * D + d]) * k.data[(j * HK + kv) * D + d];
          const double weight = std::exp(score / std::sqrt(double(D)));
          total += weight;
          for (int64_t d = 0; d < D; d++) sum[d] += weight * v.data[(j * HK + kv) * D + d];
        }
        for (int64_t d = 0; d < D; d++) worst = std::fmax(worst, std::fabs(sum[d] / total - out.data[(i * H + h) * D + d]));
      }
    }
  }
  return worst;
}

}  // namespace

int main() {
  Array<float> q({T, H, D}, FLOAT32), k({T, HK, D}, FLOAT32), v({T, HK, D}, FLOAT32), out({T, H, D}, FLOAT32), lse({H, T}, FLOAT32);
  Array<int32_t> starts({3}, INT32);
  starts.data = {0, 25, T};
  starts.tensor.data = starts.data.data();
  unsigned state = 1;
  for (Array<float> *x : {&q, &k, &v}) {
    for (float &f : x->data) f = float((state = state * 1664525u + 1013904223u) >> 8) / float(1 << 23) - 1;
  }

  ep_attention_params params{};
  params.causal = 1;
  params.scale = 1 / std::sqrt(double(D));
  const int64_t bytes = (ep_attention_forward_workspace_bytes(2, D) + 63) / 64 * 64;
  void *workspace = std::aligned_alloc(64, size_t(bytes));
  const int status = ep_attention_forward(&q.tensor, &k.tensor, &v.tensor, &starts.tensor, nullptr, nullptr, &out.tensor, &lse.tensor,
                                          params, workspace, nullptr);
  std::free(workspace);
  if (status != EP_OK) {
    std::fprintf(stderr, "%s\n", ep_last_error());
    return 1;
  }
  const double error = worst_error(q, k, v, starts, out);
  std::printf("attention on %s: %lld tokens, largest error %.1e\n", ep_cpu_isa(), (long long)T, error);

  // A mistake ends in a status and a message that names the argument.
  if (ep_attention_forward(&q.tensor, nullptr, &v.tensor, &starts.tensor, nullptr, nullptr, &out.tensor, &lse.tensor, params, nullptr,
                           nullptr) != EP_INVALID_ARGUMENT) {
    return 1;
  }
  std::printf("without k: %s\n", ep_last_error());
  return error < 1e-5 ? 0 : 1;
}
