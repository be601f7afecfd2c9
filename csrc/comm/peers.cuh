// A rank among its peers: everyone's workspace by base pointer, and the words by which ranks signal each other.
// Nothing here knows whether a peer is another device, another process or a virtual rank on the same GPU.
#pragma once
#include "comm/wait.cuh"
#include "layout/workspace.cuh"
#include "ptx/memory.cuh"

namespace megamoe {

struct Peers {
    WorkspaceLayout layout;
    const uint64_t* bases;  // [R] in device memory, written before the first launch and never again
    int rank;
    int ranks;
    int flag_tiles;  // of a rank in tile_flags
    Deadline deadline;
};

// What a rank announces in its ready word; ops_comm.py: class Op holds the same list.
enum class Op : int {
    kDispatch = 1,
    kCombine = 2,
    kDispatchBackward = 3,
    kCombineBackward = 4,
    kForward = 5,
    kBackward = 6
};

__device__ __forceinline__ uint8_t* region(const Peers& peers, int rank, int64_t offset) {
    return reinterpret_cast<uint8_t*>(peers.bases[rank]) + offset;
}

__device__ __forceinline__ uint64_t* words(const Peers& peers, int rank, int64_t offset) {
    return reinterpret_cast<uint64_t*>(region(peers, rank, offset));
}

__device__ __forceinline__ uint64_t& state_word(const Peers& peers, int index) {
    return words(peers, peers.rank, peers.layout.state)[index];
}

__device__ __forceinline__ int* state_int(const Peers& peers, int index) {
    return reinterpret_cast<int*>(&state_word(peers, index));
}

// Row of source rank `source` in the counts that lie at this rank.
__device__ __forceinline__ int* counts_row(const Peers& peers, int at, uint32_t epoch, int source) {
    const int64_t row = int64_t{epoch & 1} * peers.ranks + source;
    return reinterpret_cast<int*>(region(peers, at, peers.layout.counts)) +
           row * counts_stride(peers.layout.shape.experts);
}

__device__ __forceinline__ int* row_sources(const Peers& peers, int at, uint32_t epoch) {
    const int64_t flat = peers.layout.shape.tokens * peers.layout.shape.top_k;
    return reinterpret_cast<int*>(region(peers, at, peers.layout.row_sources)) + (epoch & 1) * flat;
}

__device__ __forceinline__ uint8_t* staging(const Peers& peers, int at, int buffer) {
    return region(peers, at, peers.layout.staging) +
           int64_t{buffer} * peers.layout.shape.tokens * peers.layout.shape.hidden * 2;
}

__device__ __forceinline__ float* staged_weights(const Peers& peers, int at, int buffer) {
    const int64_t flat = peers.layout.shape.tokens * peers.layout.shape.top_k;
    return reinterpret_cast<float*>(region(peers, at, peers.layout.weights)) + int64_t{buffer} * flat;
}

// Combine slot of (token, k) at rank `at`.
__device__ __forceinline__ uint8_t* combine_slot(const Peers& peers, int at, int token, int k) {
    const WorkspaceShape& shape = peers.layout.shape;
    return region(peers, at, peers.layout.slots) + (k * shape.tokens + token) * shape.hidden * 2;
}

// Rank `of` has pushed all rows of its row tile `tile` that belong to `at`: the epoch in which it did.
__device__ __forceinline__ uint32_t* tile_flag(const Peers& peers, int at, int of, int tile) {
    return reinterpret_cast<uint32_t*>(region(peers, at, peers.layout.tile_flags)) + int64_t{of} * peers.flag_tiles +
           tile;
}

__device__ __forceinline__ uint64_t epoch_word(uint32_t epoch) { return static_cast<uint64_t>(epoch) << 32; }
__device__ __forceinline__ uint32_t epoch_of(uint64_t word) { return static_cast<uint32_t>(word >> 32); }

// `staged`: the staging buffers that a fused pass offers, a bit each, so that ranks that differ in it find out.
__device__ __forceinline__ uint64_t ready_word(uint32_t epoch, Op op, int plan, unsigned staged = 0) {
    return epoch_word(epoch) | static_cast<uint64_t>(staged) << 30 | static_cast<uint64_t>(op) << 24 |
           (plan & 0xffffff);
}

// In a build with MEGAMOE_RANDOM_DELAYS: sleeps up to ~16 us before a signal and after a wait, so that a missing order
// shows as different bits.
__device__ __forceinline__ void random_delay() {
#ifdef MEGAMOE_RANDOM_DELAYS
    uint32_t hash = static_cast<uint32_t>(clock64()) ^ (blockIdx.x * 0x9e3779b9u) ^ (threadIdx.x * 0x85ebca6bu);
    hash ^= hash >> 16, hash *= 0x7feb352du, hash ^= hash >> 15, hash *= 0x846ca68bu, hash ^= hash >> 16;
    if (hash & 1) __nanosleep(hash >> 18);
#endif
}

// Raises the abort word at every rank, writes the record and traps.
[[noreturn]] static __device__ __noinline__ void fail(const Peers& peers, Waiting what, Failure failure, int peer,
                                                      uint64_t expected, uint64_t seen) {
    raise_abort(peers.deadline);
    write_record(peers.deadline, what, failure, peer, expected, seen);
    __trap();
    __builtin_unreachable();
}

// Waits by one thread until the word's epoch has come; returns the word. What its writer did before the release is
// visible to this thread afterwards (ld.acquire.sys); for the async proxy a fence.proxy.async must follow.
__device__ __forceinline__ uint64_t wait_word(const Peers& peers, const uint64_t* word, uint32_t epoch, Waiting what,
                                              int peer) {
    uint64_t seen = ptx::load_acquire_sys(word);
    if (epoch_of(seen) < epoch) {
        const uint64_t* abort = words(peers, peers.rank, peers.layout.abort);
        const unsigned long long start = ptx::global_nanoseconds();
        do {
            __nanosleep(40);
            if (ptx::load_relaxed_sys(abort) != 0) {
                fail(peers, what, Failure::kAborted, static_cast<int>(ptx::load_relaxed_sys(abort)) - 1,
                     epoch_word(epoch), seen);
            }
            if (ptx::global_nanoseconds() - start > peers.deadline.nanoseconds) {
                fail(peers, what, Failure::kExpired, peer, epoch_word(epoch), seen);
            }
            seen = ptx::load_acquire_sys(word);
        } while (epoch_of(seen) < epoch);
    }
    random_delay();
    return seen;
}

__device__ __forceinline__ int ready_index(const Peers& peers, uint32_t epoch, int source) {
    return static_cast<int>(epoch % kReadySlots) * peers.ranks + source;
}

// Waits until `peer` has announced the operation this rank is in; any other announcement is an error at once.
__device__ __forceinline__ void wait_ready(const Peers& peers, int peer, uint64_t expected) {
    const uint32_t epoch = epoch_of(expected);
    const uint64_t* word = words(peers, peers.rank, peers.layout.ready) + ready_index(peers, epoch, peer);
    const uint64_t seen = wait_word(peers, word, epoch, Waiting::kReady, peer);
    if (seen != expected) fail(peers, Waiting::kReady, Failure::kMismatch, peer, expected, seen);
}

// Signals rank `to`: what this thread did, and what others did before a barrier with it, is visible to whoever acquires
// the word (fence.acq_rel.sys; st.release.sys: cumulative over the barrier).
__device__ __forceinline__ void signal(const Peers& peers, int to, int64_t offset, int index, uint64_t word) {
    random_delay();
    ptx::fence_acq_rel_sys();
    ptx::store_release_sys(words(peers, to, offset) + index, word);
}

// True in every thread of the last CTA of the launch that arrives. `ticket` was zero before the launch. What any CTA
// did before is visible to the last one: barrier; atom.acq_rel.gpu by one thread; barrier.
__device__ __forceinline__ bool last_cta(int* ticket, int ctas) {
    __shared__ int arrived;
    __syncthreads();
    if (threadIdx.x == 0) {
        random_delay();
        arrived = ptx::add_acq_rel_gpu(ticket, 1);
    }
    __syncthreads();
    return arrived == ctas - 1;
}

}  // namespace megamoe
