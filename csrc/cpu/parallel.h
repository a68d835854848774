// Work sharing. A kernel splits its work into tasks whose number depends on the shapes alone; which thread runs a task never
// changes a result, so the answer is the same at any thread count.
#pragma once

#include <cstdint>
#include <type_traits>

namespace ep {
int num_threads();
// Runs fn(context, task, thread) for every task in [0, tasks), thread < num_threads().
void run_tasks(int64_t tasks, void (*fn)(void *context, int64_t task, int thread), void *context);
}  // namespace ep

#ifdef EP_ISA
namespace ep {
namespace EP_ISA {
// body(task, thread)
template <class Body>
static inline void parallel_for(int64_t tasks, Body &&body) {
  struct Local {
    static void call(void *context, int64_t task, int thread) {
      (*static_cast<typename std::remove_reference<Body>::type *>(context))(task, thread);
    }
  };
  run_tasks(tasks, &Local::call, const_cast<void *>(static_cast<const void *>(&body)));
}
}  // namespace EP_ISA
}  // namespace ep
#endif
