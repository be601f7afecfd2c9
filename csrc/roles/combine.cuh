// Combine roles: a warp pushes rows into the combine slots of the ranks that hold the tokens; a CTA sums a token's
// rows.
#pragma once
#include <cuda_bf16.h>

#include "roles/dispatch.cuh"

namespace megamoe {

__device__ __forceinline__ float& slot_dweight(const Peers& peers, int at, int flat) {
    return reinterpret_cast<float*>(region(peers, at, peers.layout.dweights))[flat];
}

// Rows of this rank's own tokens stay where they are: the sum reads them in the pool.
template <int kStages>
__device__ void push_role(MoverShared<kStages>& shared, const RowsParams& params, int plan_id) {
    const Peers& peers = params.peers;
    const uint64_t expected = expected_ready(params, plan_id);
    Mover<kStages> mover(shared, params.cut, peers.deadline);
    RowClaims claims(params, kRowQueue);
    uint64_t seen = 0;
    int64_t row;
    RowSource source;
    while (claims.take(row, source)) {
        wait_for_peers(peers, source.rank, expected, seen);
        RowMove move{};
        if (source.rank >= 0 && source.rank != peers.rank) {
            move.from = params.pool + row * params.cut.row_bytes;
            move.to = combine_slot(peers, source.rank, source.flat / params.top_k, source.flat % params.top_k);
            // A plain store to a peer; the last CTA's release covers it.
            if (params.row_weights != nullptr) slot_dweight(peers, source.rank, source.flat) = params.row_weights[row];
        }
        mover.move(move);
    }
    mover.finish();
}

__device__ __forceinline__ void add_bf16(float (&sum)[8], uint4 v, bool first) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float lower = __uint_as_float(words[i] << 16), upper = __uint_as_float(words[i] & 0xffff0000u);
        sum[2 * i] = first ? lower : __fadd_rn(sum[2 * i], lower);
        sum[2 * i + 1] = first ? upper : __fadd_rn(sum[2 * i + 1], upper);
    }
}

__device__ __forceinline__ uint4 round_bf16(const float (&sum)[8]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(sum[2 * i], sum[2 * i + 1]);
        words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    return {words[0], words[1], words[2], words[3]};
}

// Where the row of slot (token, k) lies for the sum; null: dropped, counts as zeros.
__device__ __forceinline__ const uint8_t* slot_row(const RowsParams& params, int token, int k) {
    const Peers& peers = params.peers;
    const int flat = token * params.top_k + k;
    const long long row = params.slot_of[flat];
    if (row < 0) return nullptr;
    const int owner = params.ids[flat] / (params.experts / peers.ranks);
    if (owner == peers.rank) return params.pool + row * params.cut.row_bytes;
    return combine_slot(peers, peers.rank, token, k);
}

// dp of slot (token, k), by one thread.
__device__ __forceinline__ float collect_dweight(const RowsParams& params, int token, int k) {
    const int flat = token * params.top_k + k;
    const long long row = params.slot_of[flat];
    if (row < 0) return 0;
    const int owner = params.ids[flat] / (params.experts / params.peers.ranks);
    if (owner == params.peers.rank) return params.row_weights[row];
    return ptx::load_float(&slot_dweight(params.peers, params.peers.rank, flat));
}

// y of one token by the whole CTA: fp32, k ascending, rounded once. `rows` [K] lie in shared memory.
template <int kBatch>
__device__ void sum_token(const RowsParams& params, const uint8_t* const* rows, int token) {
    const int parts = params.cut.row_bytes / 16;
    uint8_t* out = params.tokens_out + int64_t{token} * params.cut.row_bytes;
    for (int part = threadIdx.x; part < parts; part += blockDim.x) {
        float sum[8] = {};
        for (int base = 0; base < params.top_k; base += kBatch) {
            uint4 values[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const uint8_t* row = base + i < params.top_k ? rows[base + i] : nullptr;
                values[i] = row != nullptr ? ptx::load_v4(row + int64_t{part} * 16) : uint4{0, 0, 0, 0};
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                if (base + i < params.top_k) add_bf16(sum, values[i], base + i == 0);
            }
        }
        reinterpret_cast<uint4*>(out)[part] = round_bf16(sum);
    }
}

}  // namespace megamoe
