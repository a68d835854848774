// Dropout of a low-rank update's input: a hash of (seed, row, column) decides, see lora.h; enginepost/kernels/lora.py:keep_mask is
// the same in torch. One pass; a task is a few rows.
#include "enginepost/lora.h"

#include <cstring>

#include "lora.h"
#include "parallel.h"
#include "simd.h"
#include "tensor.h"

#ifndef EP_API

namespace ep {
namespace EP_ISA {

static inline uint32_t mix(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
  h = (h ^ (h >> 13)) * 0xC2B2AE35u;
  return (h ^ (h >> 16)) & 0x7fffffffu;
}

// NOTES: the loops over a tile have no branches and change the type of nothing but whole arrays, so each becomes vector code.
constexpr int TILE = 256;
template <class T>
static void drop_row(const LoraDropout &a, int64_t row) {
  const T *x = reinterpret_cast<const T *>(a.x) + row * a.x_row;
  T *out = reinterpret_cast<T *>(a.out) + row * a.out_row;
  const uint32_t line = mix(uint32_t(row) * DROPOUT_ROW + a.low) + a.high;
  const V scale = set1(a.scale);
  for (int64_t at = 0; at < a.width; at += TILE) {
    const int count = a.width - at < TILE ? int(a.width - at) : TILE;
    uint32_t keep[TILE], bits[TILE];
    float scaled[TILE];
    for (int j = 0; j < TILE; j++) {
      keep[j] = int32_t(mix(line + uint32_t(at + j) * DROPOUT_COLUMN)) >= a.threshold ? 0xffffffffu : 0u;
    }
    each(count, [&](int64_t j, int n) { put(scaled + j, get(x + at + j, n) * scale, n); });
    std::memcpy(bits, scaled, size_t(count) * 4);
    for (int j = 0; j < count; j++) bits[j] &= keep[j];
    std::memcpy(scaled, bits, size_t(count) * 4);
    each(count, [&](int64_t j, int n) { put(out + at + j, get(scaled + j, n), n); });
  }
}

void lora_dropout(const LoraDropout &a) {
  constexpr int64_t ROWS = 4;
  parallel_for((a.rows + ROWS - 1) / ROWS, [&](int64_t task, int) {
    for (int64_t row = task * ROWS; row < a.rows && row < (task + 1) * ROWS; row++) {
      a.dtype == BF16 ? drop_row<bf16>(a, row) : drop_row<float>(a, row);
    }
  });
}

}  // namespace EP_ISA
}  // namespace ep

#else

using namespace ep;

extern "C" int ep_lora_dropout(const DLTensor *x, const DLTensor *out, double dropout, uint64_t seed, void *stream) {
  const char *fn = "lora_dropout";
  EP_VIEW(xv, x, 2, FLOATS | GPU);
  EP_VIEW(ov, out, 2, FLOATS | GPU);
  EP_REQUIRE(dropout >= 0 && dropout < 1, "%s: dropout must be in [0, 1), got %g", fn, dropout);
  EP_REQUIRE(xv.dtype == ov.dtype, "%s: x and out must have one dtype", fn);
  EP_REQUIRE(xv.shape[0] == ov.shape[0] && xv.shape[1] == ov.shape[1], "%s: x (%lld, %lld) and out (%lld, %lld) must be alike", fn,
             (long long)xv.shape[0], (long long)xv.shape[1], (long long)ov.shape[0], (long long)ov.shape[1]);
  if (xv.size == 0) return EP_OK;
  const uint64_t key = seed * 0x9E3779B97F4A7C15ull + 0x632BE59BD9B4E019ull;
  const LoraDropout args{xv.data,
                         ov.data,
                         xv.shape[0],
                         xv.shape[1],
                         xv.stride[0],
                         ov.stride[0],
                         uint32_t(key),
                         uint32_t(key >> 32),
                         int32_t(dropout * 2147483648.0),
                         float(1 / (1 - dropout)),
                         xv.dtype};
  EP_DISPATCH(lora_dropout, args, stream, fn, &xv, &ov);
}

#endif
