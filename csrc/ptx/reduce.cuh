// fp32 additions performed by the L2 cache.
#pragma once
#include <cuda_runtime.h>

namespace megamoe::ptx {

// Four neighbouring elements += v; 16-byte aligned. Nothing is returned, so the warp does not wait.
__device__ __forceinline__ void reduce_add_v4(float* address, uint4 v) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address),
                 "f"(__uint_as_float(v.x)), "f"(__uint_as_float(v.y)), "f"(__uint_as_float(v.z)),
                 "f"(__uint_as_float(v.w))
                 : "memory");
}

}  // namespace megamoe::ptx
