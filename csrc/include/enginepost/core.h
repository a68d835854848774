/* enginepost C API: what every kernel family shares.
 *
 * Tensors come in as non-owning `const DLTensor *`. Every call checks its arguments once and returns a status; after a failure
 * ep_last_error() says, for this thread, which argument was wrong, what was wanted and what came. Nothing allocates or synchronises
 * behind the caller's back except where a function's comment says so. */
#ifndef ENGINEPOST_CORE_H_
#define ENGINEPOST_CORE_H_

#include "enginepost/dlpack.h"

#if defined(_WIN32)
#define EP_EXPORT
#else
#define EP_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum {
  EP_OK = 0,
  EP_INVALID_ARGUMENT = 1, /* a tensor or parameter is not what the function takes */
  EP_UNSUPPORTED = 2,      /* valid, but no kernel here does it */
  EP_OUT_OF_MEMORY = 3,
  EP_DEVICE_ERROR = 4 /* the GPU or its driver refused */
};

/* The message of this thread's last failed call; "" when none failed. Valid until the thread's next call. */
EP_EXPORT const char *ep_last_error(void);

/* Instruction set in use: "avx512bf16", "avx512", "avx2" or "portable". The environment variable ENGINEPOST_CPU
 * (avx512 | avx2 | portable) lowers the choice; it is read once, at first use. */
EP_EXPORT const char *ep_cpu_isa(void);
/* All that this build holds and this CPU runs, comma separated, best first. */
EP_EXPORT const char *ep_cpu_isas(void);
/* Choose one of ep_cpu_isas() for the whole process, to test or compare; NULL = back to the first choice. Not while kernels run. */
EP_EXPORT int ep_set_cpu_isa(const char *name);

/* 1 when this build holds CUDA kernels: then tensors of kDLCUDA are taken, and `stream` is a cudaStream_t (NULL = the default). A
 * call on them is queued, not waited for. Whether there is a GPU is not looked at before the first such call. */
EP_EXPORT int ep_has_cuda(void);

/* Threads used by CPU kernels (default: all cores). Results do not depend on it. */
EP_EXPORT void ep_set_num_threads(int threads);
EP_EXPORT int ep_num_threads(void);

/* Run CPU kernels on an OpenMP runtime that the process has already, so that two thread pools do not fight over the cores:
 * `gomp_parallel` is the address of its GOMP_parallel. NULL returns to the pool of our own. */
EP_EXPORT void ep_use_openmp(void *gomp_parallel);

#ifdef __cplusplus
}
#endif
#endif
