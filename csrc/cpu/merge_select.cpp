// Merging: which elements of a task vector stay (by magnitude, at random, at random by rank in the row), and the sum of those that
// do.
#include "merge_tile.h"

#ifndef EP_API

#include <cmath>

namespace ep {
namespace EP_ISA {

// Whether of a tile's elements equal to low all are in or none, and likewise for high: then those in (above, upto] are in, and the
// ties are counted. d: the task vector, padded with zeros behind n.
static inline bool bounds_of(ep_merge_select &s, const float *d, int n, int32_t &above, int32_t &upto) {
  const bool low_in = s.seen_low >= s.low_skip;
  bool high_in = false, whole = s.low != s.high;
  if (whole && !(low_in && s.seen_high >= s.high_keep)) {  // else it does not matter how many there are
    int32_t lows = 0, highs = 0;
    for (int j = 0; j < TILE; j++) {
      const int32_t bits = bits_of(d[j]) & 0x7fffffff;
      lows += bits == s.low;
      highs += bits == s.high;
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
  above = low_in ? s.low - 1 : s.low;
  upto = high_in ? s.high : s.high - 1;
  return whole;
}
static inline void keep_between(const float *d, int32_t above, int32_t upto, int32_t *keep) {
  for (int j = 0; j < TILE; j++) {
    const int32_t bits = bits_of(d[j]) & 0x7fffffff;
    keep[j] = -int32_t((bits > above) & (bits <= upto));
  }
}
// Element by element, where a tile has ties that are in and others that are out.
static void keep_ties(ep_merge_select &s, const float *d, int n, int32_t *keep) {
  int32_t bits[TILE];
  magnitude_bits(d, bits);
  for (int j = 0; j < n; j++) {
    bool in = bits[j] > s.low && bits[j] < s.high;
    if (bits[j] == s.low) in = s.seen_low++ >= s.low_skip && (s.low != s.high || s.seen_low <= s.high_keep);
    if (bits[j] == s.high && s.low != s.high) in = s.seen_high++ < s.high_keep;
    keep[j] = -int32_t(in);
  }
  if (s.low == s.high) s.seen_high = s.seen_low;
  for (int j = n; j < TILE; j++) keep[j] = 0;
}

// keep[j] = -1 or 0 for a tile of a task vector d whose first element is element `at` of the piece and `index` of the tensor.
static inline void keep_tile(ep_merge_select &s, const int32_t *mask, const float *d, int64_t at, int64_t index, int n,
                             int32_t *keep) {
  if (s.kind == EP_SELECT_ALL || s.kind == EP_SELECT_NONE) {
    for (int j = 0; j < TILE; j++) keep[j] = s.kind == EP_SELECT_ALL ? -1 : 0;
    return;
  }
  if (s.kind == EP_SELECT_RANDOM) {
    if (s.limit > 0xffffffffu) {
      for (int j = 0; j < TILE; j++) keep[j] = -1;
      return;
    }
    const int32_t limit = int32_t(uint32_t(s.limit) ^ 0x80000000u);  // vectors compare signed numbers
    draws_of_tile(s.key, index, n, keep, [=](uint32_t draw) { return -int32_t(int32_t(draw ^ 0x80000000u) < limit); });
    for (int j = n; j < TILE; j++) keep[j] = 0;
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
  int32_t above, upto;
  if (bounds_of(s, d, n, above, upto)) {
    keep_between(d, above, upto, keep);
  } else {
    keep_ties(s, d, n, keep);
  }
}

// 32 bits, the first of which is bit `at` of a mask that was zero from there on.
static inline void write_bits(uint32_t word, int64_t at, int32_t *mask) {
  const int shift = int(at & 31);
  mask[at >> 5] |= int32_t(word << shift);
  if (shift != 0 && (word >> (32 - shift)) != 0) mask[(at >> 5) + 1] |= int32_t(word >> (32 - shift));
}

void merge_masked_sums(const MergeMaskedSums &a) {
  float d[TILE];
  int32_t keep[TILE];
  if (a.kept != nullptr) std::memset(a.kept, 0, size_t((a.size + 31) / 32) * 4);
  for (int64_t block = 0; block < a.size; block += a.block) {
    const int64_t end = a.size - block < a.block ? a.size : block + a.block;
    double all = 0, kept = 0;
    for (int64_t at = block; at < end; at += TILE) {
      const int n = int(end - at < TILE ? end - at : TILE);
      load_delta(a.x, a.base, at, n, d);
      keep_tile(*a.select, a.mask, d, at, a.start + at, n, keep);
      sum_tile(d, keep, all, kept);
      if (a.kept == nullptr) continue;
      for (int from = 0; from < n; from += 32) write_bits(pack(keep + from), at + from, a.kept);
    }
    a.total[0] += all;
    a.total[1] += kept;
  }
}

// out[j] = table[index[j]], and 0 behind n. One by one: gathering eight at once takes twice as long on Zen 3.
static inline void look_up(const int32_t *table, const uint16_t *index, int n, int32_t *out) {
  int j = 0;
  for (; j + 4 <= n; j += 4) {
    const int32_t a = table[index[j]], b = table[index[j + 1]], c = table[index[j + 2]], d = table[index[j + 3]];
    out[j] = a, out[j + 1] = b, out[j + 2] = c, out[j + 3] = d;
  }
  for (; j < n; j++) out[j] = table[index[j]];
  for (; j < TILE; j++) out[j] = 0;
}

// limit[s] = least + step * (twice the mean rank of slot s), of whose elements there are even[s] + odd[s]. Up to 7 more may be
// written.
static inline void limits_of(const int32_t *even, const int32_t *odd, int slots, float least, float step, int32_t *limit) {
#if defined(__AVX2__)
  __m256i before = _mm256_setzero_si256();
  for (int s = 0; s < slots; s += 8) {
    const __m256i here = _mm256_add_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(even + s)),
                                          _mm256_loadu_si256(reinterpret_cast<const __m256i *>(odd + s)));
    __m256i upto = _mm256_add_epi32(here, _mm256_slli_si256(here, 4));
    upto = _mm256_add_epi32(upto, _mm256_slli_si256(upto, 8));  // within each half
    upto = _mm256_add_epi32(upto, _mm256_shuffle_epi32(_mm256_permute2x128_si256(upto, upto, 0x08), 0xff));
    upto = _mm256_add_epi32(upto, before);
    before = _mm256_permutevar8x32_epi32(upto, _mm256_set1_epi32(7));
    const __m256i twice = _mm256_sub_epi32(_mm256_sub_epi32(_mm256_add_epi32(upto, upto), here), _mm256_set1_epi32(1));
    const __m256 at = _mm256_add_ps(_mm256_set1_ps(least), _mm256_mul_ps(_mm256_set1_ps(step), _mm256_cvtepi32_ps(twice)));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(limit + s), _mm256_cvttps_epi32(at));
  }
#else
  int32_t before = 0;
  for (int s = 0; s < slots; s++) {
    const int32_t here = even[s] + odd[s];
    limit[s] = int32_t(least + step * float(2 * before + here - 1));
    before += here;
  }
#endif
}

// The rank of an element comes from a count of the row's magnitudes by exponent and 6 bits of the fraction, so that one count and
// one table of limits serve a row: magnitudes that agree in them are equal, and equal ones share the mean of their ranks. The table
// reaches 16 octaves down from the largest magnitude of the row; what is below, zeros above all, is in its first slot.
void merge_rank_mask(const MergeRankMask &a) {
  constexpr int SLOTS = RANK_SLOTS, SHIFT = 17;
  const int64_t columns = a.columns;
  int32_t *even = a.workspace, *odd = even + SLOTS, *limit = odd + SLOTS, *bits = limit + SLOTS;
  uint16_t *slot = reinterpret_cast<uint16_t *>(bits + columns + TILE);
  uint32_t draw[TILE] = {};
  int32_t keep[TILE];
  float d[TILE];
  std::memset(a.mask, 0, size_t((a.size + 31) / 32) * 4);
  for (int64_t row = 0; row + columns <= a.size; row += columns) {
    int32_t most = 0;
    for (int64_t at = 0; at < columns; at += TILE) {
      const int n = int(columns - at < TILE ? columns - at : TILE);
      const int32_t here = load_bits(a.x, a.base, row + at, n, bits + at);
      most = here > most ? here : most;
    }
    const int32_t lowest = (most >> SHIFT) < SLOTS ? 0 : (most >> SHIFT) - (SLOTS - 1), slots = (most >> SHIFT) - lowest + 1;
    std::memset(even, 0, size_t(slots) * 4);
    std::memset(odd, 0, size_t(slots) * 4);
    for (int64_t j = 0; j < columns; j++) {
      const int32_t s = (bits[j] >> SHIFT) - lowest;
      slot[j] = uint16_t(s > 0 ? s : 0);
    }
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) {
      uint64_t four;
      std::memcpy(&four, slot + j, 8);
      even[four & 0xffff]++;
      odd[(four >> 16) & 0xffff]++;
      even[(four >> 32) & 0xffff]++;
      odd[four >> 48]++;
    }
    for (; j < columns; j++) even[slot[j]]++;
    limits_of(even, odd, slots, a.least, a.step, limit);
    double all = 0, kept = 0;
    for (int64_t at = 0; at < columns; at += TILE) {
      const int n = int(columns - at < TILE ? columns - at : TILE);
      random_tile(a.key, a.start + row + at, n, draw);
      look_up(limit, slot + at, n, keep);
      for (int k = 0; k < TILE; k++) keep[k] = -int32_t(int32_t(draw[k] >> 8) < keep[k]);
      for (int from = 0; from < n; from += 32) write_bits(pack(keep + from), row + at + from, a.mask);
      if (a.total == nullptr) continue;
      for (int k = 0; k < TILE; k++) d[k] = float_of(bits[at + k]);
      sum_tile(d, keep, all, kept);
    }
    if (a.total == nullptr) continue;
    a.total[0] += all;
    a.total[1] += kept;
  }
}

// What a tile of task vectors is put together with. An element stays as the tile's Keep says: always, where keep is -1, where its
// bits are in (above, upto], or where its bit is set.
enum Keep { WHOLE, EACH, BETWEEN, BITS };
struct Mix {
  float scale[EP_MERGE_MAX_INPUTS], weight[EP_MERGE_MAX_INPUTS], divisor;
  int32_t keep[EP_MERGE_MAX_INPUTS][TILE], above[EP_MERGE_MAX_INPUTS], upto[EP_MERGE_MAX_INPUTS];
  const int32_t *bits[EP_MERGE_MAX_INPUTS];
  int count;
  bool count_signs;
  ep_merge_task_params p;
};

// A whole tile of out; returns the sum of the signs, if they are counted. With COUNT inputs, known when this is compiled, an
// element stays in registers; 0: any number.
//
// An input takes part in an election where its v, turned as the sum's sign is, is above zero. A sum of zero counts as -1 where
// zero_sign is negative, and where it is 0 nothing is above infinity.
template <int COUNT, Keep KEEP, class T>
static inline int32_t task_tile(const T *const *x, const T *base, const Mix &mix, float *out) {
  constexpr int MOST = COUNT > 0 ? COUNT : EP_MERGE_MAX_INPUTS;
  const int count = COUNT > 0 ? COUNT : mix.count;
  const V one = set1(1.f), lambda = set1(mix.p.scale), divisor = set1(mix.divisor), infinity = set1(HUGE_VALF);
  const bool elect = mix.p.elect != 0, normalize = mix.p.normalize != 0;
  const int zero_sign = mix.p.zero_sign;
  V v[MOST], scale[MOST], weight[MOST], above[MOST], upto[MOST], signs = zero();
  const T *from[MOST];
  for (int i = 0; i < count; i++) {  // what the stores below might change, for all that the compiler knows
    from[i] = x[i], scale[i] = set1(mix.scale[i]), weight[i] = set1(mix.weight[i]);
    above[i] = set1(float_of(mix.above[i])), upto[i] = set1(float_of(mix.upto[i]));
  }
  for (int j = 0; j < TILE; j += N) {
    const V b = load(base + j);
    for (int i = 0; i < count; i++) {
      V d = load(from[i] + j) - b;
      if (KEEP == EACH) d = where(mix.keep[i] + j, d);
      if (KEEP == BETWEEN) d = where_between(above[i], upto[i], d);
      if (KEEP == BITS) d = where_bits(mix.bits[i], j, d);
      v[i] = (d * scale[i]) * weight[i];
    }
    V mixed = v[0];
    for (int i = 1; i < count; i++) mixed = mixed + v[i];
    if (elect) {
      if (mix.count_signs) signs = signs + (where_above(mixed, zero(), one) - where_above(zero() - mixed, zero(), one));
      if (zero_sign < 0) mixed = mixed - where_zero(mixed, one);
      const V least = zero_sign == 0 ? where_zero(mixed, infinity) : zero();
      V total = zero(), weights = zero();
      for (int i = 0; i < count; i++) {
        const V turn = turned(v[i], mixed);
        total = total + where_above(turn, least, v[i]);
        if (normalize) weights = weights + where_above(turn, least, weight[i]);
      }
      mixed = normalize ? total / (weights + where_zero(weights, one)) : total;
    } else if (normalize) {
      mixed = mixed / divisor;
    }
    store(out + j, b + mixed * lambda);
  }
  return int32_t(sum(signs));
}
template <Keep KEEP, class T>
static inline int32_t task_tile(const T *const *x, const T *base, const Mix &mix, float *out) {
  if (mix.count == 2) return task_tile<2, KEEP, T>(x, base, mix, out);
  if (mix.count == 3) return task_tile<3, KEEP, T>(x, base, mix, out);
  return task_tile<0, KEEP, T>(x, base, mix, out);
}

// How the selections of a call can be looked at in whole tiles.
static inline Keep keep_of(const MergeTaskSum &a) {
  bool all = true, between = true, bits = true;
  for (int i = 0; i < a.count; i++) {
    const int kind = a.select[i].kind, constant = kind == EP_SELECT_ALL || kind == EP_SELECT_NONE;
    all = all && kind == EP_SELECT_ALL;
    between = between && (constant || kind == EP_SELECT_MAGNITUDE);
    bits = bits && (constant || kind == EP_SELECT_BITS);
  }
  return all ? WHOLE : between ? BETWEEN : bits ? BITS : EACH;
}

// A whole tile from element `at` on, of inputs that are all of type T. `how`, of all selections, becomes EACH where ties need it.
template <class T>
static inline int32_t task_tile(const MergeTaskSum &a, Mix &mix, Keep how, int64_t at, float *out) {
  const T *x[EP_MERGE_MAX_INPUTS], *base = reinterpret_cast<const T *>(a.base.data) + at;
  bool whole[EP_MERGE_MAX_INPUTS];
  float d[TILE];
  for (int i = 0; i < a.count; i++) {
    ep_merge_select &s = a.select[i];
    x[i] = reinterpret_cast<const T *>(a.x[i].data) + at;
    if (s.kind == EP_SELECT_BITS) mix.bits[i] = a.mask[i] + at / 32;
    if (s.kind != EP_SELECT_MAGNITUDE || how == EACH) continue;
    const bool count = s.low == s.high || s.seen_low < s.low_skip || s.seen_high < s.high_keep;
    if (count) load_delta(a.x[i], a.base, at, TILE, d);
    whole[i] = bounds_of(s, d, TILE, mix.above[i], mix.upto[i]);
    if (!whole[i]) keep_ties(s, d, TILE, mix.keep[i]);
  }
  Keep now = how;
  for (int i = 0; i < a.count && how == BETWEEN; i++) {
    if (a.select[i].kind == EP_SELECT_MAGNITUDE && !whole[i]) now = EACH;
  }
  if (now == WHOLE) return task_tile<WHOLE, T>(x, base, mix, out);
  if (now == BETWEEN) return task_tile<BETWEEN, T>(x, base, mix, out);
  if (now == BITS) return task_tile<BITS, T>(x, base, mix, out);
  for (int i = 0; i < a.count; i++) {
    ep_merge_select &s = a.select[i];
    const bool ties = how == BETWEEN && s.kind == EP_SELECT_MAGNITUDE;
    if ((ties && !whole[i]) || s.kind == EP_SELECT_ALL || s.kind == EP_SELECT_NONE) continue;  // there already
    if (s.kind == EP_SELECT_MAGNITUDE) load_delta(a.x[i], a.base, at, TILE, d);
    if (ties) {
      keep_between(d, mix.above[i], mix.upto[i], mix.keep[i]);
    } else {
      keep_tile(s, a.mask[i], d, at, a.p.start + at, TILE, mix.keep[i]);
    }
  }
  return task_tile<EACH, T>(x, base, mix, out);
}

void merge_task_sum(const MergeTaskSum &a) {
  Mix mix;
  mix.count = a.count, mix.p = a.p, mix.divisor = a.divisor, mix.count_signs = a.signs != nullptr;
  static const int32_t every[TILE / 32] = {-1, -1, -1, -1, -1, -1, -1, -1}, none[TILE / 32] = {};
  bool alike = true;
  for (int i = 0; i < a.count; i++) {
    const bool out_of = a.select[i].kind == EP_SELECT_NONE;
    for (int j = 0; j < TILE; j++) mix.keep[i][j] = out_of ? 0 : -1;
    mix.scale[i] = a.select[i].scale, mix.weight[i] = a.select[i].weight;
    alike = alike && a.x[i].dtype == a.base.dtype;
    mix.above[i] = out_of ? 0x7fffffff : -1, mix.upto[i] = 0x7fffffff;
    mix.bits[i] = out_of ? none : every;
  }
  const Keep how = keep_of(a);
  float b[TILE], wide[EP_MERGE_MAX_INPUTS][TILE], out[TILE];
  int64_t signs = 0;
  for (int64_t at = 0; at < a.size; at += TILE) {
    const int n = int(a.size - at < TILE ? a.size - at : TILE);
    if (alike && n == TILE) {
      signs += a.base.dtype == BF16 ? task_tile<bf16>(a, mix, how, at, out) : task_tile<float>(a, mix, how, at, out);
    } else {
      const float *x[EP_MERGE_MAX_INPUTS];
      load_tile(a.base, at, n, b);
      for (int i = 0; i < a.count; i++) {
        if (a.select[i].kind == EP_SELECT_MAGNITUDE) load_delta(a.x[i], a.base, at, n, out);
        keep_tile(a.select[i], a.mask[i], out, at, a.p.start + at, n, mix.keep[i]);
        load_tile(a.x[i], at, n, wide[i]), x[i] = wide[i];
      }
      signs += task_tile<EACH, float>(x, b, mix, out);
    }
    store_tile(a.out, a.out_dtype, at, n, out);
  }
  if (a.signs != nullptr) *a.signs = signs;
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
  if (s.kind != EP_SELECT_BITS && s.mask == nullptr) return true;
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
  if (select->kind != EP_SELECT_BITS && a.mask != nullptr) {
    EP_REQUIRE(!on_gpu(at.device), "%s: masks are written on the CPU alone", fn);
    a.kept = const_cast<int32_t *>(a.mask);
    a.mask = nullptr;
  }
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
  EP_REQUIRE(selects != nullptr, "%s: selects is missing", fn);
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
