// The text of wgmma.mma_async for the widths that are used: 64, 128 and 256 columns. Included by hopper.cuh alone.
#pragma once

namespace ep {
namespace ptx {

#define EP_D32                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define EP_D64                                                                       \
  EP_D32                                                                             \
  ", "                                                                               \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define EP_D128                                                                                  \
  EP_D64                                                                                         \
  ", "                                                                                           \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define EP_F(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define EP_F8(i) EP_F(i), EP_F(i + 1), EP_F(i + 2), EP_F(i + 3), EP_F(i + 4), EP_F(i + 5), EP_F(i + 6), EP_F(i + 7)
#define EP_F16(i) EP_F8(i), EP_F8(i + 8)
#define EP_F32(i) EP_F16(i), EP_F16(i + 16)

// A in shared memory: operands a, b, accumulate, and the two flags, from number NA on.
#define EP_WGMMA_SHARED(WIDTH, TYPE, D, OUTS, NA, NB, NC, TA, TB)                                                                 \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #NC ", 0;\nwgmma.mma_async.sync.aligned.m64n" #WIDTH "k16.f32." TYPE "." TYPE \
               " {" D "}, %" #NA ", %" #NB ", p, 1, 1, %" #TA ", %" #TB ";\n}"                                                    \
               : OUTS                                                                                                             \
               : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(A_ACROSS)), "n"(int(B_ACROSS)))
// A in four registers from number R0 on.
#define EP_WGMMA_REGISTERS(WIDTH, TYPE, D, OUTS, R0, R1, R2, R3, NB, NC, TB)                                                      \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #NC ", 0;\nwgmma.mma_async.sync.aligned.m64n" #WIDTH "k16.f32." TYPE "." TYPE \
               " {" D "}, {%" #R0 ", %" #R1 ", %" #R2 ", %" #R3 "}, %" #NB ", p, 1, 1, %" #TB ";\n}"                              \
               : OUTS                                                                                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(B_ACROSS)))

template <class T>
struct Wgmma;
template <>
struct Wgmma<bf16> {
  template <bool A_ACROSS, bool B_ACROSS, int BLOCKS>
  static __device__ __forceinline__ void shared(float (&d)[BLOCKS][4], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(BLOCKS == 8 || BLOCKS == 16 || BLOCKS == 32, "64, 128 or 256 columns");
    if constexpr (BLOCKS == 8) {
      EP_WGMMA_SHARED(64, "bf16", EP_D32, EP_F8(0), 32, 33, 34, 35, 36);
    } else if constexpr (BLOCKS == 16) {
      EP_WGMMA_SHARED(128, "bf16", EP_D64, EP_F16(0), 64, 65, 66, 67, 68);
    } else {
      EP_WGMMA_SHARED(256, "bf16", EP_D128, EP_F32(0), 128, 129, 130, 131, 132);
    }
  }
  template <bool B_ACROSS, int BLOCKS>
  static __device__ __forceinline__ void registers(float (&d)[BLOCKS][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    static_assert(BLOCKS == 8 || BLOCKS == 16, "64 or 128 columns");
    if constexpr (BLOCKS == 8) {
      EP_WGMMA_REGISTERS(64, "bf16", EP_D32, EP_F8(0), 32, 33, 34, 35, 36, 37, 38);
    } else {
      EP_WGMMA_REGISTERS(128, "bf16", EP_D64, EP_F16(0), 64, 65, 66, 67, 68, 69, 70);
    }
  }
};
template <>
struct Wgmma<fp16> {
  template <bool A_ACROSS, bool B_ACROSS, int BLOCKS>
  static __device__ __forceinline__ void shared(float (&d)[BLOCKS][4], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(BLOCKS == 8 || BLOCKS == 16 || BLOCKS == 32, "64, 128 or 256 columns");
    if constexpr (BLOCKS == 8) {
      EP_WGMMA_SHARED(64, "f16", EP_D32, EP_F8(0), 32, 33, 34, 35, 36);
    } else if constexpr (BLOCKS == 16) {
      EP_WGMMA_SHARED(128, "f16", EP_D64, EP_F16(0), 64, 65, 66, 67, 68);
    } else {
      EP_WGMMA_SHARED(256, "f16", EP_D128, EP_F32(0), 128, 129, 130, 131, 132);
    }
  }
  template <bool B_ACROSS, int BLOCKS>
  static __device__ __forceinline__ void registers(float (&d)[BLOCKS][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    static_assert(BLOCKS == 8 || BLOCKS == 16, "64 or 128 columns");
    if constexpr (BLOCKS == 8) {
      EP_WGMMA_REGISTERS(64, "f16", EP_D32, EP_F8(0), 32, 33, 34, 35, 36, 37, 38);
    } else {
      EP_WGMMA_REGISTERS(128, "f16", EP_D64, EP_F16(0), 64, 65, 66, 67, 68, 69, 70);
    }
  }
};

#undef EP_D32
#undef EP_D64
#undef EP_D128
#undef EP_F
#undef EP_F8
#undef EP_F16
#undef EP_F32
#undef EP_WGMMA_SHARED
#undef EP_WGMMA_REGISTERS

}  // namespace ptx
}  // namespace ep
