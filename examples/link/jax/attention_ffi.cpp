// Two XLA custom calls, the forward and the backward pass of packed attention. attention.py registers them with JAX.
#include <enginepost/attention.h>

#include <cstdlib>
#include <memory>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

struct Free {
  void operator()(void *p) const { std::free(p); }
};

std::unique_ptr<void, Free> workspace(int64_t bytes) {
  return std::unique_ptr<void, Free>(std::aligned_alloc(64, size_t(bytes + 63) / 64 * 64));
}

// An XLA buffer as a DLTensor: row-major, so strides stay NULL.
struct View {
  std::vector<int64_t> shape;
  DLTensor tensor{};

  explicit View(const ffi::AnyBuffer &b) : shape(b.dimensions().begin(), b.dimensions().end()) {
    tensor.data = b.untyped_data();
    tensor.device = {kDLCPU, 0};
    tensor.ndim = int32_t(shape.size());
    tensor.shape = shape.data();
    switch (b.element_type()) {
      case ffi::DataType::F32: tensor.dtype = {kDLFloat, 32, 1}; break;
      case ffi::DataType::BF16: tensor.dtype = {kDLBfloat, 16, 1}; break;
      case ffi::DataType::S32: tensor.dtype = {kDLInt, 32, 1}; break;
      default: tensor.dtype = {kDLFloat, 64, 1};  // which the kernels refuse by name
    }
  }
  const DLTensor *operator&() const { return &tensor; }
  int64_t dim(size_t i) const { return i < shape.size() ? shape[i] : 0; }
};

ffi::Error result(int status) {
  if (status == EP_OK) return ffi::Error::Success();
  return ffi::Error(status == EP_INVALID_ARGUMENT ? ffi::ErrorCode::kInvalidArgument : ffi::ErrorCode::kInternal, ep_last_error());
}

ep_attention_params params(bool causal, int64_t window, double softcap, double scale) {
  return {causal ? 1 : 0, window, softcap, scale};
}

ffi::Error forward(ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer cu_seqlens, ffi::Result<ffi::AnyBuffer> out,
                   ffi::Result<ffi::AnyBuffer> lse, bool causal, int64_t window, double softcap, double scale) {
  View qv(q), kv(k), vv(v), starts(cu_seqlens), outv(*out), lsev(*lse);
  auto memory = workspace(ep_attention_forward_workspace_bytes(starts.dim(0), qv.dim(2)));
  return result(ep_attention_forward(&qv, &kv, &vv, &starts, nullptr, nullptr, &outv, &lsev, params(causal, window, softcap, scale),
                                     memory.get(), nullptr));
}

ffi::Error backward(ffi::AnyBuffer dout, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer out, ffi::AnyBuffer lse,
                    ffi::AnyBuffer cu_seqlens, ffi::Result<ffi::AnyBuffer> dq, ffi::Result<ffi::AnyBuffer> dk,
                    ffi::Result<ffi::AnyBuffer> dv, bool causal, int64_t window, double softcap, double scale) {
  View doutv(dout), qv(q), kv(k), vv(v), outv(out), lsev(lse), starts(cu_seqlens), dqv(*dq), dkv(*dk), dvv(*dv);
  auto memory = workspace(ep_attention_backward_workspace_bytes(starts.dim(0), qv.dim(0), qv.dim(1), kv.dim(1), qv.dim(2)));
  return result(ep_attention_backward(&doutv, &qv, &kv, &vv, &outv, &lsev, &starts, nullptr, nullptr, &dqv, &dkv, &dvv,
                                      params(causal, window, softcap, scale), memory.get(), nullptr));
}

}  // namespace

#define OPTIONS Attr<bool>("causal").Attr<int64_t>("window").Attr<double>("softcap").Attr<double>("scale")

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_forward, forward,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .OPTIONS);

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_backward, backward,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .OPTIONS);
