// A stack and the place where its computation stopped. Switching costs a few nanoseconds where there is assembly for it (x86-64 and
// arm64 with ELF), and a system call (swapcontext) elsewhere. AddressSanitizer is told of every switch.
#pragma once

#include <cstddef>

#if defined(__ELF__) && (defined(__x86_64__) || defined(__aarch64__))
#define EP_FIBER_ASM 1
#else
#define EP_FIBER_ASM 0
#include <ucontext.h>
#endif

namespace ep {
namespace emulator {

struct Fiber {
  char *stack = nullptr;  // null: the thread that started it all
  size_t bytes = 0;
  void *top = nullptr;  // stack pointer while it does not run
  void *fake_stack = nullptr;
#if !EP_FIBER_ASM
  ucontext_t context;
#endif
};

// `fiber` will begin with entry() on stack [stack, stack + bytes), which must never return.
void prepare(Fiber &fiber, char *stack, size_t bytes, void (*entry)());
// Stops in `from` and goes on in `to`; `last`: `from` will never go on.
void switch_fiber(Fiber &from, Fiber &to, bool last = false);
// The first thing that an entry does.
void arrived();

}  // namespace emulator
}  // namespace ep
