// The numbers that tensors of the GPU hold: float, bf16 and fp16. The 16-bit ones are bits here; ptx.cuh converts them.
#pragma once

#include <cstdint>

namespace ep {
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
}  // namespace ep
