// Pull role of the fused kernels: warps copy rows from the staging buffers of the ranks that hold the tokens into this
// rank's pools, 16 bytes a lane. Through registers, because shared memory belongs to the operand ring.
#pragma once
#include "comm/counters.cuh"
#include "roles/fused_params.cuh"

namespace megamoe {

// One row by a warp; `from` null: zeros. kDepth: loads in flight per lane.
template <int kDepth>
__device__ __forceinline__ void copy_row(uint8_t* to, const uint8_t* from, int bytes) {
    const int lane = threadIdx.x & 31;
    for (int at = lane * 16; at < bytes; at += kDepth * 512) {
        uint4 v[kDepth];
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            const bool inside = at + i * 512 < bytes;
            v[i] = inside && from != nullptr ? ptx::load_v4_once(from + at + i * 512) : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            if (at + i * 512 < bytes) ptx::store_v4(to + at + i * 512, v[i]);
        }
    }
}

// Where a lane's row comes from, and its weight.
struct RowOrigin {
    const uint8_t* from;  // null: padding
    float weight;
};

__device__ __forceinline__ RowOrigin row_origin(const FusedParams& params, const Pull& pull, RowSource source) {
    if (source.rank < 0) return {nullptr, 0.0f};
    const bool here = source.rank == params.peers.rank;
    const uint8_t* tokens = here ? pull.tokens : staging(params.peers, source.rank, pull.buffer);
    const uint8_t* from = tokens + int64_t{source.flat / params.top_k} * params.row_bytes;
    if (!pull.weighted) return {from, 0.0f};
    const float* p = here ? pull.weights : staged_weights(params.peers, source.rank, pull.buffer);
    return {from, ptx::load_float(p + source.flat)};
}

// Pulled -> acknowledged: all warps' loads have landed (their values are stored); atom.acq_rel.gpu by each warp; the
// last one fence.acq_rel.sys, st.release.sys. Only then may a source stage anew.
__device__ __forceinline__ void count_pulled(const FusedParams& params, int which, int rows, int64_t all) {
    const Peers& peers = params.peers;
    if (peers.ranks == 1 || ptx::add_acq_rel_gpu(params.counters.pulled + which, rows) + rows != all) return;
    const uint32_t epoch = static_cast<uint32_t>(state_word(peers, kStateOpEpoch));
    for (int r = 0; r < peers.ranks; ++r) {
        signal(peers, r, peers.layout.pulled, params.pulls[which].buffer * peers.ranks + peers.rank, epoch_word(epoch));
    }
}

// Lanes wait until the peers their rows belong to have staged the second pull's, each peer once per warp and launch:
// ld.acquire.sys by a lane; barrier.
__device__ __forceinline__ void wait_for_staged(const Peers& peers, int rank, uint32_t epoch, uint64_t& seen) {
    const bool unseen = rank >= 0 && rank != peers.rank && !(seen >> rank & 1);
    if (!__any_sync(0xffffffffu, unseen)) return;
    if (unseen) {
        wait_word(peers, words(peers, peers.rank, peers.layout.staged) + rank, epoch, Waiting::kStaged, rank);
    }
    add_seen(seen, rank, unseen);
}

constexpr int64_t kAllRows = INT64_MAX;

// Waits until units of an expert not far before the row's are being worked on: rows pulled much earlier only drive what
// is in use out of L2. A unit that waits for a row has moved the frontier to the row's expert, so nobody waits for
// ever. Whole warp, which does `meanwhile()` between two looks.
template <class Meanwhile>
__device__ __forceinline__ void wait_for_frontier(const FusedParams& params, int which, int64_t row, int& expert,
                                                  Meanwhile&& meanwhile) {
    const int* offset = params.products[0].expert_offset;
    while (row >= offset[expert + 1]) ++expert;
    const int* frontier = params.counters.frontier + which;
    const int least = least_frontier(expert, params.pull_lead);
    for (unsigned long long start = 0;; meanwhile()) {
        const bool there =
            (threadIdx.x & 31) == 0 && counter_there<200>(params.peers, frontier, least, Waiting::kFrontier, start);
        if (__shfl_sync(0xffffffffu, there, 0)) return random_delay();
    }
}

// Pulls claims of rows in ascending order: all of them, not too far ahead, or at once until one lies at or beyond
// `until`. Whole warp. `seen`: ranks whose ready word this warp has seen. `meanwhile`: see wait_for_frontier.
template <int kDepth, class Meanwhile>
__device__ __forceinline__ void pull_rows(const FusedParams& params, int which, int64_t until, uint64_t& seen,
                                          Meanwhile&& meanwhile) {
    const Peers& peers = params.peers;
    const Pull& pull = params.pulls[which];
    const int lane = threadIdx.x & 31;
    const int64_t rows = *params.num_rows;
    const uint64_t expected = expected_ready(params);
    uint64_t staged = 0;  // ranks whose staging this warp has seen complete
    int expert = 0;
    while (true) {
        int claim = lane == 0 ? atomicAdd(params.counters.pulls + which, 1) : 0;
        claim = __shfl_sync(0xffffffffu, claim, 0);
        const int64_t first = int64_t{claim} * params.claim_rows;
        if (first >= rows) {
            // Exactly one claim starts at the end (M is a multiple of claim_rows): it counts one, so that a rank
            // without rows acknowledges too.
            if (first == rows && lane == 0) count_pulled(params, which, 1, rows + 1);
            __syncwarp();
            return;
        }
        if (until == kAllRows) wait_for_frontier(params, which, first, expert, meanwhile);
        const bool mine = lane < params.claim_rows;
        const RowSource source = decode_source(mine ? params.source_of[first + lane] : -1);
        wait_for_peers(peers, source.rank, expected, seen);
        if (which == 1) wait_for_staged(peers, source.rank, epoch_of(expected), staged);
        const RowOrigin origin = row_origin(params, pull, source);
        if (mine && pull.weighted) params.row_weights[first + lane] = origin.weight;
        for (int i = 0; i < params.claim_rows; ++i) {
            const uint64_t from = __shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(origin.from), i);
            copy_row<kDepth>(pull.pool + (first + i) * params.row_bytes, reinterpret_cast<const uint8_t*>(from),
                             params.row_bytes);
        }
        // Rows -> TMA loads: each writer fence.proxy.async; barrier; one lane red.release.gpu. The scheduler acquires
        // and fences again.
        ptx::fence_async();
        __syncwarp();
        if (lane == 0) {
            add_counter(params.counters.arrived + which * params.tiles + first / kRowTile, params.claim_rows);
            count_pulled(params, which, params.claim_rows, rows + 1);
        }
        __syncwarp();
        if (first + params.claim_rows >= until) return;
    }
}

}  // namespace megamoe
