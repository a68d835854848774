// What sm_90a adds, for the host: mbarriers, the tensor memory accelerator (TMA), wgmma. The second body of csrc/cuda/hopper.cuh
// (hopper_emulated.h) calls these; emulator.cpp calls the functions at the end.
//
// Everything asynchronous happens at the worst of the moments that the PTX ISA allows:
//   a TMA load    fills its destination with NaN at once; the data arrives when a thread waits on its mbarrier
//   a TMA store   reads shared memory when its thread waits for the group
//   a wgmma       reads its operands when its warp waits for the group (schedule forward), at once (reverse), or at a random one of
//                 the two (shuffled); accumulators are NaN from its issue to the wait, and must not be touched
// The warps of a warpgroup do not wait for each other: each computes its own 16 rows, and all four must have issued the same.
//
// TMA and wgmma see shared memory through the async proxy: a second copy, which TMA loads write into too, and which
// fence.proxy.async brings up to date. What a kernel writes itself and does not fence, they do not see.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "emulator.h"

namespace ep {
namespace emulator {

// ---- mbarriers --------------------------------------------------------------------------------------------------------------

void mbarrier_init(uint32_t address, int count);
// One arrival, after the phase has been told to expect `bytes` more.
void mbarrier_arrive(uint32_t address, int64_t bytes);
// Until the phase of this parity has completed: the running one has the other parity.
void mbarrier_wait(uint32_t address, uint32_t parity);
void fence_mbarrier_init();
void fence_async();

// ---- TMA --------------------------------------------------------------------------------------------------------------------

constexpr int MAX_RANK = 5;
struct TensorMap {
  const char *base;
  int rank, item;
  uint64_t extent[MAX_RANK], stride[MAX_RANK];  // bytes; stride[0] = item
  uint32_t box[MAX_RANK];
  bool swizzled;  // 128 bytes
};
// The rules of cuTensorMapEncodeTiled; null, or what is wrong.
const char *encode_tensor_map(TensorMap &map, const void *base, int item, int rank, const uint64_t *extent, const uint64_t *stride,
                              const uint32_t *box, bool swizzled);
void tma_load(uint32_t to, const TensorMap &map, uint32_t mbarrier, int rank, const int *at);
void tma_store(const TensorMap &map, uint32_t from, int rank, const int *at);
void bulk_commit();
void bulk_wait(int groups_left);

// ---- wgmma ------------------------------------------------------------------------------------------------------------------

struct Wgmma {
  float *d;           // [N / 8][4]
  const uint32_t *a;  // 4 registers, or null
  uint64_t a_matrix, b_matrix;
  int n;
  bool a_transposed, b_transposed, fp16, accumulate;
};
void wgmma(Wgmma &mine);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups_left);

// setmaxnreg: registers of each thread of the warp from here on.
void set_max_registers(int count, bool up);
// elect.sync: true in one lane of the warp.
bool elected();

// ---- what emulator.cpp calls ------------------------------------------------------------------------------------------------

void hopper_block_begins();
void hopper_thread_returns();
std::string hopper_waits();  // who waits at which mbarrier, for a deadlock's message

}  // namespace emulator
}  // namespace ep
