// What the module of the emulated build has besides the kernels: schedules, the card, counters, and the emulator's own tests.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "../cuda/matmul.h"
#include "emulator.h"
#include "enginepost/core.h"
#include "planted.h"

namespace ep {
namespace emulator {

inline void bind(pybind11::module_ &m) {
  namespace py = pybind11;
  static const auto check = [](int status) {
    if (status != EP_OK) throw std::runtime_error(ep_last_error());
  };
  m.def("set_schedule", [](const std::string &name, uint64_t seed) {
    if (name != "forward" && name != "reverse" && name != "shuffled")
      throw py::value_error("schedule: forward, reverse or shuffled");
    set_schedule(name == "forward" ? Schedule::forward : name == "reverse" ? Schedule::reverse : Schedule::shuffled, seed);
  });
  m.def("set_card", &set_card);
  m.def("statistics", [] {
    const Statistics s = statistics;
    statistics = Statistics();
    py::dict out;
    out["launches"] = s.launches, out["threads"] = s.threads, out["mma"] = s.mma, out["ldmatrix"] = s.ldmatrix;
    out["ldmatrix_conflicts"] = s.ldmatrix_conflicts, out["cp_async"] = s.cp_async, out["barriers"] = s.barriers;
    out["wgmma"] = s.wgmma, out["tma"] = s.tma;
    return out;
  });
  m.def("matmul_tile", [](int64_t m, int64_t n, int64_t depth, int multiprocessors) {
    const gemm::Choice choice = gemm::choose(m, n, depth, multiprocessors);
    return pybind11::make_tuple(choice.large, choice.slices);
  });
  m.def("wgmma_columns", &gemm::wgmma_columns);
  m.def("planted_matmul",
        [](const std::string &fault, uintptr_t a, uintptr_t b, uintptr_t c, int64_t rows, int64_t columns, int64_t k, bool fp16) {
          check(planted_matmul(fault.c_str(), reinterpret_cast<const uint16_t *>(a), reinterpret_cast<const uint16_t *>(b),
                               reinterpret_cast<float *>(c), rows, columns, k, fp16));
        });
  m.def("planted_wgmma", [](const std::string &fault, const std::string &kind, uintptr_t a, uintptr_t b, uintptr_t c, int64_t rows,
                            int64_t columns, int64_t k, bool fp16) {
    check(planted_wgmma(fault.c_str(), kind.c_str(), reinterpret_cast<const uint16_t *>(a), reinterpret_cast<const uint16_t *>(b),
                        reinterpret_cast<float *>(c), rows, columns, k, fp16));
  });
  m.def("planted_twice", [](const std::string &fault, uintptr_t x, uintptr_t y, int64_t rows, int64_t columns) {
    check(planted_twice(fault.c_str(), reinterpret_cast<const uint16_t *>(x), reinterpret_cast<uint16_t *>(y), rows, columns));
  });
  m.def("convert", [](uintptr_t bits, uintptr_t wide, int64_t count, bool fp16, bool narrow) {
    check(planted_convert(reinterpret_cast<uint16_t *>(bits), reinterpret_cast<float *>(wide), count, fp16, narrow));
  });
  m.def("planted_sum", [](const std::string &fault, uintptr_t x, uintptr_t y, int64_t blocks) {
    check(planted_sum(fault.c_str(), reinterpret_cast<const float *>(x), reinterpret_cast<float *>(y), blocks));
  });
}

}  // namespace emulator
}  // namespace ep
