// Merging: which elements of a task vector stay (by magnitude, at random, at random by rank in the row), and the sum of those that
// do.
#include "merge_tile.h"

#ifndef EP_API

namespace ep {
namespace EP_ISA {

// keep[j] = -1 or 0 for a tile of a task vector d whose first element is element `at` of the piece and `index` of the tensor.
static inline void keep_tile(ep_merge_select &s, const int32_t *mask, const float *d, int64_t at, int64_t index, int n,
                             int32_t *keep) {
  if (s.kind == EP_SELECT_ALL || s.kind == EP_SELECT_NONE) {
    for (int j = 0; j < TILE; j++) keep[j] = s.kind == EP_SELECT_ALL ? -1 : 0;
    return;
  }
  if (s.kind == EP_SELECT_RANDOM) {
    uint32_t draw[TILE] = {};
    random_tile(s.key, index, n, draw);
    if (s.limit > 0xffffffffu) {
      for (int j = 0; j < TILE; j++) keep[j] = -1;
    } else {
      const uint32_t limit = uint32_t(s.limit);
      for (int j = 0; j < TILE; j++) keep[j] = -int32_t(draw[j] < limit);
    }
    return;
  }
  if (s.kind == EP_SELECT_BITS) {
    for (int from = 0; from < TILE; from += 32) {
      const int64_t word = (at + from) >> 5, shift = (at + from) & 31, last = (at + n - 1) >> 5;
      uint32_t bits = word <= last ? uint32_t(mask[word]) >> shift : 0;
      if (shift != 0 && word < last) bits |= uint32_t(mask[word + 1]) << (32 - shift);
      if (n - from < 32) bits &= n > from ? (1u << (n - from)) - 1 : 0;
      for (int j = 0; j < 32; j++) keep[from + j] = -int32_t((bits >> j) & 1);
    }
    return;
  }
  int32_t bits[TILE];
  magnitude_bits(d, bits);
  bool low_in = s.seen_low >= s.low_skip, high_in = false;  // whether elements equal to low, to high, are in: all of this tile's
  bool whole = s.low != s.high;                             // or none
  if (whole && !(low_in && s.seen_high >= s.high_keep)) {   // else it does not matter how many there are
    int32_t lows = 0, highs = 0;
    for (int j = 0; j < TILE; j++) {
      lows += bits[j] == s.low;
      highs += bits[j] == s.high;
    }
    lows -= s.low == 0 ? TILE - n : 0;  // the padding is zero and not there
    highs -= s.high == 0 ? TILE - n : 0;
    high_in = s.seen_high + highs <= s.high_keep;
    whole = (low_in || s.seen_low + lows <= s.low_skip) && (high_in || s.seen_high >= s.high_keep);
    if (whole) {
      s.seen_low += lows;
      s.seen_high += highs;
    }
  }
  if (whole) {
    const int32_t above = low_in ? s.low - 1 : s.low, below = high_in ? s.high : s.high - 1;
    for (int j = 0; j < TILE; j++) keep[j] = -int32_t((bits[j] > above) & (bits[j] <= below));
    return;
  }
  for (int j = 0; j < n; j++) {
    bool in = bits[j] > s.low && bits[j] < s.high;
    if (bits[j] == s.low) in = s.seen_low++ >= s.low_skip && (s.low != s.high || s.seen_low <= s.high_keep);
    if (bits[j] == s.high && s.low != s.high) in = s.seen_high++ < s.high_keep;
    keep[j] = -int32_t(in);
  }
  if (s.low == s.high) s.seen_high = s.seen_low;
  for (int j = n; j < TILE; j++) keep[j] = 0;
}

// d where keep is -1, else 0
static inline void apply(const int32_t *keep, float *d) {
  for (int j = 0; j < TILE; j++) d[j] = float_of(bits_of(d[j]) & keep[j]);
}

void merge_masked_sums(const MergeMaskedSums &a) {
  float d[TILE];
  int32_t keep[TILE];
  for (int64_t block = 0; block < a.size; block += a.block) {
    const int64_t end = a.size - block < a.block ? a.size : block + a.block;
    double all = 0, kept = 0;
    for (int64_t at = block; at < end; at += TILE) {
      const int n = int(end - at < TILE ? end - at : TILE);
      load_delta(a.x, a.base, at, n, d);
      keep_tile(*a.select, a.mask, d, at, a.start + at, n, keep);
      for (int j = 0; j < TILE; j++) d[j] = d[j] < 0 ? -d[j] : d[j];
      all += sum_tile(d);
      apply(keep, d);
      kept += sum_tile(d);
    }
    a.total[0] += all;
    a.total[1] += kept;
  }
}

// out[j] = table[index[j]], and 0 behind n
static inline void look_up(const int32_t *table, const int32_t *index, int n, int32_t *out) {
  int j = 0;
#if defined(__AVX2__)
  for (; j + 8 <= n; j += 8) {
    const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(index + j));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + j), _mm256_i32gather_epi32(table, at, 4));
  }
#endif
  for (; j < n; j++) out[j] = table[index[j]];
  for (; j < TILE; j++) out[j] = 0;
}

// The rank of an element comes from a count of the row's magnitudes by exponent and 6 bits of the fraction, so that one count and
// one table of limits serve a row: magnitudes that agree in them are equal, and equal ones share the mean of their ranks. The table
// reaches 16 octaves down from the largest magnitude of the row; what is below, zeros above all, is in its first slot.
void merge_rank_mask(const MergeRankMask &a) {
  constexpr int SLOTS = RANK_SLOTS, SHIFT = 17;
  const int64_t columns = a.columns;
  int32_t *even = a.workspace, *odd = even + SLOTS, *limit = odd + SLOTS, *slot = limit + SLOTS, *bits = slot + columns + TILE;
  uint32_t draw[TILE] = {};
  int32_t keep[TILE];
  float d[TILE];
  std::memset(a.mask, 0, size_t((a.size + 31) / 32) * 4);
  for (int64_t row = 0; row + columns <= a.size; row += columns) {
    int32_t most = 0;
    for (int64_t at = 0; at < columns; at += TILE) {
      const int n = int(columns - at < TILE ? columns - at : TILE);
      load_delta(a.x, a.base, row + at, n, d);
      magnitude_bits(d, bits + at);
      for (int j = 0; j < TILE; j++) most = bits[at + j] > most ? bits[at + j] : most;
    }
    const int32_t lowest = (most >> SHIFT) < SLOTS ? 0 : (most >> SHIFT) - (SLOTS - 1), slots = (most >> SHIFT) - lowest + 1;
    std::memset(even, 0, size_t(slots) * 4);
    std::memset(odd, 0, size_t(slots) * 4);
    for (int64_t j = 0; j < columns; j++) {
      const int32_t s = (bits[j] >> SHIFT) - lowest;
      slot[j] = s > 0 ? s : 0;
    }
    int64_t j = 0;
    for (; j + 2 <= columns; j += 2) {
      even[slot[j]]++;
      odd[slot[j + 1]]++;
    }
    if (j < columns) even[slot[j]]++;
    for (int s = 0; s < slots; s++) odd[s] += even[s];
    int32_t before = 0;
    for (int s = 0; s < slots; s++) {
      even[s] = before;
      before += odd[s];
    }
    for (int s = 0; s < slots; s++) limit[s] = int32_t(a.least + a.step * float(2 * even[s] + odd[s] - 1));  // twice the mean rank
    double all = 0, kept = 0;
    for (int64_t at = 0; at < columns; at += TILE) {
      const int n = int(columns - at < TILE ? columns - at : TILE);
      random_tile(a.key, a.start + row + at, n, draw);
      look_up(limit, slot + at, n, keep);
      for (int k = 0; k < TILE; k++) keep[k] = -int32_t(int32_t(draw[k] >> 8) < keep[k]);
      for (int from = 0; from < n; from += 32) {
        const uint32_t word = pack(keep + from);
        const int64_t i = row + at + from, shift = i & 31;
        a.mask[i >> 5] |= int32_t(word << shift);
        if (shift != 0 && (word >> (32 - shift)) != 0) a.mask[(i >> 5) + 1] |= int32_t(word >> (32 - shift));
      }
      if (a.total == nullptr) continue;
      for (int k = 0; k < TILE; k++) d[k] = float_of(bits[at + k]);
      all += sum_tile(d);
      apply(keep, d);
      kept += sum_tile(d);
    }
    if (a.total == nullptr) continue;
    a.total[0] += all;
    a.total[1] += kept;
  }
}

void merge_task_sum(const MergeTaskSum &a) {
  float b[TILE], v[EP_MERGE_MAX_INPUTS][TILE], mixed[TILE], divisor[TILE], sign[TILE];
  int32_t keep[TILE];
  int64_t signs = 0;
  for (int64_t at = 0; at < a.size; at += TILE) {
    const int n = int(a.size - at < TILE ? a.size - at : TILE);
    load_tile(a.base, at, n, b);
    for (int i = 0; i < a.count; i++) {
      ep_merge_select &s = a.select[i];
      float *d = v[i];
      load_tile(a.x[i], at, n, d);
      for (int j = 0; j < TILE; j++) d[j] -= b[j];
      const float scale = s.scale, weight = s.weight;
      if (s.kind != EP_SELECT_ALL) {
        keep_tile(s, a.mask[i], d, at, a.p.start + at, n, keep);
        apply(keep, d);
      }
      for (int j = 0; j < TILE; j++) d[j] = (d[j] * scale) * weight;
    }
    for (int j = 0; j < TILE; j++) mixed[j] = v[0][j];
    for (int i = 1; i < a.count; i++) {
      for (int j = 0; j < TILE; j++) mixed[j] += v[i][j];
    }
    if (a.p.elect) {
      const float at_zero = float(a.p.zero_sign);
      int32_t up = 0, down = 0;
      for (int j = 0; j < TILE; j++) {
        up += mixed[j] > 0;
        down += mixed[j] < 0;
        sign[j] = mixed[j] > 0 ? 1.f : mixed[j] < 0 ? -1.f : at_zero;
        mixed[j] = 0.f;
        divisor[j] = 0.f;
      }
      signs += up - down;
      for (int i = 0; i < a.count; i++) {
        const float weight = a.select[i].weight;
        for (int j = 0; j < TILE; j++) {
          const bool in = v[i][j] * sign[j] > 0;
          mixed[j] += in ? v[i][j] : 0.f;
          divisor[j] += in ? weight : 0.f;
        }
      }
      if (a.p.normalize) {
        for (int j = 0; j < TILE; j++) mixed[j] /= divisor[j] == 0 ? 1.f : divisor[j];
      }
    } else if (a.p.normalize) {
      for (int j = 0; j < TILE; j++) mixed[j] /= a.divisor;
    }
    for (int j = 0; j < TILE; j++) mixed[j] = b[j] + mixed[j] * a.p.scale;
    store_tile(a.out, a.out_dtype, at, n, mixed);
  }
  *a.signs = signs;
}

}  // namespace EP_ISA
}  // namespace ep

#else

#include <cmath>

using namespace ep;

// The mask of a select that has one.
static bool mask_of(const int32_t *&out, const ep_merge_select &s, int64_t size, const char *fn, const Tensor &at) {
  out = nullptr;
  if (s.kind < EP_SELECT_ALL || s.kind > EP_SELECT_BITS) {
    fail(EP_INVALID_ARGUMENT, "%s: there is no selection of kind %d", fn, s.kind);
    return false;
  }
  constexpr int64_t MOST = int64_t(1) << 62;  // counting on from there cannot overflow
  if (s.low < 0 || s.high < 0 || s.seen_low < 0 || s.seen_low > MOST || s.seen_high < 0 || s.seen_high > MOST) {
    fail(EP_INVALID_ARGUMENT, "%s: a selection has low %d, high %d, seen_low %lld, seen_high %lld; none may be negative", fn, s.low,
         s.high, (long long)s.seen_low, (long long)s.seen_high);
    return false;
  }
  if (s.kind != EP_SELECT_BITS) return true;
  Tensor v;
  if (!view(v, s.mask, fn, "mask", 1, I32 | GPU) || check_one_device(fn, {&at, &v})) return false;
  if (v.size != (size + 31) / 32) {
    fail(EP_INVALID_ARGUMENT, "%s: mask has %lld words for %lld elements", fn, (long long)v.size, (long long)size);
    return false;
  }
  out = reinterpret_cast<const int32_t *>(v.data);
  return true;
}

extern "C" int ep_merge_masked_sums(const DLTensor *x, const DLTensor *base, ep_merge_select *select, int64_t start, int64_t block,
                                    double *total, void *workspace, void *stream) {
  const char *fn = "merge_masked_sums";
  MergeMaskedSums a{};
  EP_REQUIRE(select != nullptr && total != nullptr, "%s: %s is missing", fn, select == nullptr ? "select" : "total");
  Tensor at;
  a.size = pieces(&a.x, &x, 1, fn, at);
  if (a.size < 0 || !piece(a.base, base, fn, "base", a.size, at) || !mask_of(a.mask, *select, a.size, fn, at) ||
      !start_of(start, fn)) {
    return EP_INVALID_ARGUMENT;
  }
  EP_REQUIRE(block >= 1, "%s: block is %lld; at least one element is wanted", fn, (long long)block);
  if (!workspace_of(workspace, at, fn)) return EP_INVALID_ARGUMENT;
  a.workspace = workspace;
  a.start = start;
  a.block = block;
  a.select = select;
  a.total = total;
  EP_DISPATCH(merge_masked_sums, a, stream, fn, &at);
}

extern "C" int64_t ep_merge_rank_mask_workspace_bytes(int64_t columns) { return 4 * (3 * RANK_SLOTS + 2 * (columns + TILE)); }

extern "C" int ep_merge_rank_mask(const DLTensor *x, const DLTensor *base, ep_merge_rank_params params, const DLTensor *mask,
                                  double *total, void *workspace, void *stream) {
  const char *fn = "merge_rank_mask";
  MergeRankMask a{};
  Tensor at;
  a.size = pieces(&a.x, &x, 1, fn, at);
  if (a.size < 0 || !piece(a.base, base, fn, "base", a.size, at)) return EP_INVALID_ARGUMENT;
  EP_VIEW(mv, mask, 1, I32 | GPU);
  if (int status = check_one_device(fn, {&at, &mv})) return status;
  const int64_t columns = params.columns;
  EP_REQUIRE(columns >= 1 && columns < (int64_t(1) << 30) && a.size % columns == 0, "%s: %lld elements are no rows of %lld", fn,
             (long long)a.size, (long long)columns);
  EP_REQUIRE(params.epsilon >= 0 && params.density - params.epsilon >= 0 && params.density + params.epsilon <= 1,
             "%s: density %g and epsilon %g; probabilities from density - epsilon to density + epsilon must lie in 0 to 1", fn,
             params.density, params.epsilon);
  EP_REQUIRE(mv.size == (a.size + 31) / 32, "%s: mask has %lld words for %lld elements", fn, (long long)mv.size, (long long)a.size);
  EP_REQUIRE(workspace != nullptr && reinterpret_cast<uintptr_t>(workspace) % 4 == 0, "%s: workspace is %s", fn,
             workspace == nullptr ? "missing" : "not aligned to 4 bytes");
  if (!start_of(params.start, fn)) return EP_INVALID_ARGUMENT;
  a.columns = columns;
  a.least = float((columns > 1 ? params.density - params.epsilon : params.density) * 16777216.0 + 0.5);
  a.step = columns > 1 ? float(params.epsilon / double(columns - 1) * 16777216.0) : 0.f;
  a.key = params.key;
  a.start = params.start;
  a.mask = reinterpret_cast<int32_t *>(mv.data);
  a.total = total;
  if (!workspace_of(workspace, at, fn)) return EP_INVALID_ARGUMENT;
  a.workspace = static_cast<int32_t *>(workspace);
  EP_DISPATCH(merge_rank_mask, a, stream, fn, &at);
}

extern "C" int ep_merge_task_sum(const DLTensor *base, const DLTensor *const *x, ep_merge_select *selects, int count,
                                 ep_merge_task_params params, const DLTensor *out, int64_t *signs, void *workspace, void *stream) {
  const char *fn = "merge_task_sum";
  MergeTaskSum a{};
  Tensor at;
  a.size = pieces(a.x, x, count, fn, at);
  Piece o;
  if (a.size < 0 || !piece(a.base, base, fn, "base", a.size, at) || !piece(o, out, fn, "out", a.size, at))
    return EP_INVALID_ARGUMENT;
  EP_REQUIRE(selects != nullptr && signs != nullptr, "%s: %s is missing", fn, selects == nullptr ? "selects" : "signs");
  if (!start_of(params.start, fn)) return EP_INVALID_ARGUMENT;
  if (!workspace_of(workspace, at, fn)) return EP_INVALID_ARGUMENT;
  a.workspace = workspace;
  double weights = 0;
  for (int i = 0; i < count; i++) {
    if (!mask_of(a.mask[i], selects[i], a.size, fn, at)) return EP_INVALID_ARGUMENT;
    weights += double(selects[i].weight);
  }
  a.select = selects;
  a.count = count;
  a.p = params;
  a.out = const_cast<char *>(o.data);
  a.out_dtype = o.dtype;
  a.divisor = std::fabs(weights) < 1e-8 ? 1.f : float(weights);
  a.signs = signs;
  EP_DISPATCH(merge_task_sum, a, stream, fn, &at);
}

#endif
