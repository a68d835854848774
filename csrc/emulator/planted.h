// Small kernels that test the emulator: one that is right, and the same with one thing wrong.
#pragma once

#include <cstdint>

namespace ep {
namespace emulator {

// c (m, n) float32 = a (m, k) b (n, k)^T, all multiples of 64 (k: 32); a, b 16-bit. `fault` names what is left out or wrong; "" =
// nothing.
int planted_matmul(const char *fault, const uint16_t *a, const uint16_t *b, float *c, int64_t m, int64_t n, int64_t k, bool fp16);
// y[2 i], y[2 i + 1] = sum of block i of x (128 each): warp shuffles, a vote, shared memory, a named barrier.
int planted_sum(const char *fault, const float *x, float *y, int64_t blocks);

// The same product through TMA and wgmma: m of 64, n of 128, k of 64; kind "shared", "across" (a is (k, m), b is (k, n)) or
// "registers" (a through ldmatrix). And y = 2 x, (rows, columns) of bfloat16, through TMA both ways.
int planted_wgmma(const char *fault, const char *kind, const uint16_t *a, const uint16_t *b, float *c, int64_t m, int64_t n,
                  int64_t k, bool fp16);
int planted_twice(const char *fault, const uint16_t *x, uint16_t *y, int64_t rows, int64_t columns);

// wide[i] = the number of bits[i], or bits[i] = wide[i] rounded: the conversions of ptx.cuh.
int planted_convert(uint16_t *bits, float *wide, int64_t count, bool fp16, bool narrow);

}  // namespace emulator
}  // namespace ep
