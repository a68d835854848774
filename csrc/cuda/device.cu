// See device.h. What a device is does not change, so it is asked for once.
#include "device.h"

#include <cstdlib>
#include <cstring>
#include <mutex>

#include "launch.cuh"

namespace ep {
namespace cuda {

// The kernels for sm_90a have not been on a GPU yet: they run where they are asked for.
static bool wgmma_wanted() {
  const char *value = std::getenv("ENGINEPOST_WGMMA");
  return value != nullptr && std::strcmp(value, "1") == 0;
}

#if defined(EP_EMULATED)

int current_device(Device &device) {
  const int architecture = emulator::card_architecture();
  device = {architecture, emulator::card_multiprocessors(),    block_shared(architecture), block_shared(architecture) + 1024,
            architecture, architecture == 90 && wgmma_wanted()};
  return EP_OK;
}
UseDevice::UseDevice(int) { (void)before_; }
UseDevice::~UseDevice() {}

#else

static __global__ void probe() {}  // compiled for the same architectures as every other kernel

// Has shared memory where it was compiled for sm_90a: plain sm_90 has no wgmma, and ptxVersion is 90 for both.
static __global__ void probe_90a() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ volatile unsigned char mark[64];
  mark[threadIdx.x % 64] = 1;
#endif
}

int current_device(Device &device) {
  static std::mutex lock;
  static Device known[64] = {};
  int id = 0;
  if (cudaGetDevice(&id) != cudaSuccess || id < 0 || id >= 64) return fail(EP_DEVICE_ERROR, "no CUDA device is at hand");
  std::lock_guard<std::mutex> turn(lock);
  if (known[id].architecture == 0) {
    int major = 0, minor = 0, processors = 0, of_block = 0, of_processor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, id);
    cudaDeviceGetAttribute(&of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
    cudaDeviceGetAttribute(&of_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, id);
    cudaFuncAttributes code = {};
    if (major >= 8 && cudaFuncGetAttributes(&code, probe) != cudaSuccess) {
      cudaGetLastError();
      return fail(EP_UNSUPPORTED,
                  "this build has no CUDA kernels for compute capability %d.%d; build with CMAKE_CUDA_ARCHITECTURES=%d%d", major,
                  minor, major, minor);
    }
    cudaFuncAttributes code_90a = {};
    const bool wgmma = major == 9 && cudaFuncGetAttributes(&code_90a, probe_90a) == cudaSuccess && code_90a.sharedSizeBytes >= 64;
    known[id] = {10 * major + minor, processors, of_block, of_processor, code.ptxVersion, wgmma};
  }
  device = known[id];
  device.wgmma = device.wgmma && wgmma_wanted();
  if (device.architecture < 80) {
    return fail(EP_UNSUPPORTED, "the CUDA kernels need compute capability 8.0, this card has %d.%d", device.architecture / 10,
                device.architecture % 10);
  }
  return EP_OK;
}

UseDevice::UseDevice(int id) {
  int now = 0;
  if (cudaGetDevice(&now) == cudaSuccess && now != id && cudaSetDevice(id) == cudaSuccess) before_ = now;
}
UseDevice::~UseDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}

#endif

}  // namespace cuda
}  // namespace ep
