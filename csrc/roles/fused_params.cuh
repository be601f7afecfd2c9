// What one fused launch works on: its products, the rows that travel, and the counters by which its roles meet.
#pragma once
#include "kernels/plan.cuh"
#include "roles/dispatch.cuh"
#include "roles/gemm_params.cuh"
#include "schedule/pulls.cuh"

namespace megamoe {

// Rows that come in: of x in forward; of dY, and then of x, in backward.
struct Pull {
    int buffer;             // staging buffer of the peers
    const uint8_t* tokens;  // [T, H] bf16 of this rank
    const float* weights;   // [T, K] p of this rank; null where it has no token
    bool weighted;          // p comes with the rows
    uint8_t* pool;          // [capacity, H] bf16
};

// Counters in device memory, zeroed by an earlier node of the stream.
struct FusedCounters {
    int* units;       // handed out
    int* pulls;       // [2] claims of rows to pull
    int* pulled;      // [2] rows pulled
    int* turns;       // [2] to sum tokens, begun in each round
    int* stagings;    // claims of tokens to stage
    int* staged;      // tokens staged
    int* frontier;    // [2] highest expert, of those a pull is for, that a unit was handed out of
    int* arrived;     // [2, tiles] rows that have arrived of each row tile
    int* made;        // [tiles] finished (column tile, warpgroup)s of fc1 or dgrad2
    int* pushed;      // [tiles] of fc2 or dgrad1
    unsigned* taken;  // [ceil(T / 32)] tokens that a warp has taken to sum, a bit each
};

constexpr int kFusedScalars = 11;  // ints before the arrays

struct FusedParams {
    GemmParams products[kMaxProducts];
    Order order;
    Peers peers;
    Op op;
    const int* plan_control;     // kPlanCode, kPlanId
    const long long* source_of;  // [M]
    const int* num_rows;         // M: expert_offset[L]
    const long long* slot_of;    // [T, K]
    const int* ids;              // [T, K]
    int tokens;
    int top_k;
    int experts;     // E
    int row_bytes;   // of a token
    int claim_rows;  // rows of a pull claim: a power of two up to 32
    int first_rows;  // rows that the math warps help to pull before their first tile
    int pull_lead;   // experts that rows are pulled ahead of the frontier
    int tiles;       // row tiles of the pools
    Pull pulls[2];
    int num_pulls;
    unsigned staged;      // staging buffers that the pulls read, a bit each; the second pull's is filled in the launch
    float* row_weights;   // [capacity] p of each row
    uint8_t* tokens_out;  // [T, H] bf16: y or dx
    float* dweights;      // [T, K]; null in forward
    FusedCounters counters;
};

__device__ __forceinline__ uint64_t expected_ready(const FusedParams& params) {
    const uint32_t epoch = static_cast<uint32_t>(state_word(params.peers, kStateOpEpoch));
    return ready_word(epoch, params.op, params.plan_control[kPlanId], params.staged);
}

// By a whole warp, before it touches what any peer owns.
__device__ __forceinline__ void wait_for_all_peers(const Peers& peers, uint64_t expected, uint64_t& seen) {
    for (int first = 0; first < peers.ranks; first += 32) {
        const int rank = first + static_cast<int>(threadIdx.x & 31);
        wait_for_peers(peers, rank < peers.ranks ? rank : -1, expected, seen);
    }
}

}  // namespace megamoe
