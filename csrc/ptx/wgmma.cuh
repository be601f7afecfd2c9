// Warpgroup matrix multiply: D[64, N] (fp32, registers) += A[64, 16] * B[16, N], bf16 from shared memory.
#pragma once
#include "ptx/layout.cuh"

namespace megamoe::ptx {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving the first kCount accumulators across asynchronous matrix instructions.
template <int kCount>
__device__ __forceinline__ void pin_accumulators(float (&d)[128]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Operands 0, 1, ... of the instruction with N columns, N / 2 of them; and what they stand for.
#define MEGAMOE_REGISTERS_64                                               \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MEGAMOE_REGISTERS_128                                                          \
    MEGAMOE_REGISTERS_64                                                               \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MEGAMOE_REGISTERS_192                                                          \
    MEGAMOE_REGISTERS_128                                                              \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MEGAMOE_REGISTERS_256                                                                      \
    MEGAMOE_REGISTERS_192                                                                          \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MEGAMOE_FOUR(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define MEGAMOE_SIXTEEN(i) MEGAMOE_FOUR(i), MEGAMOE_FOUR((i) + 4), MEGAMOE_FOUR((i) + 8), MEGAMOE_FOUR((i) + 12)
#define MEGAMOE_ACCUMULATORS_64 MEGAMOE_SIXTEEN(0), MEGAMOE_SIXTEEN(16)
#define MEGAMOE_ACCUMULATORS_128 MEGAMOE_ACCUMULATORS_64, MEGAMOE_SIXTEEN(32), MEGAMOE_SIXTEEN(48)
#define MEGAMOE_ACCUMULATORS_192 MEGAMOE_ACCUMULATORS_128, MEGAMOE_SIXTEEN(64), MEGAMOE_SIXTEEN(80)
#define MEGAMOE_ACCUMULATORS_256 MEGAMOE_ACCUMULATORS_192, MEGAMOE_SIXTEEN(96), MEGAMOE_SIXTEEN(112)

// The operands behind them: descriptors of A and B, `accumulate`, and which index of A and B is contiguous.
#define MEGAMOE_WGMMA(n, a_at, b_at, accumulate_at, major_a_at, major_b_at)                           \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate_at                                  \
                 ", 0;\n"                                                                             \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" MEGAMOE_REGISTERS_##n   \
                 "}, %" #a_at ", %" #b_at ", p, 1, 1, %" #major_a_at ", %" #major_b_at ";\n}"         \
                 : MEGAMOE_ACCUMULATORS_##n                                                           \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kMajorA)), \
                   "n"(static_cast<int>(kMajorB)))

// N = kColumns: 64, 128, 192 or 256. D: the first N / 2 accumulators. `accumulate` false overwrites D.
template <int kColumns, Major kMajorA, Major kMajorB>
__device__ __forceinline__ void wgmma_k16(float (&d)[128], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(kColumns % 64 == 0 && kColumns > 0 && kColumns <= 256);
    if constexpr (kColumns == 64) MEGAMOE_WGMMA(64, 32, 33, 34, 35, 36);
    if constexpr (kColumns == 128) MEGAMOE_WGMMA(128, 64, 65, 66, 67, 68);
    if constexpr (kColumns == 192) MEGAMOE_WGMMA(192, 96, 97, 98, 99, 100);
    if constexpr (kColumns == 256) MEGAMOE_WGMMA(256, 128, 129, 130, 131, 132);
}

#undef MEGAMOE_WGMMA
#undef MEGAMOE_ACCUMULATORS_64
#undef MEGAMOE_ACCUMULATORS_128
#undef MEGAMOE_ACCUMULATORS_192
#undef MEGAMOE_ACCUMULATORS_256
#undef MEGAMOE_REGISTERS_64
#undef MEGAMOE_REGISTERS_128
#undef MEGAMOE_REGISTERS_192
#undef MEGAMOE_REGISTERS_256
#undef MEGAMOE_SIXTEEN
#undef MEGAMOE_FOUR

}  // namespace megamoe::ptx
