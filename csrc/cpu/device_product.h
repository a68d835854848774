// Checked tensors as the GPU's matrix products take them (csrc/cuda/matmul.h). Used by the extern "C" functions of several
// families.
#pragma once

#include "dispatch.h"
#include "tensor.h"

#if defined(EP_GPU)
#include "../cuda/matmul.h"

namespace ep {

static inline gemm::Kind kind_of(unsigned dtype) {
  return dtype == F32 ? gemm::Kind::f32 : dtype == BF16 ? gemm::Kind::bf16 : gemm::Kind::f16;
}
static inline gemm::Operand operand_of(const Tensor &t) { return {t.data, t.stride[0], t.stride[1], kind_of(t.dtype)}; }

// c = a[0] b[0] + a[1] b[1]; tensors that were not given are empty.
static inline gemm::Product device_product(const Tensor *a, const Tensor *b, const Tensor &c, int accumulate) {
  gemm::Product p;
  for (int i = 0; i < 2; i++) {
    if (!a[i] || !b[i]) continue;
    p.a[i] = operand_of(a[i]), p.b[i] = operand_of(b[i]), p.depth[i] = a[i].shape[1];
  }
  p.m = c.shape[0], p.n = c.shape[1], p.c = c.data, p.c_row = c.stride[0], p.c_kind = kind_of(c.dtype);
  p.accumulate = accumulate != 0;
  return p;
}

static inline int64_t device_product_bytes(const gemm::Product &p, const DLDevice &on) {
  cuda::UseDevice use(on.device_id);
  cuda::Device device;
  return cuda::current_device(device) == EP_OK ? gemm::workspace_bytes(p, device.multiprocessors) : 0;
}

static inline int check_device_product(const char *fn, const gemm::Product &p) {
  constexpr int64_t MOST = (int64_t(1) << 31) - 256;
  EP_REQUIRE(p.m <= MOST && p.n <= MOST && p.depth[0] <= MOST && p.depth[1] <= MOST, "%s: a dimension has more than 2^31 elements",
             fn);
  return EP_OK;
}

static inline int run_device_product(const char *fn, const gemm::Product &p, const DLDevice &on, void *workspace, void *stream) {
  if (int status = check_device_product(fn, p)) return status;
  cuda::UseDevice use(on.device_id);
  cuda::Device device;
  if (int status = cuda::current_device(device)) return status;
  EP_REQUIRE(gemm::workspace_bytes(p, device.multiprocessors) == 0 ||
                 (workspace != nullptr && reinterpret_cast<uintptr_t>(workspace) % 16 == 0),
             "%s: workspace must be 16-byte aligned", fn);
  return gemm::run(p, device.multiprocessors, workspace, stream);
}

}  // namespace ep
#endif
