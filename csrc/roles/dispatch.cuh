// Dispatch role: a warp pulls rows from the staging buffers of the ranks that hold the tokens into this rank's pool.
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
    int* row_of;          // [R, most tokens of a rank, K] dispatch: source_of's inverse, for rows of peers; scratch
    const int* num_rows;  // M, in device memory: expert_offset[L]
    const long long* slot_of;  // [T, K]
    const int* ids;            // [T, K]
    uint8_t* pool;             // [>= M, H] bf16, this rank's rows
    uint8_t* tokens_in;        // [T, H] bf16: x or dy of this rank
    uint8_t* tokens_out;       // [T, H] bf16: y or dx of this rank
    const float* weights;      // [T, K] p of this rank; null: not dispatched
    float* row_weights;        // [M] dispatch: p of each row; combine: dp of each row; null: none
    float* dweights;           // [T, K] dp as it came back; null: none
    int* control;              // zeroed by announce: RowsControl, or a fused pass's counters
    int control_ints;
};

enum RowsControl : int { kRowQueue, kRowTicket, kOwnRowQueue, kRowsControlInts = 4 };

// Which rows a warp pulls. NVLink is busy only while enough of its rows are on their way: warps that pull the rank's
// own rows as well would keep half as many.
enum class Which { kAll, kPeers, kOwn };

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

// The rows of this rank that hold one token of a peer.
__device__ __forceinline__ int* rows_of_token(const RowsParams& params, int rank, int token) {
    return params.row_of + (rank * params.peers.layout.shape.tokens + token) * params.top_k;
}

__device__ __forceinline__ int first_of(const int* rows, int top_k) {
    int first = INT_MAX;
    for (int k = 0; k < top_k; ++k) first = rows[k] >= 0 && rows[k] < first ? rows[k] : first;
    return first;
}

// A token travels once, however many of its experts are here: with the lowest of its rows, which is stored to all.
template <int kStages>
__device__ void dispatch_role(MoverShared<kStages>& shared, const RowsParams& params, int plan_id, Which which) {
    const Peers& peers = params.peers;
    const uint64_t expected = expected_ready(params, plan_id);
    Mover<kStages> mover(shared, params.cut, peers.deadline, {params.pool, params.top_k});
    RowClaims claims(params, which == Which::kOwn ? kOwnRowQueue : kRowQueue);
    uint64_t seen = 0;
    int64_t row;
    RowSource source;
    while (claims.take(row, source)) {
        const bool remote = source.rank >= 0 && source.rank != peers.rank;  // padding counts as the rank's own
        if (which != Which::kAll && remote != (which == Which::kPeers)) row = -1, source.rank = -1;
        wait_for_peers(peers, source.rank, expected, seen);
        RowMove move{nullptr, row >= 0 ? params.pool + row * params.cut.row_bytes : nullptr, nullptr};
        float weight = 0;
        if (source.rank >= 0) {
            const int token = source.flat / params.top_k;
            const uint8_t* tokens = remote ? staging(peers, source.rank, params.buffer) : params.tokens_in;
            move.from = tokens + int64_t{token} * params.cut.row_bytes;
            if (remote) {
                move.twins = rows_of_token(params, source.rank, token);
                if (first_of(move.twins, params.top_k) != row) move = {};  // comes with another row
            }
            if (params.row_weights != nullptr) {
                const float* p = remote ? staged_weights(peers, source.rank, params.buffer) : params.weights;
                weight = ptx::load_float(p + source.flat);
            }
        }
        if (row >= 0 && params.row_weights != nullptr) params.row_weights[row] = weight;
        mover.move(move);
    }
    mover.finish();
}

}  // namespace megamoe
