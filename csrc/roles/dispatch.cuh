// Dispatch role: a warp pulls rows from the staging buffers of the ranks that hold the tokens into this rank's pool.
#pragma once
#include "roles/mover.cuh"

namespace megamoe {

constexpr int kSourceShift = 40;  // source_of = source rank << 40 | t * K + k; -1 = padding

struct RowSource {
    int rank;  // -1: padding
    int flat;  // t * K + k
};

__device__ __forceinline__ RowSource decode_source(long long source) {
    if (source < 0) return {-1, 0};
    return {static_cast<int>(source >> kSourceShift), static_cast<int>(source & ((1ll << kSourceShift) - 1))};
}

// What one operation moves; dispatch and combine share it.
struct RowsParams {
    Peers peers;
    RowCut cut;
    Op op;
    int buffer;  // staging buffer
    int top_k;
    int tokens;                  // of this rank
    int experts;                 // E
    const int* plan_control;     // kPlanCode, kPlanId
    const long long* source_of;  // [M]
    const int* num_rows;         // M, in device memory: expert_offset[L]
    const long long* slot_of;    // [T, K]
    const int* ids;              // [T, K]
    uint8_t* pool;               // [>= M, H] bf16, this rank's rows
    uint8_t* tokens_in;          // [T, H] bf16: x or dy of this rank
    uint8_t* tokens_out;         // [T, H] bf16: y or dx of this rank
    const float* weights;        // [T, K] p of this rank; null: not dispatched
    float* row_weights;          // [M] dispatch: p of each row; combine: dp of each row; null: none
    float* dweights;             // [T, K] dp as it came back; null: none
    int* control;                // kRowsControlInts, zeroed by announce
};

enum RowsControl : int { kRowQueue, kRowTicket, kRowsControlInts = 4 };

__device__ __forceinline__ uint64_t expected_ready(const RowsParams& params, int plan_id) {
    const uint32_t epoch = static_cast<uint32_t>(state_word(params.peers, kStateOpEpoch));
    return ready_word(epoch, params.op, plan_id);
}

// Lanes wait for the peers their rows belong to, each peer once per warp and launch: `seen` is the warp's set of ranks.
// Afterwards the async proxy may touch what was announced: ld.acquire.sys by a lane; barrier; fence.proxy.async.
__device__ __forceinline__ void wait_for_peers(const Peers& peers, int rank, uint64_t expected, uint64_t& seen) {
    const bool unseen = rank >= 0 && rank != peers.rank && !(seen >> rank & 1);
    if (!__any_sync(0xffffffffu, unseen)) return;
    if (unseen) wait_ready(peers, rank, expected);
    const uint64_t bit = unseen ? 1ull << rank : 0;
    const uint32_t low = __reduce_or_sync(0xffffffffu, static_cast<uint32_t>(bit));
    const uint32_t high = __reduce_or_sync(0xffffffffu, static_cast<uint32_t>(bit >> 32));
    seen |= static_cast<uint64_t>(high) << 32 | low;
    __syncwarp();
    ptx::fence_async();
}

template <int kStages>
__device__ void dispatch_role(MoverShared<kStages>& shared, const RowsParams& params, int plan_id) {
    const Peers& peers = params.peers;
    const int lane = threadIdx.x & 31;
    const int64_t rows = *params.num_rows;
    const uint64_t expected = expected_ready(params, plan_id);
    Mover<kStages> mover(shared, params.cut, peers.deadline);
    Claims claims(params.control + kRowQueue, params.cut.claim_rows);
    uint64_t seen = 0;
    for (int64_t first = claims.take(); first < rows; first = claims.take()) {
        const int64_t row = first + lane;
        const bool mine = lane < params.cut.claim_rows && row < rows;
        const RowSource source = decode_source(mine ? params.source_of[row] : -1);
        wait_for_peers(peers, source.rank, expected, seen);
        RowMove move{nullptr, mine ? params.pool + row * params.cut.row_bytes : nullptr};
        float weight = 0;
        if (source.rank >= 0) {
            const bool here = source.rank == peers.rank;
            const uint8_t* tokens = here ? params.tokens_in : staging(peers, source.rank, params.buffer);
            move.from = tokens + int64_t{source.flat / params.top_k} * params.cut.row_bytes;
            if (params.row_weights != nullptr) {
                const float* p = here ? params.weights : staged_weights(peers, source.rank, params.buffer);
                weight = ptx::load_float(p + source.flat);
            }
        }
        if (mine && params.row_weights != nullptr) params.row_weights[row] = weight;
        mover.move(move);
    }
    mover.finish();
}

}  // namespace megamoe
