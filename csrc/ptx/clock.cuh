// The clock that deadlines are measured with.
#pragma once

namespace megamoe::ptx {

__device__ __forceinline__ unsigned long long global_nanoseconds() {
    unsigned long long now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

}  // namespace megamoe::ptx
