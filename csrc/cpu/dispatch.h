// Which kernel a call runs: where its tensors are. Used by the extern "C" functions, after their checks.
//
//   EP_CUDA_KERNEL(norm_forward, NormForward)            says that csrc/cuda has ep::cuda::norm_forward(args, stream)
//   EP_DISPATCH(norm_forward, args, stream, fn, &xv, &wv)  runs it or the CPU's and returns from the C function
//
// With EP_EMULATED (the tests' build) there is nothing but csrc/cuda: tensors in CPU memory go to the emulated CUDA kernels.
#pragma once

#include "isa.h"
#include "tensor.h"
#if defined(EP_CUDA) || defined(EP_EMULATED)
#define EP_GPU  // there are CUDA kernels, real or emulated
#include "../cuda/device.h"
#endif

#define EP_CUDA_KERNEL(name, Args)      \
  namespace ep {                        \
  namespace cuda {                      \
  int name(const Args &, void *stream); \
  }                                     \
  }

namespace ep {
inline bool on_gpu(const DLDevice &device) {
#if defined(EP_EMULATED)
  return device.device_type == kDLCPU;
#elif defined(EP_CUDA)
  return device.device_type == kDLCUDA;
#else
  (void)device;
  return false;
#endif
}
}  // namespace ep

#if defined(EP_EMULATED)
#define EP_DISPATCH(name, args, stream, fn, ...)                               \
  do {                                                                         \
    if (int status_ = ep::check_one_device(fn, {__VA_ARGS__})) return status_; \
    return ep::cuda::name(args, stream);                                       \
  } while (0)
#elif defined(EP_CUDA)
#define EP_DISPATCH(name, args, stream, fn, ...)                               \
  do {                                                                         \
    const ep::Tensor *tensors_[] = {__VA_ARGS__};                              \
    if (int status_ = ep::check_one_device(fn, {__VA_ARGS__})) return status_; \
    if (ep::on_gpu(tensors_[0]->device)) {                                     \
      ep::cuda::UseDevice device_(tensors_[0]->device.device_id);              \
      return ep::cuda::name(args, stream);                                     \
    }                                                                          \
    EP_RUN(name, args);                                                        \
    return EP_OK;                                                              \
  } while (0)
#else
#define EP_DISPATCH(name, args, stream, fn, ...) \
  do {                                           \
    (void)(stream);                              \
    EP_RUN(name, args);                          \
    return EP_OK;                                \
  } while (0)
#endif
