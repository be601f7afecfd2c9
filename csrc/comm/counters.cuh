// Counters inside one rank by which the roles of different CTAs meet.
#pragma once
#include "comm/peers.cuh"

namespace megamoe {

// Waits by one thread until the counter has come to `least`; what was done before the adds (red.release.gpu) is then
// visible to this thread (ld.acquire.gpu). For the async proxy a fence.proxy.async must follow.
template <int kSleepNs = 20>
__device__ __forceinline__ void wait_counter(const Peers& peers, const int* counter, int least, Waiting what) {
    int seen = ptx::load_acquire_gpu(counter);
    if (seen < least) {
        const uint64_t* abort = words(peers, peers.rank, peers.layout.abort);
        const unsigned long long start = ptx::global_nanoseconds();
        do {
            __nanosleep(kSleepNs);
            if (ptx::load_relaxed_sys(abort) != 0) {
                fail(peers, what, Failure::kAborted, static_cast<int>(ptx::load_relaxed_sys(abort)) - 1, least, seen);
            }
            if (ptx::global_nanoseconds() - start > inner_limit(peers.deadline)) {
                fail(peers, what, Failure::kExpired, -1, least, seen);
            }
            seen = ptx::load_acquire_gpu(counter);
        } while (seen < least);
    }
    random_delay();
}

// By one thread, after a barrier with those whose work is announced.
__device__ __forceinline__ void add_counter(int* counter, int value) {
    random_delay();
    ptx::add_release_gpu(counter, value);
}

}  // namespace megamoe
