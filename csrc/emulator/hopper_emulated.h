// The second body of every function of csrc/cuda/hopper.cuh. Included by it alone; the comments are there.
#pragma once

#include <type_traits>

#include "hopper.h"

namespace ep {

using TensorMap = emulator::TensorMap;

namespace ptx {

inline void mbarrier_init(uint32_t mbarrier, int count) { emulator::mbarrier_init(mbarrier, count); }
inline void fence_mbarrier_init() { emulator::fence_mbarrier_init(); }
inline void mbarrier_arrive(uint32_t mbarrier) { emulator::mbarrier_arrive(mbarrier, 0); }
inline void mbarrier_arrive_expect(uint32_t mbarrier, int bytes) { emulator::mbarrier_arrive(mbarrier, bytes); }
inline void mbarrier_wait(uint32_t mbarrier, int parity) { emulator::mbarrier_wait(mbarrier, uint32_t(parity)); }
inline void fence_async() { emulator::fence_async(); }
inline bool elected() { return emulator::elected(); }

inline void tma_prefetch(const TensorMap &) {}
template <class... At>
inline void tma_load(uint32_t to, const TensorMap &map, uint32_t mbarrier, At... at) {
  const int coordinates[] = {at...};
  emulator::tma_load(to, map, mbarrier, int(sizeof...(at)), coordinates);
}
template <class... At>
inline void tma_store(const TensorMap &map, uint32_t from, At... at) {
  const int coordinates[] = {at...};
  emulator::tma_store(map, from, int(sizeof...(at)), coordinates);
}
inline void bulk_commit() { emulator::bulk_commit(); }
template <int LEFT>
inline void bulk_wait() {
  emulator::bulk_wait(LEFT);
}

template <int COUNT>
inline void fewer_registers() {
  emulator::set_max_registers(COUNT, false);
}
template <int COUNT>
inline void more_registers() {
  emulator::set_max_registers(COUNT, true);
}

inline void wgmma_fence() { emulator::wgmma_fence(); }
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int LEFT, class... Sums>
inline void wgmma_wait(Sums &...) {
  emulator::wgmma_wait(LEFT);
}
template <class... Sums>
inline void wgmma_hold(Sums &...) {}

template <class T, bool A_ACROSS, bool B_ACROSS, int BLOCKS>
inline void wgmma(float (&d)[BLOCKS][4], uint64_t a, uint64_t b, bool accumulate) {
  emulator::Wgmma w{&d[0][0], nullptr, a, b, 8 * BLOCKS, A_ACROSS, B_ACROSS, std::is_same<T, fp16>::value, accumulate};
  emulator::wgmma(w);
}
template <class T, bool B_ACROSS, int BLOCKS>
inline void wgmma(float (&d)[BLOCKS][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  emulator::Wgmma w{&d[0][0], a, 0, b, 8 * BLOCKS, false, B_ACROSS, std::is_same<T, fp16>::value, accumulate};
  emulator::wgmma(w);
}

}  // namespace ptx
}  // namespace ep
