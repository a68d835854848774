// See hopper.h. Like everything here it is the state of one launch; each block begins anew.
#include "hopper.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "../cuda/ptx.cuh"

namespace ep {
namespace emulator {

namespace {

constexpr uint32_t EVERYONE = 0xffffffffu;
constexpr uint32_t UNSET = 0xffbfffffu;        // accumulators under way: a signalling NaN, which arithmetic turns into another one
constexpr uint64_t MARK = 0x6d62617272696572;  // what an mbarrier's 8 bytes hold here: whoever overwrites them is found out
constexpr int WARPS = MAX_THREADS / WARP, MOST_REGISTERS = 65536;

struct Load {  // a TMA load under way
  TensorMap map;
  uint32_t to;
  int at[MAX_RANK];
};

struct Mbarrier {
  int count, missing;  // arrivals of a phase, and those still to come
  int64_t bytes = 0;   // expected and not yet there
  uint32_t phase = 0;
  bool published = false;  // to the async proxy
  Waiting waiting;
  std::deque<Load> loads;
};

struct Store {
  TensorMap map;
  uint32_t from;
  int at[MAX_RANK];
};
struct Stores {
  std::vector<Store> open;
  std::deque<std::vector<Store>> groups;
};

struct Accumulator {  // of a warp: 16 x n, while wgmma has it
  float *lane[WARP];
  int n, users = 0;
  float d[16][256];
};
struct Operation {
  Accumulator *sum;
  const uint32_t *a[WARP];
  Wgmma what;
  bool done;
};
struct WarpState {
  bool fenced = false;
  std::vector<Operation> open;
  std::deque<std::vector<Operation>> groups;
  std::vector<std::unique_ptr<Accumulator>> sums;
  size_t issued = 0;
  int registers = 0;
};
struct Issued {  // what all four warps of a warpgroup must agree on
  uint64_t a, b;
  int n;
};

float value_of(uint16_t bits, bool fp16) { return fp16 ? ptx::fp16_value(bits) : ptx::bf16_value(bits); }

char async_view[MAX_SHARED];
bool async_used = false;
std::map<uint32_t, Mbarrier> mbarriers;
std::map<unsigned, Stores> stores;  // by thread
WarpState warp_states[WARPS];
std::vector<Issued> issued[WARPS / 4];
Waiting for_registers;
int free_registers = 0;
unsigned leader = 0, returned = 0;

// The async proxy's view of shared memory; the first use in a block fills it as lay_out_shared fills the other.
char *async_memory() {
  if (!async_used) {
    std::memset(async_view, 0xff, block.shared_bytes);
    async_used = true;
  }
  return async_view;
}

// 16-byte chunk numbers (bits 4 up) XOR the bits that count rows of 128 bytes (bits 7 up).
uint32_t swizzle(uint32_t address, int bits) { return address ^ ((address >> 7 & ((1u << bits) - 1)) << 4); }

// ---- mbarriers --------------------------------------------------------------------------------------------------------------

Mbarrier &mbarrier_at(uint32_t address, const char *instruction) {
  const char *at = shared_at(address, 8, 8, instruction);
  const auto found = mbarriers.find(address);
  if (found == mbarriers.end()) stop("%s: no mbarrier was initialised at shared address %u", instruction, address);
  if (std::memcmp(at, &MARK, 8) != 0) stop("%s: the mbarrier at shared address %u was overwritten", instruction, address);
  return found->second;
}

void complete_if_done(Mbarrier &m) {
  if (m.missing != 0 || m.bytes != 0) return;
  m.phase++;
  m.missing = m.count;
  wake(m.waiting);
}

// ---- TMA --------------------------------------------------------------------------------------------------------------------

// Calls each(global address or null beyond the tensor, shared address, bytes) for the chunks of 16 bytes, or less, of a box.
template <class Each>
void walk(const TensorMap &map, uint32_t shared, const int *at, Each &&each) {
  uint32_t rows = 1;
  for (int d = 1; d < map.rank; d++) rows *= map.box[d];
  const uint32_t width = map.box[0] * uint32_t(map.item);
  for (uint32_t row = 0; row < rows; row++) {
    const char *from = map.base;
    bool inside = true;
    uint32_t rest = row;
    for (int d = 1; d < map.rank; d++) {
      const int64_t x = int64_t(at[d]) + rest % map.box[d];
      rest /= map.box[d];
      inside = inside && x >= 0 && uint64_t(x) < map.extent[d];
      from += inside ? x * int64_t(map.stride[d]) : 0;
    }
    for (uint32_t byte = 0; byte < width; byte += uint32_t(map.item)) {
      const int64_t x = int64_t(at[0]) + byte / uint32_t(map.item);
      const bool there = inside && x >= 0 && uint64_t(x) < map.extent[0];
      const uint32_t address = shared + row * width + byte;
      each(there ? from + x * map.item : nullptr, map.swizzled ? swizzle(address, 3) : address, size_t(map.item));
    }
  }
}

uint32_t box_bytes(const TensorMap &map) {
  uint32_t bytes = uint32_t(map.item);
  for (int d = 0; d < map.rank; d++) bytes *= map.box[d];
  return bytes;
}

void check_box(const TensorMap &map, uint32_t address, int rank, const char *instruction) {
  if (rank != map.rank) stop("%s: %d coordinates for a tensor map of rank %d", instruction, rank, map.rank);
  shared_at(address, box_bytes(map), 128, instruction);
}

void land(Mbarrier &m) {
  const Load load = m.loads.front();
  m.loads.pop_front();
  char *async = async_memory();
  walk(load.map, load.to, load.at, [&](const char *from, uint32_t to, size_t bytes) {
    char zeros[8] = {};
    std::memcpy(block.shared + to, from == nullptr ? zeros : from, bytes);
    std::memcpy(async + to, block.shared + to, bytes);
  });
  m.bytes -= box_bytes(load.map);
  complete_if_done(m);
}

// ---- wgmma ------------------------------------------------------------------------------------------------------------------

// A matrix in shared memory, as its descriptor says (PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout").
struct Matrix {
  uint32_t start, leading, stride;
  int chunks, swizzle_bits;  // chunks of a row of the swizzle atom
  bool transposed;           // contiguous along m or n, not along k

  Matrix(uint64_t descriptor, bool across)
      : start(uint32_t(descriptor & 0x3fff) << 4),
        leading(uint32_t(descriptor >> 16 & 0x3fff) << 4),
        stride(uint32_t(descriptor >> 32 & 0x3fff) << 4),
        transposed(across) {
    const int mode = int(descriptor >> 62);  // none, 128, 64, 32 bytes
    chunks = mode == 0 ? 1 : 16 >> mode;
    swizzle_bits = mode == 0 ? 0 : 4 - mode;
    if (descriptor >> 49 & 7) stop("wgmma: a matrix descriptor with a base offset; matrices must begin at multiples of 1024");
  }

  // Chunk of 16 bytes that holds element (line, k): line = row of A or column of B.
  uint32_t chunk_of(int line, int k) const {
    uint32_t at;
    if (transposed) {
      const uint32_t c = uint32_t(line) / 8, row = uint32_t(k);
      at = chunks == 1
               ? c * stride + row % 8 * 16 + row / 8 * leading
               : c % uint32_t(chunks) * 16 + c / uint32_t(chunks) * leading + row % 8 * uint32_t(chunks) * 16 + row / 8 * stride;
    } else {
      const uint32_t c = uint32_t(k) / 8, row = uint32_t(line);
      at =
          chunks == 1 ? row % 8 * 16 + row / 8 * stride + c * leading : row % 8 * uint32_t(chunks) * 16 + row / 8 * stride + c * 16;
    }
    return swizzle(start + at, swizzle_bits);
  }

  // out[line - first][k] or, by_k, out[k][line - first], for `lines` lines.
  template <class Put>
  void read(int first, int lines, bool fp16, Put &&put) const {
    const char *async = async_memory();
    for (int outer = 0; outer < (transposed ? lines / 8 : lines); outer++) {
      for (int inner = 0; inner < (transposed ? 16 : 2); inner++) {
        const int line = first + (transposed ? outer * 8 : outer), k = transposed ? inner : inner * 8;
        const uint32_t at = chunk_of(line, k);
        shared_at(at, 16, 16, "wgmma");
        for (int e = 0; e < 8; e++) {
          uint16_t bits;
          std::memcpy(&bits, async + at + 2 * e, 2);
          put(line - first + (transposed ? e : 0), k + (transposed ? 0 : e), value_of(bits, fp16));
        }
      }
    }
  }
};

void execute(Operation &o) {
  if (o.done) return;
  o.done = true;
  const Wgmma &w = o.what;
  static float a[16][16], b[16][256];
  if (o.a[0] != nullptr) {
    for (int lane = 0; lane < WARP; lane++) {
      for (int r = 0; r < 4; r++) {
        for (int e = 0; e < 2; e++) {
          a[lane / 4 + 8 * (r % 2)][2 * (lane % 4) + e + 8 * (r / 2)] = value_of(uint16_t(o.a[lane][r] >> (16 * e)), w.fp16);
        }
      }
    }
  } else {
    Matrix(w.a_matrix, w.a_transposed).read(int(current->warp % 4) * 16, 16, w.fp16, [](int m, int k, float v) { a[m][k] = v; });
  }
  Matrix(w.b_matrix, w.b_transposed).read(0, w.n, w.fp16, [](int n, int k, float v) { b[k][n] = v; });
  for (int i = 0; i < 16; i++) {
    float *d = o.sum->d[i];
    if (!w.accumulate) std::fill(d, d + w.n, 0.f);
    for (int k = 0; k < 16; k++) {
      const float x = a[i][k];
      for (int j = 0; j < w.n; j++) d[j] += x * b[k][j];
    }
  }
}

void execute_all(WarpState &s) {
  for (auto &group : s.groups) {
    for (Operation &o : group) execute(o);
  }
  for (Operation &o : s.open) execute(o);
}

float &element(Accumulator &sum, int lane, int i) { return sum.d[lane / 4 + i % 4 / 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2]; }

void check_untouched(const Accumulator &sum) {
  for (int lane = 0; lane < WARP; lane++) {
    for (int i = 0; i < sum.n / 2; i++) {
      uint32_t bits;
      std::memcpy(&bits, sum.lane[lane] + i, 4);
      if (bits != UNSET) stop("wgmma: accumulators were written between wgmma and wgmma.wait_group");
    }
  }
}

void issue(void **arguments, uint32_t lanes) {
  if (lanes != EVERYONE) stop("wgmma needs all 32 lanes of a warp");
  WarpState &s = warp_states[current->warp];
  const Wgmma &w = *static_cast<Wgmma *>(arguments[0]);
  for (int lane = 1; lane < WARP; lane++) {
    const Wgmma &other = *static_cast<Wgmma *>(arguments[lane]);
    if (other.a_matrix != w.a_matrix || other.b_matrix != w.b_matrix || other.accumulate != w.accumulate)
      stop("wgmma: the lanes of a warp have different matrices");
  }
  std::vector<Issued> &log = issued[current->warp / 4];
  if (s.issued == log.size()) {
    log.push_back({w.a_matrix, w.b_matrix, w.n});
  } else if (log[s.issued].a != w.a_matrix || log[s.issued].b != w.b_matrix || log[s.issued].n != w.n) {
    stop("wgmma: another warp of the warpgroup has other matrices in its instruction %d", int(s.issued));
  }
  s.issued++;
  Operation o{nullptr, {}, w, false};
  for (auto &sum : s.sums) {
    if (sum->lane[0] == w.d) o.sum = sum.get();
  }
  if ((o.sum == nullptr || w.a != nullptr) && !s.fenced)
    stop("wgmma: no wgmma.fence since its registers were last used for other things");
  if (o.sum == nullptr) {
    s.sums.push_back(std::make_unique<Accumulator>());
    o.sum = s.sums.back().get();
    o.sum->n = w.n;
    for (int lane = 0; lane < WARP; lane++) {
      float *d = o.sum->lane[lane] = static_cast<Wgmma *>(arguments[lane])->d;
      for (int i = 0; i < w.n / 2; i++) {
        element(*o.sum, lane, i) = d[i];
        std::memcpy(d + i, &UNSET, 4);
      }
    }
  } else {
    if (o.sum->n != w.n) stop("wgmma: accumulators of n %d are under way with n %d", w.n, o.sum->n);
    check_untouched(*o.sum);
  }
  o.sum->users++;
  for (int lane = 0; lane < WARP; lane++) o.a[lane] = static_cast<Wgmma *>(arguments[lane])->a;
  s.open.push_back(o);
  const Schedule schedule = running_schedule();
  if (schedule == Schedule::reverse || (schedule == Schedule::shuffled && (random_number() & 1) != 0)) execute_all(s);
  statistics.wgmma++;
}

void wait_for_groups(WarpState &s, size_t left) {
  while (s.groups.size() > left) {
    for (Operation &o : s.groups.front()) {
      execute(o);
      if (--o.sum->users > 0) continue;
      check_untouched(*o.sum);
      for (int lane = 0; lane < WARP; lane++) {
        for (int i = 0; i < o.sum->n / 2; i++) o.sum->lane[lane][i] = element(*o.sum, lane, i);
      }
      s.sums.erase(std::find_if(s.sums.begin(), s.sums.end(), [&](const auto &sum) { return sum.get() == o.sum; }));
    }
    s.groups.pop_front();
  }
}

}  // namespace

// ---- what hopper_emulated.h calls -------------------------------------------------------------------------------------------

void mbarrier_init(uint32_t address, int count) {
  char *at = shared_at(address, 8, 8, "mbarrier.init");
  if (count < 1 || count > (1 << 20) - 1) stop("mbarrier.init: a count of %d", count);
  std::memcpy(at, &MARK, 8);
  Mbarrier m{};
  m.count = m.missing = count;
  mbarriers[address] = m;
}

void mbarrier_arrive(uint32_t address, int64_t bytes) {
  Mbarrier &m = mbarrier_at(address, "mbarrier.arrive");
  if (m.missing == 0) stop("mbarrier.arrive: the phase of the mbarrier at %u already has its %d arrivals", address, m.count);
  if (bytes < 0 || bytes > (1 << 20) - 1) stop("mbarrier.arrive.expect_tx: %lld bytes", (long long)bytes);
  m.bytes += bytes;
  m.missing--;
  complete_if_done(m);
}

void mbarrier_wait(uint32_t address, uint32_t parity) {
  Mbarrier &m = mbarrier_at(address, "mbarrier.try_wait");
  if (parity > 1) stop("mbarrier.try_wait: a parity of %u", parity);
  while ((m.phase & 1) == parity) {
    if (!m.loads.empty()) {
      land(m);
    } else {
      sleep_in(m.waiting);
    }
  }
  if (running_schedule() == Schedule::shuffled && (random_number() & 7) == 0) give_way();
}

void fence_mbarrier_init() {
  for (auto &m : mbarriers) m.second.published = true;
}

void fence_async() {
  std::memcpy(async_memory(), block.shared, block.shared_bytes);
  fence_mbarrier_init();
}

const char *encode_tensor_map(TensorMap &map, const void *base, int item, int rank, const uint64_t *extent, const uint64_t *stride,
                              const uint32_t *box, bool swizzled) {
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0) return "the address is not a multiple of 16";
  if (rank < 1 || rank > MAX_RANK) return "the rank is not 1 to 5";
  map = TensorMap();
  map.base = static_cast<const char *>(base), map.rank = rank, map.item = item, map.swizzled = swizzled;
  for (int d = 0; d < rank; d++) {
    map.extent[d] = extent[d], map.box[d] = box[d];
    map.stride[d] = d == 0 ? uint64_t(item) : stride[d - 1];
    if (extent[d] == 0 || extent[d] > uint64_t(1) << 32) return "an extent is not 1 to 2^32";
    if (box[d] == 0 || box[d] > 256) return "a side of the box is not 1 to 256";
    if (d > 0 && (map.stride[d] % 16 != 0 || map.stride[d] >= uint64_t(1) << 40))
      return "a stride is not a multiple of 16 below 2^40";
  }
  if (box[0] * uint32_t(item) % 16 != 0) return "the box's rows are not a multiple of 16 bytes";
  if (swizzled && box[0] * uint32_t(item) > 128) return "the box's rows are longer than the 128 bytes of the swizzle";
  return nullptr;
}

void tma_load(uint32_t to, const TensorMap &map, uint32_t mbarrier, int rank, const int *at) {
  check_box(map, to, rank, "cp.async.bulk.tensor");
  if (map.swizzled && map.box[0] * uint32_t(map.item) != 128) stop("cp.async.bulk.tensor: swizzled rows that are not 128 bytes");
  Mbarrier &m = mbarrier_at(mbarrier, "cp.async.bulk.tensor");
  if (!m.published) stop("cp.async.bulk.tensor: the mbarrier at %u was initialised without a fence for the async proxy", mbarrier);
  Load load{map, to, {}};
  std::copy(at, at + rank, load.at);
  char *async = async_memory();
  std::memset(block.shared + to, 0xff, box_bytes(map));
  std::memset(async + to, 0xff, box_bytes(map));
  m.loads.push_back(load);
  statistics.tma++;
  wake(m.waiting);  // those who wait for it already make it arrive
}

void tma_store(const TensorMap &map, uint32_t from, int rank, const int *at) {
  check_box(map, from, rank, "cp.async.bulk.tensor store");
  Store store{map, from, {}};
  std::copy(at, at + rank, store.at);
  stores[current->id].open.push_back(store);
  statistics.tma++;
}

void bulk_commit() {
  Stores &mine = stores[current->id];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void bulk_wait(int groups_left) {
  Stores &mine = stores[current->id];
  while (mine.groups.size() > size_t(groups_left)) {
    const char *async = async_memory();
    for (const Store &store : mine.groups.front()) {
      walk(store.map, store.from, store.at, [&](const char *to, uint32_t from, size_t bytes) {
        if (to != nullptr) std::memcpy(const_cast<char *>(to), async + from, bytes);
      });
    }
    mine.groups.pop_front();
  }
}

void wgmma(Wgmma &mine) { together("wgmma", EVERYONE, &mine, &issue); }

void wgmma_fence() {
  together("wgmma.fence", EVERYONE, nullptr, [](void **, uint32_t) { warp_states[current->warp].fenced = true; });
}

void wgmma_commit() {
  together("wgmma.commit_group", EVERYONE, nullptr, [](void **, uint32_t) {
    WarpState &s = warp_states[current->warp];
    s.groups.push_back(std::move(s.open));
    s.open.clear();
    s.fenced = false;
  });
}

void wgmma_wait(int groups_left) {
  struct Left {
    int groups;
  } left{groups_left};
  together("wgmma.wait_group", EVERYONE, &left, [](void **arguments, uint32_t) {
    wait_for_groups(warp_states[current->warp], size_t(static_cast<Left *>(arguments[0])->groups));
  });
}

void set_max_registers(int count, bool up) {
  if (count < 24 || count > 256 || count % 8 != 0) stop("setmaxnreg: %d is not a multiple of 8 from 24 to 256", count);
  together(up ? "setmaxnreg.inc" : "setmaxnreg.dec", EVERYONE, nullptr, [](void **, uint32_t) {});
  WarpState &s = warp_states[current->warp];
  while (s.registers != count) {
    if (up ? count < s.registers : count > s.registers) {
      stop("setmaxnreg.%s: from %d to %d registers", up ? "inc" : "dec", s.registers, count);
    }
    const int more = (count - s.registers) * WARP;
    if (more <= free_registers) {
      free_registers -= more, s.registers = count;
      wake(for_registers);
    } else {
      sleep_in(for_registers);
    }
  }
}

bool elected() {
  together("elect", EVERYONE, nullptr, [](void **, uint32_t) {});
  return current->lane == leader;
}

// ---- what emulator.cpp calls ------------------------------------------------------------------------------------------------

void hopper_block_begins() {
  async_used = false;
  mbarriers.clear(), stores.clear();
  const int registers = std::min(MOST_REGISTERS / int(block.threads) / 8 * 8, 255);
  for (WarpState &s : warp_states) s = WarpState(), s.registers = registers;
  for (auto &log : issued) log.clear();
  for_registers = Waiting(), free_registers = 0, returned = 0;
  const Schedule schedule = running_schedule();
  leader = schedule == Schedule::forward ? 0 : schedule == Schedule::reverse ? WARP - 1 : random_number() % WARP;
}

void hopper_thread_returns() {
  const WarpState &s = warp_states[current->warp];
  if (!s.open.empty() || !s.groups.empty()) stop("the warp returns while its wgmma are under way: wgmma.wait_group is missing");
  const auto mine = stores.find(current->id);
  if (mine != stores.end() && (!mine->second.open.empty() || !mine->second.groups.empty()))
    stop("the thread returns while its bulk stores are under way: cp.async.bulk.wait_group is missing");
  if (++returned < block.threads) return;
  for (unsigned w = 0; w < block.threads / WARP; w++) {
    if (warp_states[w].issued != issued[w / 4].size()) stop("warp %u issued fewer wgmma than another of its warpgroup", w);
  }
  for (const auto &m : mbarriers) {
    if (!m.second.loads.empty()) stop("the block ends while a TMA load for the mbarrier at %u is under way", m.first);
    if (m.second.bytes != 0) stop("the block ends while the mbarrier at %u expects %lld bytes", m.first, (long long)m.second.bytes);
  }
}

std::string hopper_waits() {
  std::string text;
  for (const auto &m : mbarriers) {
    for (unsigned w = 0; w < WARPS; w++) {
      if (m.second.waiting.lanes[w] == 0) continue;
      text += "; warp " + std::to_string(w) + ": lanes " + lanes_of(m.second.waiting.lanes[w]) + " at the mbarrier at " +
              std::to_string(m.first) + " (phase " + std::to_string(m.second.phase) + ": " + std::to_string(m.second.missing) +
              " arrivals and " + std::to_string(m.second.bytes) + " bytes missing)";
    }
  }
  for (unsigned w = 0; w < WARPS; w++) {
    if (for_registers.lanes[w] != 0)
      text += "; warp " + std::to_string(w) + " at setmaxnreg, " + std::to_string(free_registers) + " free";
  }
  return text;
}

}  // namespace emulator
}  // namespace ep
