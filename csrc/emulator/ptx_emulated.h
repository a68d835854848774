// The second body of every instruction of csrc/cuda/ptx.cuh. Included by it alone; the comments are there.
#pragma once

#include <type_traits>

#include "../cuda/element.cuh"
#include "device.h"

namespace ep {

template <class T>
inline T *shared_memory() {
  return reinterpret_cast<T *>(emulator::block.shared);
}

namespace ptx {

// ---- numbers ----------------------------------------------------------------------------------------------------------------

inline uint16_t bf16_bits(float f) {
  const uint32_t v = __float_as_uint(f);
  if (f != f) return uint16_t(0x7fff);
  return uint16_t((v + 0x7fff + (v >> 16 & 1)) >> 16);
}
inline float bf16_value(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

inline uint16_t fp16_bits(float f) {
  const uint32_t v = __float_as_uint(f), sign = v >> 16 & 0x8000;
  if (f != f) return 0x7fff;
  const float size = std::fabs(f);
  if (size >= 65520.f) return uint16_t(sign | 0x7c00);
  if (size < 6.103515625e-05f) {  // below the normal numbers: multiples of 2^-24
    return uint16_t(sign | uint32_t(std::nearbyint(size * 16777216.f)));
  }
  const uint32_t u = __float_as_uint(size), even = u >> 13 & 1;
  return uint16_t(sign | ((u + 0xfff + even - (112u << 23)) >> 13));
}
inline float fp16_value(uint16_t bits) {
  const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
  float size;
  if (exponent == 31) {
    size = fraction != 0 ? NAN : INFINITY;
  } else {
    size = exponent == 0 ? float(fraction) * 5.9604644775390625e-08f : __uint_as_float((exponent + 112) << 23 | fraction << 13);
  }
  return bits & 0x8000 ? -size : size;
}

inline uint32_t pack_bf16(float low, float high) { return uint32_t(bf16_bits(low)) | uint32_t(bf16_bits(high)) << 16; }
inline uint32_t pack_fp16(float low, float high) { return uint32_t(fp16_bits(low)) | uint32_t(fp16_bits(high)) << 16; }

inline float exp2(float x) { return std::exp2(x); }
inline float log2(float x) { return std::log2(x); }
inline float reciprocal(float x) { return 1.f / x; }
inline float reciprocal_sqrt(float x) { return 1.f / std::sqrt(x); }
inline float tanh(float x) { return std::tanh(x); }

inline int opaque(int x) { return x; }

// ---- shared memory and warp products ----------------------------------------------------------------------------------------

inline uint32_t shared_address(const void *pointer) { return emulator::shared_address(pointer); }

struct LdMatrix {
  uint32_t row;
  uint32_t r[4];
};
template <int COUNT, bool TRANSPOSED>
inline void run_ldmatrix(void **arguments, uint32_t) {
  const char *rows[32];
  for (int i = 0; i < 8 * COUNT; i++) {
    rows[i] = emulator::shared_at(static_cast<LdMatrix *>(arguments[i])->row, 16, 16, "ldmatrix");
  }
  for (int m = 0; m < COUNT; m++) {
    int pass[8] = {}, most = 0;  // eight groups of banks, 16 bytes each
    for (int i = 0; i < 8; i++) {
      const uint32_t row = static_cast<LdMatrix *>(arguments[8 * m + i])->row;
      bool seen = false;
      for (int j = 0; j < i; j++) seen = seen || static_cast<LdMatrix *>(arguments[8 * m + j])->row == row;
      if (!seen) most = std::max(most, ++pass[row / 16 % 8]);
    }
    emulator::statistics.ldmatrix++, emulator::statistics.ldmatrix_conflicts += most - 1;
    for (int lane = 0; lane < 32; lane++) {
      uint16_t pair[2];
      for (int e = 0; e < 2; e++) {
        const int row = TRANSPOSED ? 2 * (lane % 4) + e : lane / 4, column = TRANSPOSED ? lane / 4 : 2 * (lane % 4) + e;
        std::memcpy(&pair[e], rows[8 * m + row] + 2 * column, 2);
      }
      static_cast<LdMatrix *>(arguments[lane])->r[m] = uint32_t(pair[0]) | uint32_t(pair[1]) << 16;
    }
  }
}
template <int COUNT, bool TRANSPOSED>
inline void ldmatrix(uint32_t (&r)[COUNT], uint32_t row) {
  LdMatrix a{row, {}};
  emulator::together(TRANSPOSED ? "ldmatrix.trans" : "ldmatrix", 0xffffffffu, &a, &run_ldmatrix<COUNT, TRANSPOSED>);
  for (int i = 0; i < COUNT; i++) r[i] = a.r[i];
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) { ldmatrix<4, false>(r, row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) { ldmatrix<4, true>(r, row); }
inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t row) { ldmatrix<2, false>(r, row); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row) { ldmatrix<2, true>(r, row); }

struct Mma {
  float *d;
  uint32_t a[4], b[2];
};
template <class T>
inline float value_of(uint16_t bits) {
  return std::is_same<T, bf16>::value ? bf16_value(bits) : fp16_value(bits);
}
template <class T>
inline void run_mma(void **arguments, uint32_t lanes) {
  if (lanes != 0xffffffffu) emulator::stop("mma needs all 32 lanes");
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const Mma &m = *static_cast<Mma *>(arguments[lane]);
    const int g = lane / 4, t = 2 * (lane % 4);
    for (int r = 0; r < 4; r++) {
      for (int e = 0; e < 2; e++) {
        a[g + 8 * (r % 2)][t + e + 8 * (r / 2)] = value_of<T>(uint16_t(m.a[r] >> (16 * e)));
        if (r < 2) b[t + e + 8 * r][g] = value_of<T>(uint16_t(m.b[r] >> (16 * e)));
        if (r < 2) d[g + 8 * r][t + e] = m.d[2 * r + e];
      }
    }
  }
  for (int i = 0; i < 16; i++) {
    for (int k = 0; k < 16; k++) {
      for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int lane = 0; lane < 32; lane++) {
    const Mma &m = *static_cast<Mma *>(arguments[lane]);
    for (int r = 0; r < 4; r++) m.d[r] = d[lane / 4 + 8 * (r / 2)][2 * (lane % 4) + r % 2];
  }
  emulator::statistics.mma++;
}
template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Mma m{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulator::together("mma", 0xffffffffu, &m, &run_mma<T>);
}

// ---- copies -----------------------------------------------------------------------------------------------------------------

inline void cp_async_16(uint32_t to, const void *from, bool valid) { emulator::cp_async(to, from, 16, valid ? 16 : 0); }
inline void cp_async_16_first(uint32_t to, const void *from, int bytes) { emulator::cp_async(to, from, 16, size_t(bytes)); }
inline void cp_async_4(uint32_t to, const void *from, bool valid) { emulator::cp_async(to, from, 4, valid ? 4 : 0); }
inline void cp_async_commit() { emulator::cp_async_commit(); }
template <int LEFT>
inline void cp_async_wait() {
  emulator::cp_async_wait(LEFT);
}

template <class V>
inline void check_aligned(const void *p, const char *instruction) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V) != 0)
    emulator::stop("%s: %p is not a multiple of %d", instruction, p, int(sizeof(V)));
}
inline uint4 load_once(const uint4 *p) {
  check_aligned<uint4>(p, "ld.global");
  return *p;
}
inline void store_once(uint4 *p, uint4 v) {
  check_aligned<uint4>(p, "st.global");
  *p = v;
}
inline void red_add(float *p, float v) { *p += v; }
constexpr int RED_WIDTH = 1;
inline void red_add_x4(float *p, const float (&v)[4]) {
  for (int i = 0; i < 4; i++) p[i] += v[i];
}
inline int load_acquire(const int *p) {
  emulator::wait_for_blocks();
  return *p;
}
inline void add_release(int *p, int v) { *p += v; }

// ---- barriers ---------------------------------------------------------------------------------------------------------------

inline void named_barrier_sync(int id, int threads) { emulator::barrier(id, threads, true); }
inline void named_barrier_arrive(int id, int threads) { emulator::barrier(id, threads, false); }

}  // namespace ptx
}  // namespace ep
