// The one way to start a kernel. No <<<>>> elsewhere: the emulator has another launch.
#pragma once

#include <cstddef>

#include "enginepost/core.h"
#include "ptx.cuh"
#include "tensor.h"

namespace ep {

#if defined(EP_EMULATED)

// kernel(args...) on grid x block threads with `shared_bytes` of dynamic shared memory, on `stream`. An ep status.
template <class... P, class... A>
inline int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void *stream, A &&...args) {
  (void)stream;
  auto call = [&] { kernel(static_cast<P>(args)...); };
  return emulator::run(grid, block, shared_bytes, [](void *context) { (*static_cast<decltype(call) *>(context))(); }, &call);
}

#else

template <class... P, class... A>
inline int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void *stream, A &&...args) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) {  // more than every card has must be asked for
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  }
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    error = cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
  }
  if (error == cudaSuccess) return EP_OK;
  cudaGetLastError();  // else the next call, of whoever, would be told of it
  return fail(EP_DEVICE_ERROR,
              "CUDA could not start a kernel of %u x %u x %u blocks of %u threads with %lld bytes of shared memory: %s", grid.x,
              grid.y, grid.z, block.x * block.y * block.z, (long long)shared_bytes, cudaGetErrorString(error));
}

#endif

template <class A, class B>
constexpr int64_t ceil_div(A a, B b) {
  return (int64_t(a) + int64_t(b) - 1) / int64_t(b);
}

}  // namespace ep
