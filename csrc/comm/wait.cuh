// Waits. Each has a name and a deadline: on expiry a record is written for the host and the kernel traps.
#pragma once
#include "ptx/barrier.cuh"

namespace megamoe {

// What a warp was waiting for; wait_names in megamoe_train/ops.py holds the same list.
enum class Waiting : int { kUnit = 1, kUnitSlotFree = 2, kStageFull = 3, kStageFree = 4, kOutputFull = 5 };

// Lives in mapped pinned host memory; `claimed` is taken by the first expiry.
struct WaitRecord {
    int claimed;
    int what;
    int block;
    int thread;
    int expected;
    int rank;
};

struct Deadline {
    unsigned long long nanoseconds;
    WaitRecord* record;  // may be null
    int rank;
};

__device__ __forceinline__ unsigned long long global_nanoseconds() {
    unsigned long long now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

__device__ __forceinline__ void expire(const Deadline& deadline, Waiting what, int expected) {
    WaitRecord* record = deadline.record;
    if (record != nullptr && atomicCAS_system(&record->claimed, 0, 1) == 0) {
        record->what = static_cast<int>(what);
        record->block = blockIdx.x;
        record->thread = threadIdx.x;
        record->expected = expected;
        record->rank = deadline.rank;
        __threadfence_system();
    }
    __trap();
}

__device__ __forceinline__ void wait_slow(uint64_t* barrier, uint32_t parity, const Deadline& deadline, Waiting what) {
    const unsigned long long start = global_nanoseconds();
    while (!ptx::mbarrier_try_wait(barrier, parity)) {
        if (global_nanoseconds() - start > deadline.nanoseconds) expire(deadline, what, static_cast<int>(parity));
    }
}

__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity, const Deadline& deadline, Waiting what) {
    // Two tries suspend for up to the hardware's time limit each; only then is the clock read.
    if (ptx::mbarrier_try_wait(barrier, parity) || ptx::mbarrier_try_wait(barrier, parity)) return;
    wait_slow(barrier, parity, deadline, what);
}

__device__ __forceinline__ void spin(int cycles) {
    const long long start = clock64();
    while (clock64() - start < cycles) {}
}

}  // namespace megamoe
