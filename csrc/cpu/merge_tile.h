// Tiles of the merging kernels: every function goes through its inputs in tiles of 256 floats that stay in the first-level cache;
// loops over a tile have no branches, so the compiler turns them into vector code for each instruction set. Sums are double over
// eight lanes in a fixed order, and nothing contracts a*b + c, so results are the same bits everywhere.
#pragma once

#include <cstring>

#include "merge.h"
#include "parallel.h"
#include "simd.h"
#include "tensor.h"

#ifndef EP_API

namespace ep {
namespace EP_ISA {

// Elements [at, at + n) as floats; the rest of the tile becomes 0.
static inline void load_tile(const Piece &p, int64_t at, int n, float *out) {
  if (p.dtype == BF16) {
    const bf16 *x = reinterpret_cast<const bf16 *>(p.data) + at;
    each(n, [&](int64_t j, int m) { put(out + j, get(x + j, m), m); });
  } else {
    const float *x = reinterpret_cast<const float *>(p.data) + at;
    each(n, [&](int64_t j, int m) { put(out + j, get(x + j, m), m); });
  }
  for (int j = n; j < TILE; j++) out[j] = 0.f;
}

static inline void store_tile(char *out, unsigned dtype, int64_t at, int n, const float *x) {
  if (dtype == BF16) {
    bf16 *y = reinterpret_cast<bf16 *>(out) + at;
    each(n, [&](int64_t j, int m) { put(y + j, get(x + j, m), m); });
  } else {
    std::memcpy(reinterpret_cast<float *>(out) + at, x, size_t(n) * 4);
  }
}

static inline void load_delta(const Piece &x, const Piece &base, int64_t at, int n, float *d) {
  load_tile(x, at, n, d);
  if (base.data == nullptr) return;
  float b[TILE];
  load_tile(base, at, n, b);
  for (int j = 0; j < TILE; j++) d[j] -= b[j];
}

// NOTES: bits change their type one element at a time: that becomes vector code, and a memcpy of a tile does not.
static inline int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
static inline float float_of(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

static inline void magnitude_bits(const float *d, int32_t *bits) {
  for (int j = 0; j < TILE; j++) bits[j] = bits_of(d[j]) & 0x7fffffff;
}

// 32 masks (-1 or 0) to 32 bits, the first to the lowest.
static inline uint32_t pack(const int32_t *mask) {
#if defined(__AVX2__)
  uint32_t word = 0;
  for (int j = 0; j < 32; j += 8)
    word |= uint32_t(_mm256_movemask_ps(_mm256_loadu_ps(reinterpret_cast<const float *>(mask + j)))) << j;
  return word;
#else
  uint32_t word = 0;
  for (int j = 0; j < 32; j++) word |= uint32_t(mask[j] & 1) << j;
  return word;
#endif
}

static inline uint64_t block_key(uint64_t key, uint64_t block) {
  uint64_t z = key + (block + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}
static inline uint32_t mix(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x7FEB352Du;
  h = (h ^ (h >> 15)) * 0x846CA68Bu;
  return h ^ (h >> 16);
}

// Draws of elements first .. first + n.
static inline void random_tile(uint64_t key, int64_t first, int n, uint32_t *out) {
  int done = 0;
  while (done < n) {
    const uint64_t index = uint64_t(first + done), z = block_key(key, index >> 16);
    const uint32_t k0 = uint32_t(z), k1 = uint32_t(z >> 32), low = uint32_t(index & 0xffff);
    const int left = int(65536 - low), count = n - done < left ? n - done : left;
    uint32_t *o = out + done;
    for (int j = 0; j < count; j++) o[j] = mix(mix(k0 ^ ((low + uint32_t(j)) * 0x9E3779B9u)) + k1);
    done += count;
  }
}

static inline double sum_tile(const float *x) {
  double lane[8] = {};
  for (int j = 0; j < TILE; j += 8) {
    for (int l = 0; l < 8; l++) lane[l] += double(x[j + l]);
  }
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

}  // namespace EP_ISA
}  // namespace ep

#else

namespace ep {
// `at` is the first tensor of the call, on whose device the others must be; empty before.
static inline bool piece(Piece &out, const DLTensor *t, const char *fn, const char *name, int64_t size, Tensor &at) {
  Tensor v;
  if (!view(v, t, fn, name, 1, FLOATS | GPU)) return false;
  if (size >= 0 && v.size != size) {
    fail(EP_INVALID_ARGUMENT, "%s: %s has %lld elements, expected %lld", fn, name, (long long)v.size, (long long)size);
    return false;
  }
  if (!at) at = v;
  if (check_one_device(fn, {&at, &v})) return false;
  out = {v.data, v.dtype};
  return true;
}
// Several inputs of one length; returns it, or -1 after an error.
static inline int64_t pieces(Piece *out, const DLTensor *const *x, int count, const char *fn, Tensor &at) {
  if (count < 1 || count > EP_MERGE_MAX_INPUTS) {
    fail(EP_INVALID_ARGUMENT, "%s: %d inputs; 1 to %d are taken", fn, count, int(EP_MERGE_MAX_INPUTS));
    return -1;
  }
  if (x == nullptr) return fail(EP_INVALID_ARGUMENT, "%s: x is missing", fn), -1;
  int64_t size = -1;
  for (int i = 0; i < count; i++) {
    if (!piece(out[i], x[i], fn, "x", size, at)) return -1;
    size = x[i]->shape[0];
  }
  return size;
}
// On a GPU a workspace is wanted.
static inline bool workspace_of(const void *workspace, const Tensor &at, const char *fn) {
  if (!on_gpu(at.device) || (workspace != nullptr && reinterpret_cast<uintptr_t>(workspace) % 8 == 0)) return true;
  fail(EP_INVALID_ARGUMENT, "%s: workspace is %s", fn, workspace == nullptr ? "missing" : "not aligned to 8 bytes");
  return false;
}
// The index of the first element of a piece, which is counted on from.
static inline bool start_of(int64_t start, const char *fn) {
  if (start >= 0 && start < int64_t(1) << 62) return true;
  fail(EP_INVALID_ARGUMENT, "%s: start is %lld; 0 to 2^62 is taken", fn, (long long)start);
  return false;
}
}  // namespace ep

#endif
