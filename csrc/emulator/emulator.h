// A host twin of the CUDA execution model, for tests: the sources of csrc/cuda compiled by the host compiler run here.
//
// A thread is a fiber with a stack of its own. Blocks run one after another; in a block one fiber runs at a time, until it waits
// for others: lanes of its warp (shuffle, vote, ldmatrix, mma, syncwarp) or a barrier. Which fiber runs next is the schedule's
// choice, and none of the choices that the hardware could make is excluded by the model; a kernel that needs a barrier it does not
// have reads what is not yet there under at least one schedule:
//   forward   the warp (and lane, and block) of the lowest number goes as far as it can
//   reverse   the one of the highest number does
//   shuffled  a random one does, and a warp may lose its turn after any collective instruction
// Shared memory starts as NaN (all ones) between two guard bands. cp.async writes NaN at once and the data when its thread waits
// for it. A wrong use stops the launch with a message that names block, thread, warp and lane.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace ep {
namespace emulator {

enum class Schedule { forward, reverse, shuffled };
void set_schedule(Schedule schedule, uint64_t seed);

// What launches since the last call did: a conflict is an extra pass over the banks of shared memory that an ldmatrix needs.
struct Statistics {
  int64_t launches, threads, mma, ldmatrix, ldmatrix_conflicts, cp_async, barriers, wgmma, tma;
};
extern Statistics statistics;

// The card that csrc/cuda sees (device.h): compute capability and multiprocessors.
void set_card(int architecture, int multiprocessors);
int card_architecture();
int card_multiprocessors();

constexpr int WARP = 32, MAX_THREADS = 1024, BARRIERS = 16;
constexpr size_t MAX_SHARED = 232448;  // bytes of a block on sm_90

struct Thread {
  uint3 index;
  unsigned id, warp, lane;
};
struct Block {
  uint3 index;
  dim3 dim, grid;
  unsigned threads;
  char *shared;
  size_t shared_bytes;
};
extern Thread *current;  // the thread that runs
extern Block block;      // ... and its block

// Stops the launch: the message begins with the thread that runs.
[[noreturn]] void stop(const char *format, ...) __attribute__((format(printf, 1, 2)));

// Threads that sleep until another one wakes them.
struct Waiting {
  uint32_t lanes[MAX_THREADS / WARP] = {};
};
void sleep_in(Waiting &waiting);
void wake(Waiting &waiting);

Schedule running_schedule();
uint32_t random_number();
std::string lanes_of(uint32_t mask);

// Lets other warps run: for loops that wait.
void give_way();
// The same, when a block waits for another one: blocks run one after the other, so what has not come soon will never come.
void wait_for_blocks();

// All lanes of `mask` meet here; the last to come calls run(arguments by lane, mask) for all of them.
void together(const char *instruction, uint32_t mask, void *argument, void (*run)(void **arguments, uint32_t mask));

// bar.sync (wait) and bar.arrive of barrier `id` for `threads` threads.
void barrier(int id, int threads, bool wait);

// Shared memory as the instructions see it: 32-bit addresses, checked.
uint32_t shared_address(const void *pointer);
char *shared_at(uint32_t address, size_t bytes, size_t alignment, const char *instruction);

void cp_async(uint32_t address, const void *global, size_t bytes, size_t copied);
void cp_async_commit();
void cp_async_wait(int groups_left);

struct Vote {
  bool predicate;
  uint32_t result;
};
uint32_t ballot(uint32_t mask, bool predicate);

[[noreturn]] void stop_shuffle(int lane, uint32_t mask);

template <class T>
T shuffle(uint32_t mask, T value, int source) {
  struct Argument {
    T value, result;
    int source;
  } a{value, value, source};
  if (!(mask >> source & 1)) stop_shuffle(source, mask);
  together("shfl", mask, &a, [](void **arguments, uint32_t lanes) {
    for (int i = 0; i < WARP; i++) {
      if (!(lanes >> i & 1)) continue;
      Argument *mine = static_cast<Argument *>(arguments[i]);
      mine->result = static_cast<Argument *>(arguments[mine->source])->value;
    }
  });
  return a.result;
}

template <class T, class Combine>
T reduce(uint32_t mask, T value, Combine combine) {
  T total{};
  bool first = true;
  for (int i = 0; i < WARP; i++) {
    if (!(mask >> i & 1)) continue;
    const T v = shuffle(mask, value, i);
    total = first ? v : combine(total, v);
    first = false;
  }
  return total;
}

// Runs call(context) in every thread of every block; an ep status, with the message in ep_last_error().
int run(dim3 grid, dim3 block, size_t shared_bytes, void (*call)(void *), void *context);

}  // namespace emulator
}  // namespace ep
