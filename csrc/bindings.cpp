// The only C++ file that knows Python: DLPack capsules in, exceptions out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "enginepost/adamw.h"
#include "enginepost/attention.h"
#include "enginepost/core.h"
#include "enginepost/glu.h"
#include "enginepost/linear_kl.h"
#include "enginepost/linear_logprob.h"
#include "enginepost/lora.h"
#include "enginepost/matmul.h"
#include "enginepost/merge.h"
#include "enginepost/nf4.h"
#include "enginepost/norm.h"
#include "enginepost/rope.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

// Borrows the DLTensor of a capsule, or of anything with __dlpack__; None is a null pointer. The capsule is not consumed: its own
// destructor frees it.
class Arg {
 public:
  explicit Arg(const py::object &o) {
    if (o.is_none()) return;
    capsule_ = PyCapsule_CheckExact(o.ptr()) ? o : o.attr("__dlpack__")();
    void *p = PyCapsule_GetPointer(capsule_.ptr(), "dltensor");
    if (p == nullptr) throw py::error_already_set();
    tensor_ = &static_cast<DLManagedTensor *>(p)->dl_tensor;
  }
  operator const DLTensor *() const { return tensor_; }
  const DLTensor *operator->() const { return tensor_; }
  int rank() const { return tensor_ == nullptr ? 0 : tensor_->ndim; }

 private:
  py::object capsule_;
  const DLTensor *tensor_ = nullptr;
};

template <class Call>
void run(Call &&call) {
  int status;
  std::string message;
  {
    py::gil_scoped_release release;
    status = call();
    if (status != EP_OK) message = ep_last_error();  // of this thread: read it before another call replaces it
  }
  if (status == EP_OK) return;
  if (status == EP_INVALID_ARGUMENT) throw py::value_error(message);
  throw std::runtime_error(message);
}

// Whether a call on this tensor runs the CUDA kernels.
bool on_gpu(const Arg &a) {
#if defined(EP_EMULATED)
  return a.rank() > 0;
#else
  return a.rank() > 0 && a->device.device_type == kDLCUDA;
#endif
}

using O = const py::object &;

// The stream that calls on GPU tensors run on, and where their workspaces come from: set by enginepost/kernels/backend.py.
thread_local void *stream = nullptr;
py::object &allocator() {
  static py::object *function = new py::object;  // leaked: Python may be gone when static objects end
  return *function;
}

// A workspace for a call. On the CPU a thread keeps it between calls: it grows to the largest that was asked for and is given back
// when the thread ends. On a GPU it is torch's memory, which may be given back at once: a later use is a later one of the stream.
class Workspace {
 public:
  Workspace(int64_t bytes, const Arg &like) {
    const DLTensor *t = like;
    if (t != nullptr && t->device.device_type == kDLCUDA && bytes > 0) {
      if (!allocator()) throw std::runtime_error("no allocator for GPU workspaces was set");
      block_ = allocator()(bytes, t->device.device_id);
      data_ = reinterpret_cast<void *>(block_.attr("data_ptr")().cast<uintptr_t>());
      return;
    }
#if defined(EP_EMULATED)
    if (bytes <= 0) return;
    own_.reset(std::malloc(size_t(bytes)));  // of the exact size and full of NaN, so that a wrong use is seen
    data_ = own_.get();
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(data_, 0xff, size_t(bytes));
#else
    data_ = kept(bytes);
#endif
  }
  void *data() const { return data_; }

 private:
  struct Free {
    void operator()(void *p) const { std::free(p); }
  };
  static void *kept(int64_t bytes) {
    thread_local std::unique_ptr<void, Free> block;
    thread_local int64_t size = 0;
    if (size < bytes) {
      const int64_t rounded = (bytes + 4095) / 4096 * 4096;
      block.reset();  // first, so that both are never held at once
      block.reset(std::aligned_alloc(4096, size_t(rounded)));
      size = block ? rounded : 0;
      if (!block) throw std::bad_alloc();
    }
    return block.get();
  }
  void *data_ = nullptr;
  py::object block_;
  std::unique_ptr<void, Free> own_;
};

// A list of tensors; the capsules live as long as this does.
struct Args {
  explicit Args(const py::list &list) {
    for (const auto &o : list) args.emplace_back(py::reinterpret_borrow<py::object>(o));
    for (const Arg &a : args) tensors.push_back(a);
  }
  std::vector<Arg> args;
  std::vector<const DLTensor *> tensors;
};

// How enginepost/kernels/merge.py passes a selection: (kind, low, high, low_skip, high_keep, seen_low, seen_high, key, limit,
// scale, weight, mask).
struct Selects {
  explicit Selects(const py::list &list)
      : args([&] {
          py::list masks;
          for (const auto &o : list) masks.append(py::reinterpret_borrow<py::tuple>(o)[11]);
          return masks;
        }()) {
    size_t i = 0;
    for (const auto &o : list) {
      const py::tuple t = py::reinterpret_borrow<py::tuple>(o);
      selects.push_back({t[0].cast<int32_t>(), t[1].cast<int32_t>(), t[2].cast<int32_t>(), t[3].cast<int64_t>(),
                         t[4].cast<int64_t>(), t[5].cast<int64_t>(), t[6].cast<int64_t>(), t[7].cast<uint64_t>(),
                         t[8].cast<uint64_t>(), t[9].cast<float>(), t[10].cast<float>(), args.tensors[i++]});
    }
  }
  py::list seen() const {
    py::list out;
    for (const auto &s : selects) out.append(py::make_tuple(s.seen_low, s.seen_high));
    return out;
  }
  Args args;
  std::vector<ep_merge_select> selects;
};

// The numbers of an array of 64 bits that a kernel writes itself: on the CPU, or where `like` is.
template <class T>
T *numbers(const py::object &array, int64_t size, int code, const char *wanted, const Arg *like = nullptr) {
  const Arg a(array);
  int64_t here = a.rank() > 0 ? 1 : -1, packed = 1;
  for (int i = 0; i < a.rank(); i++) here *= a->shape[i];
  bool whole = here == size && a->dtype.code == code && a->dtype.bits == 64;
  const DLDevice device = like == nullptr || like->rank() == 0 ? DLDevice{kDLCPU, 0} : (*like)->device;
  whole = whole && a->device.device_type == device.device_type && a->device.device_id == device.device_id;
  for (int i = a.rank() - 1; whole && i >= 0; i--) {
    whole = a->strides == nullptr || a->shape[i] == 1 || a->strides[i] == packed;
    packed *= a->shape[i];
  }
  if (!whole) throw py::value_error(wanted);
  return reinterpret_cast<T *>(static_cast<char *>(a->data) + a->byte_offset);
}
int64_t parts_of(const Arg &x, int64_t block) { return x.rank() == 1 && block > 0 ? (x->shape[0] + block - 1) / block : 0; }
Workspace merge_workspace(const Arg &x, int count, int64_t values) {
  const bool gpu = x.rank() == 1 && on_gpu(x) && count <= EP_MERGE_MAX_INPUTS && x->shape[0] >= 0;
  return Workspace(gpu ? ep_merge_workspace_bytes(x->shape[0], count, values) : 0, x);
}
Workspace merge_workspace(const Args &x, int count, int64_t values) {
  return merge_workspace(x.args.empty() ? Arg(py::none()) : x.args[0], count, values);
}

}  // namespace

#if defined(EP_EMULATED)
#include "emulator/bindings.h"
PYBIND11_MODULE(_emulated, m) {
  ep::emulator::bind(m);
#else
PYBIND11_MODULE(_core, m) {
#endif
  m.doc() = "enginepost's native kernels; use enginepost.kernels instead.";

  m.attr("cuda") = ep_has_cuda() != 0;
  m.def("set_stream", [](uintptr_t address) { stream = reinterpret_cast<void *>(address); });
  m.def("set_allocator", [](const py::object &function) { allocator() = function; });

  m.def("isa", [] { return std::string(ep_cpu_isa()); });
  m.def("isas", [] {
    py::list out;
    std::string all = ep_cpu_isas();
    for (size_t at = 0; at < all.size();) {
      size_t end = all.find(',', at);
      if (end == std::string::npos) end = all.size();
      out.append(all.substr(at, end - at));
      at = end + 1;
    }
    return out;
  });
  m.def("set_isa", [](const py::object &name) {
    const std::string chosen = name.is_none() ? "" : name.cast<std::string>();
    run([&] { return ep_set_cpu_isa(name.is_none() ? nullptr : chosen.c_str()); });
  });
  m.def("set_num_threads", &ep_set_num_threads);
  static bool openmp = false;
  m.def("use_openmp", [](std::uintptr_t address) {
    ep_use_openmp(reinterpret_cast<void *>(address));
    openmp = address != 0;
  });
  m.def("uses_openmp", [] { return openmp; });

  m.def("rms_norm_forward", [](O x, O weight, O y, O rstd, double eps, double offset) {
    Arg a(x), b(weight), c(y), d(rstd);
    run([&] { return ep_rms_norm_forward(a, b, c, d, eps, offset, stream); });
  });
  m.def("add_rms_norm_forward", [](O x, O residual, O weight, O y, O h, O rstd, double eps, double offset) {
    Arg a(x), b(residual), c(weight), d(y), e(h), f(rstd);
    run([&] { return ep_add_rms_norm_forward(a, b, c, d, e, f, eps, offset, stream); });
  });
  m.def("rms_norm_backward", [](O dy, O dh, O x, O weight, O rstd, O dx, O dweight, double offset) {
    Arg a(dy), b(dh), c(x), d(weight), e(rstd), f(dx), g(dweight);
    int64_t bytes = 0;
    if (g.rank() > 0 && c.rank() == 2) bytes = ep_rms_norm_backward_workspace_bytes(c->shape[0], c->shape[1]);
    const Workspace workspace(bytes, c);
    run([&] { return ep_rms_norm_backward(a, b, c, d, e, f, g, workspace.data(), offset, stream); });
  });

  m.def("attention_forward", [](O q, O k, O v, O cu_seqlens, O cu_seqlens_k, O seqused_k, O out, O lse, bool causal, int64_t window,
                                double softcap, double scale) {
    Arg a(q), b(k), c(v), d(cu_seqlens), e(cu_seqlens_k), f(seqused_k), g(out), h(lse);
    int64_t bytes = 0;
    if (a.rank() == 3 && d.rank() == 1) bytes = ep_attention_forward_workspace_bytes(d->shape[0], a->shape[2]);
    if (on_gpu(a) && a.rank() == 3 && b.rank() == 3) {
      bytes = ep_attention_forward_gpu_workspace_bytes(a->shape[0], a->shape[1], a->shape[2], b->shape[0]);
    }
    ep_attention_params p{causal, window, softcap, scale, 0};
    const Workspace workspace(bytes, a);
    run([&] { return ep_attention_forward(a, b, c, d, e, f, g, h, p, workspace.data(), stream); });
  });
  m.def("paged_attention", [](O q, O k_cache, O v_cache, O cu_seqlens, O block_table, O seqused_k, O out, O lse, bool causal,
                              int64_t window, double softcap, double scale) {
    Arg a(q), b(k_cache), c(v_cache), d(cu_seqlens), e(block_table), f(seqused_k), g(out), h(lse);
    int64_t bytes = 0;
    if (a.rank() == 3 && f.rank() == 1) bytes = ep_attention_forward_workspace_bytes(f->shape[0], a->shape[2]);
    if (on_gpu(a) && a.rank() == 3 && b.rank() == 4 && e.rank() == 2) {
      bytes = ep_attention_forward_gpu_workspace_bytes(a->shape[0], a->shape[1], a->shape[2], e->shape[1] * b->shape[1]);
    }
    ep_attention_params p{causal, window, softcap, scale, 0};
    const Workspace workspace(bytes, a);
    run([&] { return ep_paged_attention(a, b, c, d, e, f, g, h, p, workspace.data(), stream); });
  });
  m.def(
      "attention_backward",
      [](O dout, O q, O k, O v, O out, O lse, O cu_seqlens, O cu_seqlens_k, O seqused_k, O dq, O dk, O dv, bool causal,
         int64_t window, double softcap, double scale, bool unordered) {
        Arg a(dout), b(q), c(k), d(v), e(out), f(lse), g(cu_seqlens), h(cu_seqlens_k), i(seqused_k), j(dq), l(dk), n(dv);
        int64_t bytes = 0;
        if (b.rank() == 3 && c.rank() == 3 && g.rank() == 1) {
          bytes = (on_gpu(b) ? ep_attention_backward_gpu_workspace_bytes : ep_attention_backward_workspace_bytes)(
              g->shape[0], b->shape[0], b->shape[1], c->shape[1], b->shape[2]);
        }
        ep_attention_params p{causal, window, softcap, scale, unordered};
        const Workspace workspace(bytes, a);
        run([&] { return ep_attention_backward(a, b, c, d, e, f, g, h, i, j, l, n, p, workspace.data(), stream); });
      },
      "dout"_a, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "cu_seqlens"_a, "cu_seqlens_k"_a, "seqused_k"_a, "dq"_a, "dk"_a, "dv"_a,
      "causal"_a, "window"_a, "softcap"_a, "scale"_a, "unordered"_a = false);

  m.def("merge_weighted_sum", [](const py::list &x, const py::list &factors, O out) {
    Args a(x);
    Arg b(out);
    std::vector<double> weights;
    for (const auto &w : factors) weights.push_back(w.cast<double>());
    if (weights.size() != a.tensors.size()) throw py::value_error("merge_weighted_sum: one weight a tensor is needed");
    run([&] { return ep_merge_weighted_sum(a.tensors.data(), weights.data(), int(weights.size()), b, stream); });
  });
  m.def("merge_gram", [](const py::list &x, O base, O total) {
    Args a(x);
    Arg b(base);
    const int count = int(a.tensors.size());
    double *sums = numbers<double>(total, int64_t(count) * count, kDLFloat, "merge_gram: total must be float64 [k, k]");
    const Workspace workspace = merge_workspace(a, count, 0);
    run([&] { return ep_merge_gram(a.tensors.data(), count, b, sums, workspace.data(), stream); });
  });
  m.def("merge_magnitude_counts", [](O x, O base, int64_t every, O counts) {
    Arg a(x), b(base);
    auto *c = numbers<int64_t>(counts, 2 * 65536, kDLInt, "merge_magnitude_counts: counts must be int64 [2, 65536]");
    const Workspace workspace = merge_workspace(a, 1, 65536);
    run([&] { return ep_merge_magnitude_counts(a, b, every, c, workspace.data(), stream); });
  });
  m.def("merge_window_counts", [](O x, O base, const std::vector<int64_t> &windows, O counts) {
    Arg a(x), b(base);
    int64_t size = windows.size() % 2 == 0 ? 0 : -1;
    for (size_t i = 1; i < windows.size() && size >= 0; i += 2) size = windows[i] < 0 ? -1 : size + 1 + windows[i];
    auto *c = numbers<int64_t>(counts, size, kDLInt,
                               "merge_window_counts: windows are pairs (low, width), and counts int64 with 1 + width for each");
    const Workspace workspace = merge_workspace(a, 1, size);
    run([&] { return ep_merge_window_counts(a, b, windows.data(), int(windows.size() / 2), c, workspace.data(), stream); });
  });
  m.def("merge_masked_sums", [](O x, O base, const py::list &select, int64_t start, int64_t block, O total) {
    Arg a(x), b(base);
    Selects s(select);
    double *sums = numbers<double>(total, 2, kDLFloat, "merge_masked_sums: total must be float64 [2]");
    const Workspace workspace = merge_workspace(a, 1, 2 * parts_of(a, block));
    run([&] { return ep_merge_masked_sums(a, b, s.selects.data(), start, block, sums, workspace.data(), stream); });
    return s.seen();
  });
  m.def("merge_rank_mask", [](O x, O base, int64_t columns, double density, double epsilon, uint64_t key, int64_t start, O mask,
                              O total) {
    Arg a(x), b(base), c(mask);
    double *sums = total.is_none() ? nullptr : numbers<double>(total, 2, kDLFloat, "merge_rank_mask: total must be float64 [2]");
    const bool sane = columns > 0 && columns < (int64_t(1) << 30);
    const Workspace workspace = on_gpu(a) ? merge_workspace(a, 1, 2 * parts_of(a, columns))
                                          : Workspace(sane ? ep_merge_rank_mask_workspace_bytes(columns) : 0, a);
    const ep_merge_rank_params p{columns, start, density, epsilon, key};
    run([&] { return ep_merge_rank_mask(a, b, p, c, sums, workspace.data(), stream); });
  });
  m.def("merge_task_sum", [](O base, const py::list &x, const py::list &selects, bool elect, bool normalize, int zero_sign,
                             double scale, int64_t start, O out, bool count_signs) {
    Arg a(base), b(out);
    Args c(x);
    Selects s(selects);
    if (s.selects.size() != c.tensors.size()) throw py::value_error("merge_task_sum: one selection a tensor is needed");
    int64_t signs = 0, *counted = count_signs ? &signs : nullptr;
    const ep_merge_task_params p{elect, normalize, zero_sign, float(scale), start};
    const int count = int(c.tensors.size());
    const Workspace workspace = merge_workspace(c, count, 0);
    run([&] { return ep_merge_task_sum(a, c.tensors.data(), s.selects.data(), count, p, b, counted, workspace.data(), stream); });
    return py::make_tuple(signs, s.seen());
  });
  m.def("merge_nonfinite", [](O x) {
    Arg a(x);
    int64_t count = 0;
    const Workspace workspace = merge_workspace(a, 1, 0);
    run([&] { return ep_merge_nonfinite(a, &count, workspace.data(), stream); });
    return count;
  });
  m.def("merge_random", [](uint64_t key, int64_t start, O out) {
    Arg a(out);
    run([&] { return ep_merge_random(key, start, a, stream); });
  });

  m.def("rope", [](O x, O cos, O sin, O y, int64_t heads, bool inverse) {
    Arg a(x), b(cos), c(sin), d(y);
    run([&] { return ep_rope(a, b, c, d, heads, inverse, stream); });
  });

  m.def("glu_forward", [](O x, O y, int activation) {
    Arg a(x), b(y);
    run([&] { return ep_glu_forward(a, b, activation, stream); });
  });
  m.def("glu_backward", [](O dy, O x, O dx, int activation) {
    Arg a(dy), b(x), c(dx);
    run([&] { return ep_glu_backward(a, b, c, activation, stream); });
  });

  m.def("linear_kl_scan", [](O u, O teacher, O ids, O chosen, O sums, int kind, double beta, double temperature, double softcap,
                             double teacher_softcap, int64_t first) {
    Arg a(u), b(teacher), c(ids), d(chosen), e(sums);
    const ep_linear_kl_params p{kind, beta, temperature, softcap, teacher_softcap, first};
    run([&] { return ep_linear_kl_scan(a, b, c, d, e, p, stream); });
  });
  m.def("linear_kl_compare", [](O u, O teacher, O norm, O sums, int kind, double beta, double temperature, double softcap,
                                double teacher_softcap, int64_t first) {
    Arg a(u), b(teacher), c(norm), d(sums);
    const ep_linear_kl_params p{kind, beta, temperature, softcap, teacher_softcap, first};
    run([&] { return ep_linear_kl_compare(a, b, c, d, p, stream); });
  });
  m.def("linear_kl_gradient", [](O u, O teacher, O ids, O dchosen, O state, O dkl, O du, int kind, double beta, double temperature,
                                 double softcap, double teacher_softcap, int64_t first) {
    Arg a(u), b(teacher), c(ids), d(dchosen), e(state), f(dkl), g(du);
    const ep_linear_kl_params p{kind, beta, temperature, softcap, teacher_softcap, first};
    run([&] { return ep_linear_kl_gradient(a, b, c, d, e, f, g, p, stream); });
  });

  m.def("linear_logprob_forward", [](O hidden, O weight, O targets, O logprob, O lse, O entropy, O direction, double softcap) {
    Arg a(hidden), b(weight), c(targets), d(logprob), e(lse), f(entropy), g(direction);
    const int64_t bytes = ep_linear_logprob_forward_workspace_bytes_for(a, b, g);
    const Workspace workspace(bytes, a);
    run([&] { return ep_linear_logprob_forward(a, b, c, d, e, f, g, softcap, workspace.data(), stream); });
  });
  m.attr("LINEAR_LOGPROB_PART") = EP_LINEAR_LOGPROB_PART;
  m.def("linear_logprob_forward_part", [](O hidden, O weight, O targets, O target_rows, O state, O logprob, O lse, O entropy,
                                          O direction, double softcap, int64_t first, int64_t vocab) {
    Arg a(hidden), b(weight), c(targets), d(target_rows), e(state), f(logprob), g(lse), h(entropy), i(direction);
    const int64_t bytes = ep_linear_logprob_forward_workspace_bytes_for(a, b, i);
    const Workspace workspace(bytes, a);
    run([&] { return ep_linear_logprob_forward_part(a, b, c, d, e, f, g, h, i, softcap, first, vocab, workspace.data(), stream); });
  });
  m.def("linear_logprob_backward",
        [](O dlogprob, O dentropy, O hidden, O weight, O targets, O lse, O entropy, O dhidden, O dweight, double softcap) {
          Arg a(dlogprob), b(dentropy), c(hidden), d(weight), e(targets), f(lse), g(entropy), h(dhidden), i(dweight);
          const int64_t bytes = ep_linear_logprob_backward_workspace_bytes_for(c, d, h, i);
          const Workspace workspace(bytes, c);
          run([&] { return ep_linear_logprob_backward(a, b, c, d, e, f, g, h, i, softcap, workspace.data(), stream); });
        });

  m.def("lora_dropout", [](O x, O out, double dropout, uint64_t seed) {
    Arg a(x), b(out);
    run([&] { return ep_lora_dropout(a, b, dropout, seed, stream); });
  });

  m.def("matmul", [](O a, O b, O a2, O b2, O c, bool accumulate) {
    Arg x(a), y(b), x2(a2), y2(b2), z(c);
    const int64_t bytes = ep_matmul_workspace_bytes_for(x, y, x2, y2, z);
    const Workspace workspace(bytes, x);
    run([&] { return ep_matmul(x, y, x2, y2, z, accumulate, workspace.data(), stream); });
  });

  m.def("nf4_quantize", [](O x, O packed, O absmax, int64_t blocksize, int type) {
    Arg a(x), b(packed), c(absmax);
    run([&] { return ep_nf4_quantize(a, b, c, blocksize, type, stream); });
  });
  m.def("nf4_dequantize",
        [](O packed, O absmax, O nested_absmax, O nested_code, double offset, int64_t blocksize, int type, O out) {
          Arg a(packed), b(absmax), c(nested_absmax), d(nested_code), e(out);
          ep_nf4_tensor w{a, b, c, d, offset, blocksize, type};
          run([&] { return ep_nf4_dequantize(w, e, stream); });
        });
  m.def("nf4_matmul", [](O a, O packed, O absmax, O nested_absmax, O nested_code, double offset, int64_t blocksize, int type,
                         int64_t n, int64_t k, bool transposed, O a2, O b2, O c, bool accumulate) {
    Arg x(a), p(packed), s(absmax), t(nested_absmax), u(nested_code), x2(a2), y2(b2), z(c);
    ep_nf4_tensor w{p, s, t, u, offset, blocksize, type};
    const int64_t bytes = ep_nf4_matmul_workspace_bytes_for(x, w, n, k, transposed, x2, y2, z);
    const Workspace workspace(bytes, x);
    run([&] { return ep_nf4_matmul(x, w, n, k, transposed, x2, y2, z, accumulate, workspace.data(), stream); });
  });
  m.def("dynamic_code", [](bool is_signed) {
    const float *code = ep_dynamic_code(is_signed);
    return std::vector<float>(code, code + 256);
  });
  m.def("blockwise8_quantize", [](O x, O q, O absmax, int64_t blocksize, bool is_signed) {
    Arg a(x), b(q), c(absmax);
    run([&] { return ep_blockwise8_quantize(a, b, c, blocksize, is_signed, stream); });
  });
  m.def("blockwise8_dequantize", [](O q, O absmax, O code, O out, int64_t blocksize, double offset) {
    Arg a(q), b(absmax), c(code), d(out);
    run([&] { return ep_blockwise8_dequantize(a, b, c, d, blocksize, offset, stream); });
  });

  m.def("adamw_step", [](O param, O grad, O exp_avg, O exp_avg_sq, O master, double lr, double beta1, double beta2, double eps,
                         double weight_decay, int64_t step, double grad_scale) {
    Arg a(param), b(grad), c(exp_avg), d(exp_avg_sq), e(master);
    ep_adamw_params p{lr, beta1, beta2, eps, weight_decay, step, grad_scale};
    run([&] { return ep_adamw_step(a, b, c, d, e, p, stream); });
  });
  m.def("adamw8_step", [](O param, O grad, O exp_avg, O exp_avg_sq, O exp_avg_scale, O exp_avg_sq_scale, O master, double lr,
                          double beta1, double beta2, double eps, double weight_decay, int64_t step, double grad_scale) {
    Arg a(param), b(grad), c(exp_avg), d(exp_avg_sq), e(exp_avg_scale), f(exp_avg_sq_scale), g(master);
    ep_adamw_params p{lr, beta1, beta2, eps, weight_decay, step, grad_scale};
    run([&] { return ep_adamw8_step(a, b, c, d, e, f, g, p, stream); });
  });
  m.def(
      "sum_squares",
      [](O x, O result) -> py::object {  // into `result`, where x is; without it x is on the CPU
        Arg a(x);
        double own = 0, *to = &own;
        if (!result.is_none()) to = numbers<double>(result, 1, kDLFloat, "sum_squares: result must be float64 [1] where x is", &a);
        if (result.is_none() && a.rank() > 0 && a->device.device_type != kDLCPU)
          throw py::value_error("sum_squares: result is missing");
        const Workspace workspace(ep_sum_squares_workspace_bytes(a.rank() == 1 ? a->shape[0] : 0), a);
        run([&] { return ep_sum_squares(a, to, workspace.data(), stream); });
        return result.is_none() ? py::object(py::float_(own)) : py::object(py::none());
      },
      "x"_a, "result"_a = py::none());
}
