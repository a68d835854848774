// Merging on the GPU: which elements of a task vector stay, and the sum of those that do; see csrc/cpu/merge_select.cpp. Bits are
// those of the CPU (merge.cuh).
//
// A selection by magnitude keeps the elements equal to a threshold from the low_skip-th on, or up to the high_keep-th. Along a
// tensor that changes once: so two kernels find at which element, by counting spans of 8192, and every other kernel compares
// indices.
#include "merge.h"

#include <memory>
#include <new>

#include "merge.cuh"

namespace ep {
namespace cuda {
namespace {

constexpr int SPAN = 8192;  // elements of a count of ties

// A selection as kernels read it, and the tensor it selects from. Of the elements equal to low those before the `skip`-th of this
// piece go, of those equal to high those before the `keep`-th stay.
struct Source {
  Piece x;
  const int32_t *mask;
  uint64_t key;
  int64_t skip, keep;
  uint32_t limit;
  int kind, low, high, counted;
  float scale, weight;
};
// Index in the piece of the first element equal to low that stays, of the first equal to high that goes; how many there are.
struct Cross {
  int64_t from, until, lows, highs;
};

__device__ __forceinline__ bool keeps(const Source &s, const Cross &c, Draws &draws, float d, int64_t at, int64_t start) {
  if (s.kind == EP_SELECT_ALL || s.kind == EP_SELECT_NONE) return s.kind == EP_SELECT_ALL;
  if (s.kind == EP_SELECT_RANDOM) return draws(start + at) < s.limit;
  if (s.kind == EP_SELECT_BITS) return uint32_t(s.mask[at >> 5]) >> (at & 31) & 1;
  const int bits = magnitude(d);
  if (bits == s.low) return at >= c.from && (s.low != s.high || at < c.until);
  return (bits > s.low && bits < s.high) || (bits == s.high && at < c.until);
}

// The same for a run, as bits: the kind is looked at once.
__device__ __forceinline__ unsigned keeps_of_run(const Source &s, const Cross *cross, const float (&d)[RUN], int64_t at,
                                                 int64_t start) {
  if (s.kind == EP_SELECT_NONE) return 0;
  if (s.kind == EP_SELECT_BITS) return uint32_t(s.mask[at >> 5]) >> (at & 31);  // a run lies in one word
  unsigned bits = 0;
  if (s.kind == EP_SELECT_RANDOM) {
    Draws draws(s.key, start + at);
    const uint32_t limit = s.limit;
#pragma unroll
    for (int e = 0; e < RUN; e++) bits |= unsigned(draws(start + at + e) < limit) << e;
    return bits;
  }
  const int low = s.low, high = s.high;
  const int from = int(max(int64_t(0), min(int64_t(RUN), cross->from - at))),
            until = int(max(int64_t(0), min(int64_t(RUN), cross->until - at)));
#pragma unroll
  for (int e = 0; e < RUN; e++) {
    const int m = magnitude(d[e]);
    const bool in =
        (m > low && m < high) || (m == low && e >= from && (low != high || e < until)) || (m == high && low != high && e < until);
    bits |= unsigned(in) << e;
  }
  return bits;
}

__global__ void __launch_bounds__(THREADS) count_ties(const Source *sources, const Piece base, int64_t size, int2 *spans) {
  const Source s = sources[blockIdx.y];
  if (!s.counted) return;
  int *total = shared_memory<int>();
  if (threadIdx.x < 2) total[threadIdx.x] = 0;
  __syncthreads();
  int lows = 0, highs = 0;
  for (int round = 0; round < SPAN / (THREADS * RUN); round++) {
    const int64_t at = int64_t(blockIdx.x) * SPAN + (round * THREADS + int(threadIdx.x)) * RUN;
    const int n = int(max(int64_t(0), min(int64_t(RUN), size - at)));
    if (n == 0) continue;
    float d[RUN];
    load_delta(s.x, base, at, n, d);
#pragma unroll
    for (int e = 0; e < RUN; e++) {
      lows += e < n && magnitude(d[e]) == s.low;
      highs += e < n && magnitude(d[e]) == s.high;
    }
  }
  if (lows != 0) atomicAdd(total, lows);
  if (highs != 0) atomicAdd(total + 1, highs);
  __syncthreads();
  if (threadIdx.x == 0) spans[int64_t(blockIdx.y) * gridDim.x + blockIdx.x] = make_int2(total[0], total[1]);
}

// The thread in whose part the target-th of all the counts of the threads lies, with how many come before in its own; -1 in the
// others. `total`: of all. room: THREADS + 1 numbers of shared memory.
__device__ __forceinline__ int64_t rank_in_mine(int64_t count, int64_t target, long long *room, int64_t &total) {
  __syncthreads();
  room[threadIdx.x] = count;
  __syncthreads();
  if (threadIdx.x == 0) {
    long long sum = 0;
    for (int i = 0; i < THREADS; i++) {
      const long long here = room[i];
      room[i] = sum;
      sum += here;
    }
    room[THREADS] = sum;
  }
  __syncthreads();
  total = room[THREADS];
  const int64_t rest = target - room[threadIdx.x];
  return rest >= 0 && rest < count ? rest : -1;
}

// A block for each source: the elements at which its ties change.
__global__ void __launch_bounds__(THREADS)
    find_crossings(const Source *sources, const Piece base, int64_t size, const int2 *spans, int64_t span_count, Cross *crosses) {
  const Source s = sources[blockIdx.x];
  if (!s.counted) return;
  long long *room = shared_memory<long long>(), *found = room + THREADS + 1;  // found: span, rank in it
  const int2 *mine = spans + int64_t(blockIdx.x) * span_count;
  const int64_t share = (span_count + THREADS - 1) / THREADS, first = int64_t(threadIdx.x) * share;
  for (int high = 0; high < 2; high++) {
    const int64_t target = max(int64_t(0), high ? s.keep : s.skip);
    const int value = high ? s.high : s.low;
    int64_t count = 0, total, *index = high ? &crosses[blockIdx.x].until : &crosses[blockIdx.x].from;
    for (int64_t i = first; i < min(span_count, first + share); i++) count += high ? mine[i].y : mine[i].x;
    int64_t rest = rank_in_mine(count, target, room, total);
    if (rest >= 0) {
      int64_t i = first;
      for (int here; rest >= (here = high ? mine[i].y : mine[i].x); i++) rest -= here;
      found[0] = i, found[1] = rest;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      (high ? crosses[blockIdx.x].highs : crosses[blockIdx.x].lows) = total;
      if (target >= total) *index = size;
    }
    if (target >= total) continue;
    const int64_t from = found[0] * SPAN + int64_t(threadIdx.x) * (SPAN / THREADS), end = min(size, from + SPAN / THREADS);
    const int64_t target_here = found[1];
    count = 0;
    for (int64_t i = from; i < end; i++) count += magnitude(delta_one(s.x, base, i)) == value;
    rest = rank_in_mine(count, target_here, room, total);
    if (rest < 0) continue;
    for (int64_t i = from;; i++) {
      if (magnitude(delta_one(s.x, base, i)) == value && rest-- == 0) {
        *index = i;
        break;
      }
    }
  }
}

// partial[block] = {sum |d|, sum |d| of what stays} of a block of elements
__global__ void __launch_bounds__(THREADS) masked_sums(const Source *source, const Cross *cross, const Piece base, int64_t size,
                                                       int64_t start, int64_t block, double *partial) {
  const Source s = *source;
  const Cross c = *cross;
  const int64_t from = int64_t(blockIdx.x) * block, end = min(size, from + block);
  Draws draws(s.key, start + from);
  const double total = sum_in_order<2, 4>(from, end, shared_memory<double>(), [&](int64_t i, double (&sum)[2]) {
    const float d = delta_one(s.x, base, i);
    const double size_of = double(fabsf(d));
    sum[0] = __dadd_rn(sum[0], size_of);
    if (keeps(s, c, draws, d, i, start)) sum[1] = __dadd_rn(sum[1], size_of);
  });
  if (threadIdx.x < 2) partial[2 * int64_t(blockIdx.x) + threadIdx.x] = total;
}

// Rows one after the other: see merge_rank_mask of the CPU for the ranks.
struct RankRoom {
  int count[RANK_SLOTS], limit[RANK_SLOTS], warp[THREADS / 32], most;
};
__global__ void __launch_bounds__(THREADS, 4) rank_mask(const MergeRankMask a) {
  constexpr int SHIFT = 17, EACH = RANK_SLOTS / THREADS;
  RankRoom &room = *shared_memory<RankRoom>();
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  for (int64_t row = blockIdx.x; row < a.size / a.columns; row += gridDim.x) {
    const int64_t from = row * a.columns;
    __syncthreads();
    if (thread == 0) room.most = 0;
    for (int k = 0; k < EACH; k++) room.count[thread * EACH + k] = 0;
    __syncthreads();
    int most = 0;
    for (int64_t i = thread; i < a.columns; i += THREADS) most = max(most, magnitude(delta_one(a.x, a.base, from + i)));
    if (most > 0) atomicMax(&room.most, most);
    __syncthreads();
    const int lowest = max(0, (room.most >> SHIFT) - (RANK_SLOTS - 1));
    for (int64_t i = thread; i < a.columns; i += THREADS) {
      atomicAdd(&room.count[max(0, (magnitude(delta_one(a.x, a.base, from + i)) >> SHIFT) - lowest)], 1);
    }
    __syncthreads();
    int mine = 0;
    for (int k = 0; k < EACH; k++) mine += room.count[thread * EACH + k];
    int before = mine;  // of the warp's threads up to this one
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, before, unsigned(lanes));
      if (lane >= lanes) before += other;
    }
    if (lane == 31) room.warp[warp] = before;
    __syncthreads();
    before -= mine;
    for (int w = 0; w < warp; w++) before += room.warp[w];
    for (int k = 0; k < EACH; k++) {
      const int here = room.count[thread * EACH + k];
      room.limit[thread * EACH + k] =
          int(__fadd_rn(a.least, __fmul_rn(a.step, float(2 * before + here - 1))));  // twice the mean rank
      before += here;
    }
    __syncthreads();
    Draws draws(a.key, a.start + from);
    const auto stays = [&](float d, int64_t i) {
      return int(draws(a.start + i) >> 8) < room.limit[max(0, (magnitude(d) >> SHIFT) - lowest)];
    };
    for (int64_t round = 0; round < a.columns; round += THREADS) {
      const int64_t column = round + thread, i = from + column, word = from + round + warp * 32;
      const bool keep = column < a.columns && stays(delta_one(a.x, a.base, i), i);
      const unsigned bits = __ballot_sync(0xffffffffu, keep);
      const int shift = int(word & 31);
      if (lane == 0 && bits != 0) {
        if (bits << shift != 0) atomicOr(a.mask + (word >> 5), int(bits << shift));
        if (shift != 0 && bits >> (32 - shift) != 0) atomicOr(a.mask + (word >> 5) + 1, int(bits >> (32 - shift)));
      }
    }
  }
}

struct Task {
  const Source *sources;
  const Cross *crosses;
  Piece base;
  int count, normalize;
  float zero_sign, scale, divisor;
  int64_t start, size;
  char *out;
  unsigned out_dtype;
  long long *signs;
};

// The weighted task vector of input i where it stays, else 0.
__device__ __forceinline__ float load_task(const Task &t, int i, const float (&b)[RUN], int64_t at, int n, float (&d)[RUN]) {
  const Source &s = t.sources[i];
  const float scale = s.scale, weight = s.weight;
  load_piece(s.x, at, n, d);
#pragma unroll
  for (int e = 0; e < RUN; e++) d[e] = __fsub_rn(d[e], b[e]);
  if (s.kind != EP_SELECT_ALL && n > 0) {
    const unsigned keep = keeps_of_run(s, t.crosses + i, d, at, t.start);
#pragma unroll
    for (int e = 0; e < RUN; e++) {
      if (!(keep >> e & 1)) d[e] = 0.f;
    }
  }
#pragma unroll
  for (int e = 0; e < RUN; e++) d[e] = __fmul_rn(__fmul_rn(d[e], scale), weight);
  return weight;
}

// With an election the inputs are read twice, the second time from the caches: their number is known at run time, registers are
// not.
template <bool ELECT>
__global__ void __launch_bounds__(THREADS) task_sum(const Task t) {
  int n;
  const int64_t at = run_of(t.size, n);
  float b[RUN], d[RUN], mixed[RUN];
  load_piece(t.base, at, n, b);
  load_task(t, 0, b, at, n, mixed);
  for (int i = 1; i < t.count; i++) {
    load_task(t, i, b, at, n, d);
#pragma unroll
    for (int e = 0; e < RUN; e++) mixed[e] = __fadd_rn(mixed[e], d[e]);
  }
  if constexpr (ELECT) {
    float sign[RUN], divisor[RUN];
    int up = 0;
#pragma unroll
    for (int e = 0; e < RUN; e++) {
      sign[e] = mixed[e] > 0.f ? 1.f : mixed[e] < 0.f ? -1.f : t.zero_sign;
      if (e < n) up += (mixed[e] > 0.f) - (mixed[e] < 0.f);
      mixed[e] = divisor[e] = 0.f;
    }
    if (t.signs != nullptr) add_counts(t.signs, up);
    for (int i = 0; i < t.count; i++) {
      const float weight = load_task(t, i, b, at, n, d);
#pragma unroll
      for (int e = 0; e < RUN; e++) {
        const bool in = __fmul_rn(d[e], sign[e]) > 0.f;
        mixed[e] = __fadd_rn(mixed[e], in ? d[e] : 0.f);
        divisor[e] = __fadd_rn(divisor[e], in ? weight : 0.f);
      }
    }
    if (t.normalize) {
#pragma unroll
      for (int e = 0; e < RUN; e++) mixed[e] = __fdiv_rn(mixed[e], divisor[e] == 0.f ? 1.f : divisor[e]);
    }
  } else if (t.normalize) {
#pragma unroll
    for (int e = 0; e < RUN; e++) mixed[e] = __fdiv_rn(mixed[e], t.divisor);
  }
#pragma unroll
  for (int e = 0; e < RUN; e++) mixed[e] = __fadd_rn(b[e], __fmul_rn(mixed[e], t.scale));
  if (n > 0) store_piece(t.out, t.out_dtype, at, n, mixed);
}

// Where things lie in the workspace; signs and crosses are read back together.
struct Places {
  long long *signs;
  Cross *crosses;
  Source *sources;
  int2 *spans;
  double *sums;
};
Places places(void *workspace, int count, int64_t size) {
  static_assert(8 + sizeof(Cross) + sizeof(Source) <= 256 && sizeof(Source) % 8 == 0, "what ep_merge_workspace_bytes counts with");
  char *p = static_cast<char *>(workspace);
  Places at = {};
  at.signs = reinterpret_cast<long long *>(p), p += 8;
  at.crosses = reinterpret_cast<Cross *>(p), p += sizeof(Cross) * count;
  at.sources = reinterpret_cast<Source *>(p), p += sizeof(Source) * count;
  at.spans = reinterpret_cast<int2 *>(p), p += 8 * ceil_div(size, SPAN) * count;
  at.sums = reinterpret_cast<double *>(p);
  return at;
}

// Puts the selections into the workspace and finds where their ties change.
int prepare(const Places &at, const Piece *x, const int32_t *const *mask, const ep_merge_select *selects, int count,
            const Piece &base, int64_t size, void *stream) {
  std::unique_ptr<Source[]> sources(new (std::nothrow) Source[size_t(count)]);
  if (!sources) return fail(EP_OUT_OF_MEMORY, "merge: no memory for %d selections", count);
  bool any = false;
  for (int i = 0; i < count; i++) {
    const ep_merge_select &s = selects[i];
    const int64_t skip = s.low_skip - s.seen_low, keep = s.high_keep - (s.low == s.high ? s.seen_low : s.seen_high);
    const bool counted = s.kind == EP_SELECT_MAGNITUDE && (skip > 0 || keep > 0);
    const int kind = s.kind == EP_SELECT_RANDOM && s.limit > 0xffffffffu ? int(EP_SELECT_ALL) : s.kind;
    sources[size_t(i)] = {x[i], mask[i], s.key, skip, keep, uint32_t(s.limit), kind, s.low, s.high, counted, s.scale, s.weight};
    any = any || counted;
  }
  if (const int status = clear(at.signs, 8 + int64_t(sizeof(Cross)) * count, stream)) return status;
  if (const int status = send(at.sources, sources.get(), int64_t(sizeof(Source)) * count, stream)) return status;
  if (!any) return EP_OK;
  const int64_t spans = ceil_div(size, SPAN);
  const Source *table = at.sources;
  const dim3 grid{unsigned(spans), unsigned(count)};
  if (const int status = launch(&count_ties, grid, THREADS, 2 * sizeof(int), stream, table, base, size, at.spans)) return status;
  return launch(&find_crossings, dim3(unsigned(count)), THREADS, (THREADS + 3) * sizeof(long long), stream, table, base, size,
                at.spans, spans, at.crosses);
}

// Reads back the sum of signs and how many ties there were: the selections count on.
int finish(const Places &at, ep_merge_select *selects, int count, int64_t *signs, void *stream) {
  const int64_t bytes = 8 + int64_t(sizeof(Cross)) * count;
  std::unique_ptr<long long[]> read(new (std::nothrow) long long[size_t(bytes / 8)]);
  if (!read) return fail(EP_OUT_OF_MEMORY, "merge: no memory for %d selections", count);
  if (const int status = fetch(read.get(), at.signs, bytes, stream)) return status;
  if (signs != nullptr) *signs = read[0];
  for (int i = 0; i < count; i++) {
    ep_merge_select &s = selects[i];
    s.seen_low += read[size_t(1 + 4 * i + 2)];  // not counted: zero
    s.seen_high = s.low == s.high && s.kind == EP_SELECT_MAGNITUDE ? s.seen_low : s.seen_high + read[size_t(1 + 4 * i + 3)];
  }
  return EP_OK;
}

int add_sums(double *total, const double *from, int64_t count, void *stream) {
  std::unique_ptr<double[]> part(new (std::nothrow) double[size_t(2 * count)]);
  if (!part) return fail(EP_OUT_OF_MEMORY, "merge: no memory for %lld sums", static_cast<long long>(count));
  if (const int status = fetch(part.get(), from, 16 * count, stream)) return status;
  for (int64_t i = 0; i < count; i++) total[0] += part[size_t(2 * i)], total[1] += part[size_t(2 * i + 1)];
  return EP_OK;
}

}  // namespace

int merge_masked_sums(const MergeMaskedSums &a, void *stream) {
  if (a.size == 0) return EP_OK;
  const Places at = places(a.workspace, 1, a.size);
  if (const int status = prepare(at, &a.x, &a.mask, a.select, 1, a.base, a.size, stream)) return status;
  const int64_t blocks = ceil_div(a.size, a.block);
  if (const int status = launch(&masked_sums, dim3(unsigned(blocks)), THREADS, 2 * GROUPS * sizeof(double), stream, at.sources,
                                at.crosses, a.base, a.size, a.start, a.block, at.sums)) {
    return status;
  }
  if (const int status = add_sums(a.total, at.sums, blocks, stream)) return status;
  return finish(at, a.select, 1, nullptr, stream);
}

int merge_rank_mask(const MergeRankMask &a, void *stream) {
  if (a.size == 0) return EP_OK;
  if (const int status = clear(a.mask, (a.size + 31) / 32 * 4, stream)) return status;
  const int64_t rows = a.size / a.columns;
  const dim3 grid(unsigned(min(rows, int64_t(1) << 20)));
  if (const int status = launch(&rank_mask, grid, THREADS, sizeof(RankRoom), stream, a)) return status;
  if (a.total == nullptr) return EP_OK;
  ep_merge_select bits = {};
  bits.kind = EP_SELECT_BITS;
  const MergeMaskedSums sums = {a.x, a.base, a.size, a.start, a.columns, &bits, a.mask, a.total, a.workspace, nullptr};
  return merge_masked_sums(sums, stream);
}

int merge_task_sum(const MergeTaskSum &a, void *stream) {
  if (a.signs != nullptr) *a.signs = 0;
  if (a.size == 0) return EP_OK;
  const Places at = places(a.workspace, a.count, a.size);
  if (const int status = prepare(at, a.x, a.mask, a.select, a.count, a.base, a.size, stream)) return status;
  Task t = {};
  t.sources = at.sources, t.crosses = at.crosses, t.base = a.base, t.count = a.count, t.normalize = a.p.normalize;
  t.zero_sign = float(a.p.zero_sign), t.scale = a.p.scale, t.divisor = a.divisor, t.start = a.p.start, t.size = a.size;
  t.out = a.out, t.out_dtype = a.out_dtype, t.signs = a.signs == nullptr ? nullptr : at.signs;
  auto *kernel = a.p.elect ? &task_sum<true> : &task_sum<false>;
  if (const int status = launch(kernel, run_blocks(a.size), THREADS, 0, stream, t)) return status;
  return finish(at, a.select, a.count, a.signs, stream);
}

}  // namespace cuda
}  // namespace ep
