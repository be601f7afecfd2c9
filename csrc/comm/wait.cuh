// Waits. Each has a name and a deadline: on expiry a record is written for the host and the kernel traps.
#pragma once
#include "ptx/barrier.cuh"
#include "ptx/clock.cuh"
#include "ptx/memory.cuh"

namespace megamoe {

// What a warp was waiting for; WAITS in megamoe_train/watchdog.py holds the same list. From 32 on: between ranks.
enum class Waiting : int {
    // clang-format off
    kUnit = 1, kUnitSlotFree = 2, kStageFull = 3, kStageFree = 4, kOutputFull = 5,
    kRowsArrived = 6, kTileMade = 7, kFrontier = 8, kClaimDue = 9,
    kCounts = 32, kRowSources = 33, kReady = 34, kPulled = 35, kPushed = 36, kRowLanded = 37, kSlotsFilled = 38,
    kStaged = 39,
    // clang-format on
};

// Why it gave up; FAILURES in megamoe_train/watchdog.py.
enum class Failure : int { kExpired = 1, kMismatch = 2, kAborted = 3 };

// Lives in mapped pinned host memory; `claimed` is taken by the first failure, `complete` is set after the other
// fields.
struct WaitRecord {
    int claimed;
    int complete;
    int failure;
    int what;
    int block;
    int thread;
    int rank;
    int peer;  // the rank that did not come; -1: none, the wait is inside this rank
    unsigned long long expected;
    unsigned long long seen;
};

struct Deadline {
    unsigned long long nanoseconds;
    WaitRecord* record;  // may be null
    int rank;
    int ranks;              // 0: no peers to tell
    const uint64_t* bases;  // [ranks] workspaces
    int64_t abort;          // offset of the abort word in each
};

// Waits inside a rank are given an eighth more: where both expire, the one that names a peer tells more.
__device__ __forceinline__ unsigned long long inner_limit(const Deadline& deadline) {
    return deadline.nanoseconds + deadline.nanoseconds / 8;
}

// The abort word at every rank, so that none waits for its own deadline. Before the record: whoever sees that complete
// may trap, which ends this thread too.
__device__ __forceinline__ void raise_abort(const Deadline& deadline) {
    for (int r = 0; r < deadline.ranks; ++r) {
        ptx::store_release_sys(reinterpret_cast<uint64_t*>(deadline.bases[r] + deadline.abort), deadline.rank + 1);
    }
    __threadfence_system();
}

__device__ __forceinline__ void write_record(const Deadline& deadline, Waiting what, Failure failure, int peer,
                                             unsigned long long expected, unsigned long long seen) {
    WaitRecord* record = deadline.record;
    if (record == nullptr) return;
    if (atomicCAS_system(&record->claimed, 0, 1) != 0) {
        // The caller traps next, which ends every thread: the first one must have written its record by then.
        for (int i = 0; i < 1000 && *const_cast<volatile int*>(&record->complete) == 0; ++i) __nanosleep(10000);
        return;
    }
    record->failure = static_cast<int>(failure);
    record->what = static_cast<int>(what);
    record->block = blockIdx.x;
    record->thread = threadIdx.x;
    record->rank = deadline.rank;
    record->peer = peer;
    record->expected = expected;
    record->seen = seen;
    __threadfence_system();
    *const_cast<volatile int*>(&record->complete) = 1;
    __threadfence_system();
}

// A call that does not return: inlined, the record's stores cost every role registers at each of its waits.
[[noreturn]] static __device__ __noinline__ void expire(const Deadline& deadline, Waiting what, int expected) {
    raise_abort(deadline);
    write_record(deadline, what, Failure::kExpired, -1, expected, expected ^ 1);
    __trap();
    __builtin_unreachable();
}

__device__ __forceinline__ void wait_slow(uint64_t* barrier, uint32_t parity, const Deadline& deadline, Waiting what) {
    const unsigned long long start = ptx::global_nanoseconds();
    while (!ptx::mbarrier_try_wait(barrier, parity)) {
        if (ptx::global_nanoseconds() - start > inner_limit(deadline)) expire(deadline, what, static_cast<int>(parity));
    }
}

__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity, const Deadline& deadline, Waiting what) {
    // Two tries suspend for up to the hardware's time limit each; only then is the clock read.
    if (ptx::mbarrier_try_wait(barrier, parity) || ptx::mbarrier_try_wait(barrier, parity)) return;
    wait_slow(barrier, parity, deadline, what);
}

}  // namespace megamoe
