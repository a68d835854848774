// What the kernels share at run time: the last error, the choice of instruction set, the threads.
#include <atomic>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "enginepost/core.h"
#include "isa.h"
#include "parallel.h"
#include "tensor.h"
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace ep {

// ---- errors -----------------------------------------------------------------------------------------------------------------

static thread_local char last_error[512] = "";

int fail(int status, const char *format, ...) {
  va_list args;
  va_start(args, format);
  std::vsnprintf(last_error, sizeof last_error, format, args);
  va_end(args);
  return status;
}

// ---- instruction set --------------------------------------------------------------------------------------------------------

static Isa best_isa() {
#if defined(EP_X86)
  __builtin_cpu_init();
#if !defined(EP_EMULATE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
  }
#endif
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
#if defined(EP_EMULATE_AVX512)
    return Isa::avx512;
#else
    return Isa::avx2;
#endif
  }
#endif
  return Isa::portable;
}

static std::atomic<int> isa_override{-1};

Isa cpu_isa() {
  static const Isa chosen = [] {
    Isa best = best_isa();
    const char *wish = std::getenv("ENGINEPOST_CPU");
    if (wish == nullptr || *wish == 0 || std::strcmp(wish, "avx512") == 0) return best;
    Isa limit = std::strcmp(wish, "avx2") == 0 ? Isa::avx2 : Isa::portable;
    if (limit == Isa::portable && std::strcmp(wish, "portable") != 0) {
      std::fprintf(stderr, "enginepost: ENGINEPOST_CPU=%s is not one of avx512, avx2, portable; using portable\n", wish);
    }
    return limit < best ? limit : best;
  }();
  const int other = isa_override.load(std::memory_order_relaxed);
  return other < 0 ? chosen : Isa(other);
}

static const char *isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512bf16: return "avx512bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

// ---- threads ----------------------------------------------------------------------------------------------------------------

namespace {

struct Job {
  int64_t tasks;
  void (*fn)(void *, int64_t, int);
  void *context;
  std::atomic<int64_t> next{0};
  std::atomic<int> thread{0};
};

void work(void *p) {
  Job &job = *static_cast<Job *>(p);
  int thread = job.thread.fetch_add(1, std::memory_order_relaxed);
  for (;;) {
    int64_t task = job.next.fetch_add(1, std::memory_order_relaxed);
    if (task >= job.tasks) return;
    job.fn(job.context, task, thread);
  }
}

std::atomic<int> thread_count{0};
using GompParallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
std::atomic<GompParallel> gomp_parallel{nullptr};
thread_local bool inside = false;

// The pool for processes without OpenMP: workers sleep on a condition variable between jobs, and are never joined, because a static
// destructor that waits for threads can hang at exit.
class Pool {
 public:
  void run(Job &job, int threads) {
    std::lock_guard<std::mutex> turn(turn_);  // one job at a time
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (int(workers_) < threads - 1) {
        std::thread([this, index = workers_] { loop(index); }).detach();
        workers_++;
      }
      job_ = &job;
      wanted_ = threads - 1;
      running_ = wanted_;
      epoch_++;
    }
    wake_.notify_all();
    work(&job);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    job_ = nullptr;
  }

 private:
  void loop(int index) {
    inside = true;
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return epoch_ != seen && index < wanted_; });
      seen = epoch_;
      Job *job = job_;
      lock.unlock();
      work(job);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }
  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  Job *job_ = nullptr;
  uint64_t epoch_ = 0;
  int workers_ = 0, wanted_ = 0, running_ = 0;
};

std::atomic<Pool *> the_pool{nullptr};

Pool &pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    the_pool = new Pool;  // leaked on purpose, see above
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, [] { the_pool = new Pool; });  // a forked child has none of the workers
#endif
  });
  return *the_pool;
}

}  // namespace

int num_threads() {
  int n = thread_count.load(std::memory_order_relaxed);
  if (n > 0) return n;
  unsigned cores = std::thread::hardware_concurrency();
  return cores ? int(cores) : 1;
}

void run_tasks(int64_t tasks, void (*fn)(void *, int64_t, int), void *context) {
  int threads = num_threads();
  if (threads > tasks) threads = int(tasks);
  if (threads <= 1 || inside) {
    for (int64_t task = 0; task < tasks; task++) fn(context, task, 0);
    return;
  }
  Job job;
  job.tasks = tasks;
  job.fn = fn;
  job.context = context;
  inside = true;
  if (GompParallel start = gomp_parallel.load(std::memory_order_relaxed)) {
    start(&work, &job, unsigned(threads), 0);
  } else {
    pool().run(job, threads);
  }
  inside = false;
}

// ---- tensors ----------------------------------------------------------------------------------------------------------------

static unsigned dtype_bit(DLDataType t) {
  if (t.lanes != 1) return 0;
  if (t.code == kDLFloat && t.bits == 32) return F32;
  if (t.code == kDLBfloat && t.bits == 16) return BF16;
  if (t.code == kDLFloat && t.bits == 16) return F16;
  if (t.code == kDLInt && t.bits == 32) return I32;
  if (t.code == kDLInt && t.bits == 64) return I64;
  if (t.code == kDLUInt && t.bits == 8) return U8;
  return 0;
}

static std::string dtype_names(unsigned mask) {
  std::string out;
  const char *names[] = {"float32", "bfloat16", "int32", "int64", "uint8", "float16"};
  for (int i = 0; i < 6; i++) {
    if (mask & (1u << i)) out += (out.empty() ? "" : " or ") + std::string(names[i]);
  }
  return out;
}

static std::string shape_of(const DLTensor *t) {
  std::string out = "(";
  for (int i = 0; i < t->ndim; i++) out += (i ? ", " : "") + std::to_string(t->shape[i]);
  return out + ")";
}

bool view(Tensor &out, const DLTensor *t, const char *fn, const char *name, int ndim, unsigned dtypes) {
  if (t == nullptr) return fail(EP_INVALID_ARGUMENT, "%s: %s is missing", fn, name), false;
  const bool gpu = on_gpu(t->device);
  if (t->device.device_type != kDLCPU && !(gpu && (dtypes & GPU))) {
    const bool lacks = t->device.device_type == kDLCUDA && (dtypes & GPU);
    return fail(EP_INVALID_ARGUMENT, "%s: %s must be in CPU memory%s, got device type %d", fn, name,
                lacks ? " (this build has no CUDA kernels)" : "", int(t->device.device_type)),
           false;
  }
  if (gpu && (dtypes & GPU) && (dtypes & BF16)) dtypes |= F16;
  unsigned bit = dtype_bit(t->dtype);
  if (!(bit & dtypes)) {
    return fail(EP_INVALID_ARGUMENT, "%s: %s must be %s, got DLPack dtype code %d with %d bits and %d lanes", fn, name,
                dtype_names(dtypes).c_str(), int(t->dtype.code), int(t->dtype.bits), int(t->dtype.lanes)),
           false;
  }
  if (t->ndim == ndim && ndim > 0 && t->shape == nullptr) return fail(EP_INVALID_ARGUMENT, "%s: %s has no shape", fn, name), false;
  if (t->ndim != ndim) {
    return fail(EP_INVALID_ARGUMENT, "%s: %s must have %d dimensions, got %d", fn, name, ndim, int(t->ndim)), false;
  }
  out.dtype = bit;
  out.device = t->device;
  out.size = 1;
  out.contiguous = true;
  for (int i = 0; i < ndim; i++) {
    out.shape[i] = t->shape[i];
    if (t->shape[i] < 0 || (t->shape[i] && out.size > (int64_t(1) << 56) / t->shape[i])) {
      return fail(EP_INVALID_ARGUMENT, "%s: %s has an impossible shape %s", fn, name, shape_of(t).c_str()), false;
    }
    out.size *= t->shape[i];
  }
  int64_t packed = 1;
  for (int i = ndim - 1; i >= 0; i--) {
    out.stride[i] = t->strides ? t->strides[i] : packed;
    if (t->shape[i] != 1 && out.stride[i] != packed) out.contiguous = false;
    if (t->shape[i] == 1) out.stride[i] = packed;
    packed *= t->shape[i];
    if (out.stride[i] < 0) return fail(EP_INVALID_ARGUMENT, "%s: %s has a negative stride", fn, name), false;
  }
  if (out.size == 0) out.contiguous = true;
  if (ndim > 0 && out.size > 0 && out.stride[ndim - 1] != 1) {
    return fail(EP_INVALID_ARGUMENT, "%s: the last dimension of %s must be contiguous, its stride is %lld", fn, name,
                (long long)out.stride[ndim - 1]),
           false;
  }
  out.data = static_cast<char *>(t->data) + t->byte_offset;
  if (out.size > 0 && t->data == nullptr) return fail(EP_INVALID_ARGUMENT, "%s: %s has no data", fn, name), false;
  uintptr_t align = bit == I64 ? 8 : bit == BF16 || bit == F16 ? 2 : bit == U8 ? 1 : 4;
  if (out.size > 0 && reinterpret_cast<uintptr_t>(out.data) % align) {
    return fail(EP_INVALID_ARGUMENT, "%s: the data of %s is not aligned to its element size", fn, name), false;
  }
  return true;
}

int check_one_device(const char *fn, std::initializer_list<const Tensor *> tensors) {
  const Tensor *first = nullptr;
  for (const Tensor *t : tensors) {
    if (t->data == nullptr) continue;
    if (first == nullptr) first = t;
    EP_REQUIRE(t->device.device_type == first->device.device_type && t->device.device_id == first->device.device_id,
               "%s: its tensors are on different devices", fn);
  }
  return EP_OK;
}

// One past the last byte of a view.
static const char *end_of(const Tensor &t) {
  int64_t last = 0;
  for (int i = 0; i < 4; i++) last += t.shape[i] > 1 ? (t.shape[i] - 1) * t.stride[i] : 0;
  const int64_t bytes = t.dtype == U8 ? 1 : t.dtype == BF16 || t.dtype == F16 ? 2 : t.dtype == I64 ? 8 : 4;
  return t.data + (last + 1) * bytes;
}

int check_apart(const char *fn, const char *result_name, const Tensor &result, const char *index_name, const Tensor &index) {
  const bool apart = result.data == nullptr || index.data == nullptr || result.size == 0 || index.size == 0 ||
                     end_of(result) <= index.data || end_of(index) <= result.data;
  EP_REQUIRE(apart, "%s: %s lies over %s in memory", fn, result_name, index_name);
  return EP_OK;
}

}  // namespace ep

// ---- C API ------------------------------------------------------------------------------------------------------------------

extern "C" {

const char *ep_last_error(void) { return ep::last_error; }
const char *ep_cpu_isa(void) { return ep::isa_name(ep::cpu_isa()); }

int ep_has_cuda(void) {
#if defined(EP_CUDA)
  return 1;
#else
  return 0;
#endif
}

const char *ep_cpu_isas(void) {
  static const std::string all = [] {
    std::string out;
    for (int i = int(ep::best_isa()); i >= 0; i--) out += (out.empty() ? "" : ",") + std::string(ep::isa_name(ep::Isa(i)));
    return out;
  }();
  return all.c_str();
}

int ep_set_cpu_isa(const char *name) {
  if (name == nullptr) {
    ep::isa_override.store(-1);
    return EP_OK;
  }
  for (int i = int(ep::best_isa()); i >= 0; i--) {
    if (std::strcmp(name, ep::isa_name(ep::Isa(i))) == 0) {
      ep::isa_override.store(i);
      return EP_OK;
    }
  }
  return ep::fail(EP_INVALID_ARGUMENT, "set_cpu_isa: %.40s is not one of %s", name, ep_cpu_isas());
}

void ep_set_num_threads(int threads) { ep::thread_count.store(threads > 0 ? threads : 0); }
int ep_num_threads(void) { return ep::num_threads(); }
void ep_use_openmp(void *gomp_parallel) { ep::gomp_parallel.store(reinterpret_cast<ep::GompParallel>(gomp_parallel)); }
}
