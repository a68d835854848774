// The card that a call runs on: what the choice of tiles depends on.
#pragma once

namespace ep {
namespace cuda {

struct Device {
  int architecture;     // 10 major + minor: 80, 86, 89, 90, 100, 120
  int multiprocessors;  // of the card
  int block_shared;     // bytes of shared memory that one block may have
  int shared;           // bytes of shared memory of a multiprocessor
  int compiled;  // the architecture that the code which runs on it was compiled for: kernels with tiles by architecture go by it
  bool wgmma;    // kernels for sm_90a are at hand, and ENGINEPOST_WGMMA=1 asks for them
};

// The current device; an ep status.
int current_device(Device &device);

// Makes `id` the current device for as long as this lives.
class UseDevice {
 public:
  explicit UseDevice(int id);
  ~UseDevice();

 private:
  int before_ = -1;
};

// Shared memory of an architecture (CUDA programming guide, "Technical Specifications per Compute Capability").
constexpr int block_shared(int architecture) {
  return architecture == 80 || architecture == 87                           ? 166912
         : architecture == 90 || architecture == 100 || architecture == 103 ? 232448
                                                                            : 101376;
}

}  // namespace cuda
}  // namespace ep
