// Counters inside one rank by which the roles of different CTAs meet.
#pragma once
#include "comm/peers.cuh"

namespace megamoe {

// One look, by one thread that has waited since `start` (0: since now), at whether the counter has come to `least`.
// What was done before the adds (red.release.gpu) is then visible to this thread (ld.acquire.gpu). For the async proxy
// a fence.proxy.async must follow.
template <int kSleepNs = 20>
__device__ __forceinline__ bool counter_there(const Peers& peers, const int* counter, int least, Waiting what,
                                              unsigned long long& start) {
    const int seen = ptx::load_acquire_gpu(counter);
    if (seen >= least) return true;
    const uint64_t* abort = words(peers, peers.rank, peers.layout.abort);
    const unsigned long long now = ptx::global_nanoseconds();
    if (start == 0) start = now;
    if (ptx::load_relaxed_sys(abort) != 0) {
        fail(peers, what, Failure::kAborted, static_cast<int>(ptx::load_relaxed_sys(abort)) - 1, least, seen);
    }
    if (now - start > inner_limit(peers.deadline)) fail(peers, what, Failure::kExpired, -1, least, seen);
    __nanosleep(kSleepNs);
    return false;
}

// Waits by one thread.
template <int kSleepNs = 20>
__device__ __forceinline__ void wait_counter(const Peers& peers, const int* counter, int least, Waiting what) {
    unsigned long long start = 0;
    while (!counter_there<kSleepNs>(peers, counter, least, what, start)) {}
    random_delay();
}

// By one thread, after a barrier with those whose work is announced.
__device__ __forceinline__ void add_counter(int* counter, int value) {
    random_delay();
    ptx::add_release_gpu(counter, value);
}

}  // namespace megamoe
