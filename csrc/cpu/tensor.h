// A checked view of a DLTensor, and the checks that fill it. Used only by the extern "C" functions; kernels get plain pointers.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "enginepost/core.h"

namespace ep {

enum Dtype : unsigned { F32 = 1, BF16 = 2, I32 = 4, I64 = 8, U8 = 16, F16 = 32 };
constexpr unsigned FLOATS = F32 | BF16;
// Added to the dtypes of an argument that may lie on a GPU: its family has CUDA kernels. There BF16 stands for F16 too.
constexpr unsigned GPU = 1u << 16;

struct Tensor {
  char *data = nullptr;
  unsigned dtype = 0;
  DLDevice device = {kDLCPU, 0};
  int64_t size = 0;
  int64_t shape[4] = {};
  int64_t stride[4] = {};  // elements
  bool contiguous = true;
  explicit operator bool() const { return data != nullptr; }
};

// Writes the thread's error message and returns `status`.
int fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

// Fills `out` or writes an error and returns false: device, dtype, rank, strides, alignment.
bool view(Tensor &out, const DLTensor *t, const char *fn, const char *name, int ndim, unsigned dtypes);

// EP_INVALID_ARGUMENT unless all of them are on one device; empty views (arguments not given) count for nothing.
int check_one_device(const char *fn, std::initializer_list<const Tensor *> tensors);

// EP_INVALID_ARGUMENT when a result lies over integers that say where to read: once overwritten, the checked indices are wild ones.
// An empty view (an optional argument that was not given) overlaps nothing.
int check_apart(const char *fn, const char *result_name, const Tensor &result, const char *index_name, const Tensor &index);

}  // namespace ep

#if defined(EP_API) || defined(EP_EMULATED) || defined(__CUDACC__)
namespace ep {
// Hands out parts of a workspace, each on a cache line of its own; with a null workspace it only counts.
struct Carver {
  char *base;
  int64_t bytes = 0;
  template <class T>
  T *take(int64_t count) {
    T *part = base == nullptr ? nullptr : reinterpret_cast<T *>(base + bytes);
    bytes += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return part;
  }
};
}  // namespace ep
#endif

// Inside an extern "C" function that has `const char *fn`.
#define EP_VIEW(out, t, ndim, dtypes) \
  ep::Tensor out;                     \
  if (!ep::view(out, t, fn, #t, ndim, dtypes)) return EP_INVALID_ARGUMENT
#define EP_VIEW_OPTIONAL(out, t, ndim, dtypes) \
  ep::Tensor out;                              \
  if (t != nullptr && !ep::view(out, t, fn, #t, ndim, dtypes)) return EP_INVALID_ARGUMENT
#define EP_REQUIRE(condition, ...) \
  if (!(condition)) return ep::fail(EP_INVALID_ARGUMENT, __VA_ARGS__)
