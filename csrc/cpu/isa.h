// One source, several instruction sets. Every kernel file is compiled once per instruction set, its body in namespace ep::EP_ISA,
// and once more with EP_API for the checks and the extern "C" functions that choose at run time.
//
// NOTES: inline code shared by the copies must live inside namespace EP_ISA too: two copies of one inline function under one name
// would be merged by the linker, and the AVX-512 copy could end up running on an AVX2 machine. For the same reason kernels use no
// standard containers.
#pragma once

#include <cstdint>

namespace ep {

enum class Isa { portable, avx2, avx512, avx512bf16 };
Isa cpu_isa();

#if defined(EP_EMULATED)
// The emulated build holds the CUDA kernels alone (dispatch.h): what has none says so.
#define EP_KERNEL(name, Args)
#define EP_RUN(name, args) return (void)(args), ep::fail(EP_UNSUPPORTED, "%s has no CUDA kernel that the emulator could run", #name)
#elif defined(EP_X86)
// Without bf16 instructions where AVX-512 is emulated (csrc/emulator/avx512.h).
#if defined(EP_EMULATE_AVX512)
#define EP_BF16(...)
#else
#define EP_BF16(...) __VA_ARGS__
#endif
#define EP_KERNEL(name, Args)                                \
  namespace ep {                                             \
  namespace portable {                                       \
  void name(const Args &);                                   \
  }                                                          \
  namespace avx2 {                                           \
  void name(const Args &);                                   \
  }                                                          \
  namespace avx512 {                                         \
  void name(const Args &);                                   \
  }                                                          \
  EP_BF16(namespace avx512bf16 { void name(const Args &); }) \
  }
#define EP_RUN(name, args)                                                   \
  do {                                                                       \
    switch (ep::cpu_isa()) {                                                 \
      EP_BF16(case ep::Isa::avx512bf16 : ep::avx512bf16::name(args); break;) \
      case ep::Isa::avx512: ep::avx512::name(args); break;                   \
      case ep::Isa::avx2: ep::avx2::name(args); break;                       \
      default: ep::portable::name(args);                                     \
    }                                                                        \
  } while (0)
#else
#define EP_KERNEL(name, Args) \
  namespace ep {              \
  namespace portable {        \
  void name(const Args &);    \
  }                           \
  }
#define EP_RUN(name, args) ep::portable::name(args)
#endif

}  // namespace ep
