// Dispatch role: a warp pulls tokens from the staging buffers of the ranks that hold them into rows of this rank's
// pool.
#pragma once
#include <climits>

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
    int* row_of;                 // [R, T at most, K] dispatch: scratch, see rows_of_token
    const int* num_rows;         // M, in device memory: expert_offset[L]
    const long long* slot_of;    // [T, K]
    const int* ids;              // [T, K]
    uint8_t* pool;               // [>= M, H] bf16, this rank's rows
    uint8_t* tokens_in;          // [T, H] bf16: x or dy of this rank
    uint8_t* tokens_out;         // [T, H] bf16: y or dx of this rank
    const float* weights;        // [T, K] p of this rank; null: not dispatched
    float* row_weights;          // [M] dispatch: p of each row; combine: dp of each row; null: none
    float* dweights;             // [T, K] dp as it came back; null: none
    int* control;                // zeroed by announce: RowsControl, or a fused pass's counters
    int control_ints;
};

enum RowsControl : int { kRowQueue, kRowTicket, kOwnRowQueue, kRowsControlInts = 4 };

__device__ __forceinline__ uint64_t expected_ready(const RowsParams& params, int plan_id) {
    const uint32_t epoch = static_cast<uint32_t>(state_word(params.peers, kStateOpEpoch));
    return ready_word(epoch, params.op, plan_id);
}

// Claims of rows and, a claim ahead, where they come from: that load would stand before every move.
class RowClaims {
public:
    __device__ RowClaims(const RowsParams& params, RowsControl queue)
        : claims_(params.control + queue, params.cut.claim_rows),
          source_of_(params.source_of),
          rows_(*params.num_rows),
          claim_rows_(params.cut.claim_rows) {
        fetch();
    }

    // This lane's row of the next claim, -1 for none, and its source. False: all are claimed. Whole warp.
    __device__ bool take(int64_t& row, RowSource& source) {
        if (first_ >= rows_) return false;
        row = row_, source = decode_source(source_);
        fetch();
        return true;
    }

private:
    __device__ void fetch() {
        const int lane = threadIdx.x & 31;
        first_ = claims_.take();
        row_ = lane < claim_rows_ && first_ + lane < rows_ ? first_ + lane : -1;
        source_ = row_ >= 0 ? source_of_[row_] : -1;
    }

    Claims claims_;
    const long long* source_of_;
    int64_t rows_, first_, row_;
    long long source_;
    int claim_rows_;
};

// Adds the ranks of those lanes that have waited for theirs to the warp's set `seen`; barrier.
__device__ __forceinline__ void add_seen(uint64_t& seen, int rank, bool waited) {
    const uint64_t bit = waited ? 1ull << rank : 0;
    const uint32_t low = __reduce_or_sync(0xffffffffu, static_cast<uint32_t>(bit));
    const uint32_t high = __reduce_or_sync(0xffffffffu, static_cast<uint32_t>(bit >> 32));
    seen |= static_cast<uint64_t>(high) << 32 | low;
    __syncwarp();
}

// Lanes wait for the peers their rows belong to, each peer once per warp and launch: `seen` is the warp's set of ranks.
// Afterwards the async proxy may touch what was announced: ld.acquire.sys by a lane; barrier; fence.proxy.async.
__device__ __forceinline__ void wait_for_peers(const Peers& peers, int rank, uint64_t expected, uint64_t& seen) {
    const bool unseen = rank >= 0 && rank != peers.rank && !(seen >> rank & 1);
    if (!__any_sync(0xffffffffu, unseen)) return;
    if (unseen) wait_ready(peers, rank, expected);
    add_seen(seen, rank, unseen);
    ptx::fence_async();
}

// The rows of this rank that hold one token of a peer, [K]: source_of's inverse. Negative: that slot has none here.
__device__ __forceinline__ int* rows_of_token(const RowsParams& params, int rank, int token) {
    return params.row_of + (rank * params.peers.layout.shape.tokens + token) * params.top_k;
}

// INT_MAX: none.
__device__ __forceinline__ int first_of(const int* rows, int top_k) {
    int first = INT_MAX;
#pragma unroll 4
    for (int k = 0; k < top_k; ++k) first = min(first, rows[k] >= 0 ? rows[k] : INT_MAX);
    return first;
}

// A token travels once, however many of its experts are here: to the lowest of its rows, and from there, still in
// shared memory, to the others. Claims of tokens go round the peers, so that no peer is asked by all ranks at once.
template <int kStages>
__device__ void pull_from_peers(Mover<kStages>& mover, const RowsParams& params, uint64_t expected) {
    const Peers& peers = params.peers;
    const int others = peers.ranks - 1, lane = threadIdx.x & 31;
    const int64_t all = others * peers.layout.shape.tokens;
    Claims claims(params.control + kRowQueue, params.cut.claim_rows);
    uint64_t seen = 0;
    for (int64_t first; (first = claims.take()) < all;) {
        const int64_t mine = first + lane;
        const int token = static_cast<int>(mine / others);
        int rank = (peers.rank + 1 + static_cast<int>(mine % others)) % peers.ranks, row = INT_MAX;
        const int* rows = nullptr;
        if (lane < params.cut.claim_rows && mine < all) {
            rows = rows_of_token(params, rank, token);
            row = first_of(rows, params.top_k);
        }
        if (row == INT_MAX) rank = -1;
        wait_for_peers(peers, rank, expected, seen);
        RowMove move{};
        if (rank >= 0) {
            move.from = staging(peers, rank, params.buffer) + int64_t{token} * params.cut.row_bytes;
            move.to = params.pool + int64_t{row} * params.cut.row_bytes;
            move.twins = rows;
            const float* p = staged_weights(peers, rank, params.buffer) + int64_t{token} * params.top_k;
            for (int k = 0; k < params.top_k && params.row_weights != nullptr; ++k) {
                if (rows[k] >= 0) params.row_weights[rows[k]] = ptx::load_float(p + k);
            }
        }
        mover.move(move);
    }
}

// The rank's own tokens, row by row, and zeros for padding.
template <int kStages>
__device__ void pull_own(Mover<kStages>& mover, const RowsParams& params) {
    RowClaims claims(params, kOwnRowQueue);
    int64_t row;
    RowSource source;
    while (claims.take(row, source)) {
        RowMove move{};
        if (row >= 0 && (source.rank < 0 || source.rank == params.peers.rank)) {
            const bool padding = source.rank < 0;
            const int64_t token = source.flat / params.top_k;
            move.from = padding ? nullptr : params.tokens_in + token * params.cut.row_bytes;
            move.to = params.pool + row * params.cut.row_bytes;
            if (params.row_weights != nullptr) {
                params.row_weights[row] = padding ? 0.0f : ptx::load_float(params.weights + source.flat);
            }
        }
        mover.move(move);
    }
}

// peers_too: else only the rank's own rows.
template <int kStages>
__device__ void dispatch_role(MoverShared<kStages>& shared, const RowsParams& params, int plan_id, bool peers_too) {
    Mover<kStages> mover(shared, params.cut, params.peers.deadline, {params.pool, params.top_k});
    if (peers_too && params.peers.ranks > 1) pull_from_peers(mover, params, expected_ready(params, plan_id));
    pull_own(mover, params);
    mover.finish();
}

}  // namespace megamoe
