// See fiber.h. The assembly keeps what the calling convention asks a function to keep: the callee-saved registers and the stack.
#include "fiber.h"

#include <cstdint>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if EP_FIBER_ASM
extern "C" void ep_fiber_switch(void **save, void *load) __attribute__((visibility("hidden")));
#if defined(__x86_64__)
asm(R"(
  .text
  .hidden ep_fiber_switch
  .type ep_fiber_switch, @function
  .globl ep_fiber_switch
ep_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size ep_fiber_switch, .-ep_fiber_switch
)");
#else
asm(R"(
  .text
  .hidden ep_fiber_switch
  .type ep_fiber_switch, %function
  .globl ep_fiber_switch
ep_fiber_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size ep_fiber_switch, .-ep_fiber_switch
)");
#endif
#endif

namespace ep {
namespace emulator {

#if defined(__SANITIZE_ADDRESS__)
static Fiber *came_from = nullptr;  // the other side of the switch under way
// The stack of the thread that started it all, known once it has switched to a new fiber.
static const void *first_bottom = nullptr;
static size_t first_bytes = 0;
#endif

void arrived() {
#if defined(__SANITIZE_ADDRESS__)
  const void *bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (came_from->stack == nullptr) first_bottom = bottom, first_bytes = bytes;
#endif
}

void prepare(Fiber &fiber, char *stack, size_t bytes, void (*entry)()) {
  fiber.stack = stack;
  fiber.bytes = bytes;
  fiber.fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, bytes);  // a launch that was stopped leaves its frames behind
#endif
#if !EP_FIBER_ASM
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#elif defined(__x86_64__)
  void **top = reinterpret_cast<void **>(stack + bytes) - 8;  // six registers, the return address, and 8 bytes that align it
  std::memset(top, 0, 64);
  top[6] = reinterpret_cast<void *>(entry);
  fiber.top = top;
#else
  char *top = stack + bytes - 160;
  std::memset(top, 0, 160);
  void *address = reinterpret_cast<void *>(entry);
  std::memcpy(top + 88, &address, 8);  // x30
  fiber.top = top;
#endif
}

void switch_fiber(Fiber &from, Fiber &to, bool last) {
#if defined(__SANITIZE_ADDRESS__)
  came_from = &from;
  const bool first = to.stack == nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, first ? first_bottom : to.stack,
                                 first ? first_bytes : to.bytes);
#else
  (void)last;
#endif
#if EP_FIBER_ASM
  ep_fiber_switch(&from.top, to.top);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

}  // namespace emulator
}  // namespace ep
