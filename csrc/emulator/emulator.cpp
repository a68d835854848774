// See emulator.h. State is global: a launch holds one lock from beginning to end.
#include "emulator.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "../cuda/device.h"
#include "enginepost/core.h"
#include "fiber.h"
#include "hopper.h"
#include "tensor.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace ep {
namespace emulator {

Thread *current = nullptr;
Block block;
Statistics statistics;

namespace {

uint64_t random_state = 1;

}  // namespace

uint32_t random_number() {  // xorshift64*
  random_state ^= random_state >> 12, random_state ^= random_state << 25, random_state ^= random_state >> 27;
  return uint32_t((random_state * 0x2545f4914f6cdd1dull) >> 32);
}

std::string lanes_of(uint32_t mask) {
  std::string out;
  for (int i = 0; i < WARP;) {
    if (!(mask >> i & 1)) {
      i++;
      continue;
    }
    int j = i;
    while (j + 1 < WARP && (mask >> (j + 1) & 1)) j++;
    out += (out.empty() ? "" : ",") + std::to_string(i) + (j > i ? "-" + std::to_string(j) : "");
    i = j + 1;
  }
  return out;
}

namespace {

constexpr uint32_t EVERYONE = 0xffffffffu;
constexpr size_t GUARD = 4096;  // bytes on either side of a block's shared memory
constexpr unsigned char FENCE = 0xa5;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK = 256 << 10;
#else
constexpr size_t STACK = 64 << 10;
#endif

struct Copy {  // a cp.async under way
  uint32_t address;
  uint32_t bytes;
  char data[16];
};

struct Lane : Thread {
  Fiber fiber;
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;                 // not committed
};

struct Meeting {  // lanes that wait for each other
  const char *instruction = nullptr;
  uint32_t mask = 0, here = 0;
  void (*run)(void **, uint32_t) = nullptr;
  void *arguments[WARP];
};

struct Warp {
  uint32_t ready = 0, gone = 0, all = 0;  // lanes that could run, that have returned, that there are
  std::vector<Meeting> meetings;
};

struct Barrier {
  int expected = 0, here = 0;
  uint32_t waiting[MAX_THREADS / WARP] = {};
};

std::mutex launch_lock;
Schedule schedule = Schedule::forward;
int architecture = 80, multiprocessors = 4;

std::vector<Lane> lanes;
std::vector<Warp> warps;
Barrier barriers[BARRIERS];
Fiber first;  // the thread that launched
char *stacks = nullptr;
char *shared_room = nullptr;
bool stopped = false;
void (*kernel_call)(void *) = nullptr;
void *kernel_context = nullptr;
char message[640];
int64_t waits = 0;  // of this block for others

// One of the set bits, by the schedule.
int choose(uint32_t bits) {
  if (schedule == Schedule::forward) return __builtin_ctz(bits);
  if (schedule == Schedule::reverse) return 31 - __builtin_clz(bits);
  const unsigned turn = random_number() & 31;
  const uint32_t turned = turn == 0 ? bits : bits >> turn | bits << (32 - turn);
  return int((unsigned(__builtin_ctz(turned)) + turn) & 31);
}

void leave() {
  stopped = true;
  switch_fiber(lanes[current->id].fiber, first, true);
  std::abort();
}

// Nobody can go on: says who waits for what.
void report_deadlock() {
  std::string text;
  for (size_t w = 0; w < warps.size(); w++) {
    for (const Meeting &m : warps[w].meetings) {
      text += "; warp " + std::to_string(w) + ": lanes " + lanes_of(m.here) + " of " + lanes_of(m.mask) + " at " + m.instruction;
    }
    for (int b = 0; b < BARRIERS; b++) {
      if (barriers[b].waiting[w] == 0) continue;
      text += "; warp " + std::to_string(w) + ": lanes " + lanes_of(barriers[b].waiting[w]) + " at barrier " + std::to_string(b) +
              " (" + std::to_string(barriers[b].here) + " of " + std::to_string(barriers[b].expected) + " threads)";
    }
    if (warps[w].gone != 0) text += "; warp " + std::to_string(w) + ": lanes " + lanes_of(warps[w].gone) + " have returned";
    if (text.size() > 300) break;
  }
  text += hopper_waits();
  std::snprintf(message, sizeof message, "emulator: block (%u, %u, %u): deadlock%s", block.index.x, block.index.y, block.index.z,
                text.c_str());
}

// Goes on with a fiber that can run; returns when the caller's turn has come again (never, when it has returned).
void next() {
  Lane &self = lanes[current->id];
  unsigned w = self.warp;
  if (warps[w].ready == 0) {
    uint32_t busy = 0;
    for (unsigned i = 0; i < warps.size(); i++) busy |= uint32_t(warps[i].ready != 0) << i;
    if (busy == 0) {
      bool waits = false;
      for (const Warp &warp : warps) waits = waits || warp.gone != warp.all;
      if (waits) {
        report_deadlock();
        leave();
      }
      switch_fiber(self.fiber, first, true);
    }
    w = unsigned(choose(busy));
  }
  Lane &other = lanes[w * WARP + unsigned(choose(warps[w].ready))];
  warps[w].ready &= ~(1u << other.lane);
  if (&other == &self) return;
  current = &other;
  const bool gone = warps[self.warp].gone >> self.lane & 1;
  switch_fiber(self.fiber, other.fiber, gone);
}

// The same, over all warps.
void next_anywhere() {
  uint32_t busy = 0;
  for (unsigned i = 0; i < warps.size(); i++) busy |= uint32_t(warps[i].ready != 0) << i;
  Lane &self = lanes[current->id];
  const unsigned w = unsigned(choose(busy));
  Lane &other = lanes[w * WARP + unsigned(choose(warps[w].ready))];
  warps[w].ready &= ~(1u << other.lane);
  if (&other == &self) return;
  current = &other;
  switch_fiber(self.fiber, other.fiber);
}

void begin() {
  arrived();
  kernel_call(kernel_context);
  hopper_thread_returns();
  Warp &warp = warps[current->warp];
  warp.gone |= 1u << current->lane;
  next();
  std::abort();
}

void lay_out_shared(size_t bytes) {
  if (shared_room == nullptr) {
    void *room = mmap(nullptr, 2 * GUARD + MAX_SHARED + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED) std::abort();
    shared_room = static_cast<char *>(room);
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(shared_room, 2 * GUARD + MAX_SHARED + 4096);
#endif
  std::memset(shared_room, FENCE, GUARD);
  std::memset(shared_room + GUARD, 0xff, bytes);
  std::memset(shared_room + GUARD + bytes, FENCE, GUARD);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(shared_room, GUARD);
  __asan_poison_memory_region(shared_room + GUARD + bytes, GUARD);
#endif
  block.shared = shared_room + GUARD;
  block.shared_bytes = bytes;
}

bool fences_stand() {
  const size_t bytes = block.shared_bytes;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(shared_room, 2 * GUARD + MAX_SHARED + 4096);
#endif
  for (size_t i = 0; i < 2 * GUARD; i++) {
    const size_t at = i < GUARD ? i : i + bytes;
    if (static_cast<unsigned char>(shared_room[at]) == FENCE) continue;
    std::snprintf(message, sizeof message,
                  "emulator: block (%u, %u, %u): out of bounds: byte %lld of %lld bytes of shared memory was written",
                  block.index.x, block.index.y, block.index.z, (long long)at - (long long)GUARD, (long long)bytes);
    return false;
  }
  return true;
}

void run_block(uint3 index) {
  block.index = index;
  lay_out_shared(block.shared_bytes);
  hopper_block_begins();
  waits = 0;
  warps.assign((block.threads + WARP - 1) / WARP, Warp());
  for (Barrier &b : barriers) b = Barrier();
  for (unsigned i = 0; i < block.threads; i++) {
    Lane &lane = lanes[i];
    lane.id = i, lane.warp = i / WARP, lane.lane = i % WARP;
    lane.index = {i % block.dim.x, i / block.dim.x % block.dim.y, i / (block.dim.x * block.dim.y)};
    lane.groups.clear(), lane.open.clear();
    prepare(lane.fiber, stacks + i * STACK + 4096, STACK - 4096, &begin);
    warps[lane.warp].ready |= 1u << lane.lane;
  }
  for (Warp &w : warps) w.all = w.ready;
  uint32_t busy = warps.size() == 32 ? EVERYONE : (1u << warps.size()) - 1;
  const unsigned w = unsigned(choose(busy)), l = unsigned(choose(warps[w].ready));
  warps[w].ready &= ~(1u << l);
  current = &lanes[w * WARP + l];
  switch_fiber(first, lanes[current->id].fiber);
  current = nullptr;
  if (!fences_stand()) stopped = true;
}

void finish(const std::vector<Copy> &copies) {
  for (const Copy &c : copies) std::memcpy(shared_at(c.address, c.bytes, c.bytes, "cp.async"), c.data, c.bytes);
}

}  // namespace

// ---- what kernels call ------------------------------------------------------------------------------------------------------

void stop(const char *format, ...) {
  int at = std::snprintf(message, sizeof message, "emulator: block (%u, %u, %u), thread %u (warp %u, lane %u): ", block.index.x,
                         block.index.y, block.index.z, current->id, current->warp, current->lane);
  va_list args;
  va_start(args, format);
  std::vsnprintf(message + at, sizeof message - size_t(at), format, args);
  va_end(args);
  leave();
  std::abort();
}

void stop_shuffle(int lane, uint32_t mask) { stop("shfl reads lane %d, which is not one of %s", lane, lanes_of(mask).c_str()); }

void sleep_in(Waiting &waiting) {
  waiting.lanes[current->warp] |= 1u << current->lane;
  next();
}

void wake(Waiting &waiting) {
  for (size_t w = 0; w < warps.size(); w++) warps[w].ready |= waiting.lanes[w];
  waiting = Waiting();
}

Schedule running_schedule() { return schedule; }

void give_way() {
  warps[current->warp].ready |= 1u << current->lane;
  uint32_t others = 0;
  for (unsigned i = 0; i < warps.size(); i++) others |= uint32_t(i != current->warp && warps[i].ready != 0) << i;
  if (others == 0) return next();
  Lane &self = lanes[current->id];
  const unsigned w = unsigned(choose(others));
  Lane &other = lanes[w * WARP + unsigned(choose(warps[w].ready))];
  warps[w].ready &= ~(1u << other.lane);
  current = &other;
  switch_fiber(self.fiber, other.fiber);
}

void wait_for_blocks() {
  if (++waits > 1000000) stop("the block waits for one that runs after it");
  give_way();
}

void together(const char *instruction, uint32_t mask, void *argument, void (*run)(void **, uint32_t)) {
  Warp &warp = warps[current->warp];
  const uint32_t bit = 1u << current->lane;
  if (!(mask & bit)) stop("%s: the mask %08x lacks the lane itself", instruction, mask);
  if (mask & ~warp.all)
    mask == EVERYONE ? mask = warp.all : (stop("%s: the mask %08x has lanes that the block lacks", instruction, mask), 0);
  size_t at = 0;
  for (; at < warp.meetings.size(); at++) {
    const Meeting &m = warp.meetings[at];
    if (m.mask == mask && m.run == run && std::strcmp(m.instruction, instruction) == 0) break;
    if (m.mask & mask) {
      stop("%s of lanes %s, while lanes %s wait at %s of lanes %s", instruction, lanes_of(mask).c_str(), lanes_of(m.here).c_str(),
           m.instruction, lanes_of(m.mask).c_str());
    }
  }
  if (at == warp.meetings.size()) {
    warp.meetings.emplace_back();
    warp.meetings[at].instruction = instruction, warp.meetings[at].mask = mask, warp.meetings[at].run = run;
  }
  Meeting &m = warp.meetings[at];
  m.here |= bit;
  m.arguments[current->lane] = argument;
  if (m.here == mask) {
    run(m.arguments, mask);
    warp.ready |= mask;
    warp.meetings.erase(warp.meetings.begin() + long(at));
    if (schedule == Schedule::shuffled && (random_number() & 3) == 0) return next_anywhere();
  }
  next();
}

void barrier(int id, int threads, bool wait) {
  if (id < 0 || id >= BARRIERS) stop("barrier %d: a block has barriers 0 to %d", id, BARRIERS - 1);
  if (threads <= 0 || (threads % WARP != 0 && threads != int(block.threads)) || threads > int(block.threads)) {
    stop("barrier %d for %d threads: a multiple of 32 up to the block's %u is needed", id, threads, block.threads);
  }
  Barrier &b = barriers[id];
  if (b.here != 0 && b.expected != threads) stop("barrier %d for %d threads: others wait at it for %d", id, threads, b.expected);
  b.expected = threads;
  b.here++;
  if (wait) b.waiting[current->warp] |= 1u << current->lane;
  if (b.here == threads) {
    statistics.barriers++;
    for (size_t w = 0; w < warps.size(); w++) warps[w].ready |= b.waiting[w];
    b = Barrier();
    if (wait) next_anywhere();
  } else if (wait) {
    next();
  }
}

uint32_t ballot(uint32_t mask, bool predicate) {
  Vote v{predicate, 0};
  together("vote", mask, &v, [](void **arguments, uint32_t lanes) {
    uint32_t result = 0;
    for (int i = 0; i < WARP; i++) {
      if ((lanes >> i & 1) && static_cast<Vote *>(arguments[i])->predicate) result |= 1u << i;
    }
    for (int i = 0; i < WARP; i++) {
      if (lanes >> i & 1) static_cast<Vote *>(arguments[i])->result = result;
    }
  });
  return v.result;
}

uint32_t shared_address(const void *pointer) {
  const char *p = static_cast<const char *>(pointer);
  if (p < block.shared - GUARD || p > block.shared + block.shared_bytes + GUARD)
    stop("%p is not an address of shared memory", pointer);
  return uint32_t(p - block.shared);
}

char *shared_at(uint32_t address, size_t bytes, size_t alignment, const char *instruction) {
  if (address % alignment != 0) stop("%s: shared address %u is not a multiple of %d", instruction, address, int(alignment));
  if (size_t(address) + bytes > block.shared_bytes) {
    stop("%s: out of bounds: shared bytes %d to %d of %d", instruction, int(address), int(address + bytes),
         int(block.shared_bytes));
  }
  return block.shared + address;
}

void cp_async(uint32_t address, const void *global, size_t bytes, size_t copied) {
  char *to = shared_at(address, bytes, bytes, "cp.async");
  if (copied > 0 && reinterpret_cast<uintptr_t>(global) % bytes != 0) {
    stop("cp.async: global address %p is not a multiple of %d", global, int(bytes));
  }
  Copy copy{address, uint32_t(bytes), {}};
  if (copied > 0) std::memcpy(copy.data, global, copied);
  std::memset(to, 0xff, bytes);
  lanes[current->id].open.push_back(copy);
  statistics.cp_async++;
}

void cp_async_commit() {
  Lane &lane = lanes[current->id];
  lane.groups.push_back(std::move(lane.open));
  lane.open.clear();
}

void cp_async_wait(int groups_left) {
  Lane &lane = lanes[current->id];
  if (groups_left < 0) {  // cp.async.wait_all
    for (const auto &group : lane.groups) finish(group);
    lane.groups.clear();
    finish(lane.open);
    lane.open.clear();
    return;
  }
  while (lane.groups.size() > size_t(groups_left)) {
    finish(lane.groups.front());
    lane.groups.erase(lane.groups.begin());
  }
}

// ---- what the host calls ----------------------------------------------------------------------------------------------------

void set_schedule(Schedule chosen, uint64_t seed) {
  std::lock_guard<std::mutex> lock(launch_lock);
  schedule = chosen;
  random_state = seed * 2 + 1;
}

void set_card(int capability, int processors) { architecture = capability, multiprocessors = processors; }
int card_architecture() { return architecture; }
int card_multiprocessors() { return multiprocessors; }

int run(dim3 grid, dim3 dim, size_t shared_bytes, void (*call)(void *), void *context) {
  std::lock_guard<std::mutex> lock(launch_lock);
  const size_t threads = size_t(dim.x) * dim.y * dim.z, blocks = size_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > MAX_THREADS || blocks == 0 || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu) {
    return fail(EP_DEVICE_ERROR, "emulator: a launch of (%u, %u, %u) blocks of (%u, %u, %u) threads is impossible", grid.x, grid.y,
                grid.z, dim.x, dim.y, dim.z);
  }
  const size_t most = size_t(cuda::block_shared(architecture));
  if (shared_bytes > most) {
    return fail(EP_DEVICE_ERROR, "emulator: %lld bytes of shared memory; a block of architecture %d has %lld",
                (long long)shared_bytes, architecture, (long long)most);
  }
  if (stacks == nullptr) {
    void *room = mmap(nullptr, MAX_THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) return fail(EP_OUT_OF_MEMORY, "emulator: no memory for stacks");
    stacks = static_cast<char *>(room);
    for (int i = 0; i < MAX_THREADS; i++) mprotect(stacks + i * STACK, 4096, PROT_NONE);  // a stack that overflows stops here
    lanes.resize(MAX_THREADS);
  }
  block.dim = dim, block.grid = grid, block.threads = unsigned(threads), block.shared_bytes = shared_bytes;
  kernel_call = call, kernel_context = context;
  stopped = false;
  statistics.launches++, statistics.threads += int64_t(threads * blocks);
  const size_t step = schedule == Schedule::shuffled ? size_t(random_number()) % blocks : 0;  // where a random order begins
  for (size_t i = 0; i < blocks && !stopped; i++) {
    const size_t b = schedule == Schedule::reverse ? blocks - 1 - i : (i + step) % blocks;
    run_block({unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)});
  }
  return stopped ? fail(EP_DEVICE_ERROR, "%s", message) : EP_OK;
}

}  // namespace emulator
}  // namespace ep
