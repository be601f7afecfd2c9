// Sum role of the fused kernels: y (or dx) of a token is the sum of its combine slots, fp32, k ascending, rounded once.
// Warps sweep over blocks of 32 tokens and take those whose slots are all filled.
#pragma once
#include "roles/combine.cuh"
#include "roles/fused_params.cuh"

namespace megamoe {

constexpr int kMaxTopK = 16;
constexpr int kSlotsAsked = 8;  // slots of a token that are looked at together

// Bits of the kept slots of a token, and whether the rank that fills each has done so.
struct TokenState {
    unsigned kept;
    bool filled;
};

__device__ __forceinline__ TokenState token_state(const FusedParams& params, int token, uint32_t epoch) {
    const Peers& peers = params.peers;
    const int local = params.experts / peers.ranks;
    TokenState state{0, true};
    for (int base = 0; base < params.top_k; base += kSlotsAsked) {
        // All of one kind of load before the next kind: one after another they cost a memory latency each.
        int tile[kSlotsAsked], owner[kSlotsAsked];
#pragma unroll
        for (int i = 0; i < kSlotsAsked; ++i) {
            const bool there = base + i < params.top_k;
            const int flat = token * params.top_k + (there ? base + i : 0);
            const long long row = there ? params.slot_of[flat] : -1;
            tile[i] = row < 0 ? -1 : static_cast<int>(row / kRowTile);
            owner[i] = params.ids[flat];
        }
        uint32_t flag[kSlotsAsked];
#pragma unroll
        for (int i = 0; i < kSlotsAsked; ++i) {
            flag[i] =
                tile[i] < 0 ? epoch : ptx::load_relaxed_sys(tile_flag(peers, peers.rank, owner[i] / local, tile[i]));
        }
#pragma unroll
        for (int i = 0; i < kSlotsAsked; ++i) {
            if (tile[i] >= 0) state.kept |= 1u << (base + i);
            state.filled = state.filled && static_cast<int>(flag[i] - epoch) >= 0;
        }
    }
    return state;
}

// One token by a warp. In flight per lane: kSteps loads of 16 bytes from each of kBatch slots.
template <int kBatch, int kSteps>
__device__ __forceinline__ void sum_slots(const FusedParams& params, int token, unsigned kept) {
    constexpr int kStepBytes = 32 * 16;
    const Peers& peers = params.peers;
    const int lane = threadIdx.x & 31;
    const int64_t stride = peers.layout.shape.tokens * params.row_bytes;
    const uint8_t* slots = combine_slot(peers, peers.rank, token, 0);
    uint8_t* out = params.tokens_out + int64_t{token} * params.row_bytes;
    for (int at = lane * 16; at < params.row_bytes; at += kSteps * kStepBytes) {
        float sum[kSteps][8] = {};
        for (int base = 0; base < params.top_k; base += kBatch) {
            uint4 v[kBatch][kSteps];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const bool there = base + i < params.top_k && (kept >> (base + i) & 1);
#pragma unroll
                for (int s = 0; s < kSteps; ++s) {
                    const int column = at + s * kStepBytes;
                    const bool inside = there && column < params.row_bytes;
                    v[i][s] = inside ? ptx::load_v4_once(slots + (base + i) * stride + column) : uint4{0, 0, 0, 0};
                }
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                if (base + i >= params.top_k) continue;
#pragma unroll
                for (int s = 0; s < kSteps; ++s) add_bf16(sum[s], v[i][s], base + i == 0);
            }
        }
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            const int column = at + s * kStepBytes;
            if (column < params.row_bytes) ptx::store_v4(out + column, round_bf16(sum[s]));
        }
    }
    if (params.dweights != nullptr && lane < params.top_k) {
        const int flat = token * params.top_k + lane;
        params.dweights[flat] = kept >> lane & 1 ? ptx::load_float(&slot_dweight(peers, peers.rank, flat)) : 0.0f;
    }
}

// At most `most` of the set bits, from a place of the warp's own on: many warps sweep over few blocks at the end.
__device__ __forceinline__ unsigned pick_tokens(unsigned filled, int most) {
    const unsigned turn = (blockIdx.x * 5 + threadIdx.x / 32 * 11) & 31;
    unsigned rest = __funnelshift_r(filled, filled, turn), picked = 0;
    for (int i = 0; i < most && rest != 0; ++i) {
        const unsigned lowest = rest & (0u - rest);
        picked |= lowest;
        rest ^= lowest;
    }
    return __funnelshift_l(picked, picked, turn);
}

// Takes filled tokens of one block that no other warp has; returns how many it summed. Whole warp.
template <int kBatch, int kSteps, int kTakenTokens>
__device__ __forceinline__ int sum_block(const FusedParams& params, int block, uint32_t epoch) {
    const int lane = threadIdx.x & 31;
    const int token = block * 32 + lane;
    unsigned taken = *const_cast<volatile unsigned*>(params.counters.taken + block);
    TokenState state{0, false};
    if (token < params.tokens && !(taken >> lane & 1)) state = token_state(params, token, epoch);
    unsigned mine = pick_tokens(__ballot_sync(0xffffffffu, state.filled), kTakenTokens);
    if (mine == 0) return 0;
    if (lane == 0) taken = atomicOr(params.counters.taken + block, mine);
    mine &= ~__shfl_sync(0xffffffffu, taken, 0);
    // Flag -> slots: ld.relaxed.sys by a lane, fence.acq_rel.sys by the same; barrier; loads by all lanes.
    if (state.filled) ptx::fence_acq_rel_sys();
    random_delay();
    __syncwarp();
    for (unsigned rest = mine; rest != 0; rest &= rest - 1) {
        const int i = __ffs(rest) - 1;
        sum_slots<kBatch, kSteps>(params, block * 32 + i, __shfl_sync(0xffffffffu, state.kept, i));
    }
    return __popc(mine);
}

// The first thing missing, for the record of a wait that failed: rank, or -1.
__device__ __forceinline__ int missing_rank(const FusedParams& params, int token, uint32_t epoch) {
    const Peers& peers = params.peers;
    for (int k = 0; k < params.top_k; ++k) {
        const long long row = params.slot_of[token * params.top_k + k];
        if (row < 0) continue;
        const int owner = params.ids[token * params.top_k + k] / (params.experts / peers.ranks);
        const uint32_t flag =
            ptx::load_relaxed_sys(tile_flag(peers, peers.rank, owner, static_cast<int>(row / kRowTile)));
        if (static_cast<int>(flag - epoch) < 0) return owner;
    }
    return -1;
}

[[noreturn]] static __device__ __noinline__ void fail_sum(const FusedParams& params, Failure failure, uint32_t epoch,
                                                          int summed) {
    int peer = -1;
    for (int token = 0; token < params.tokens && peer < 0; ++token) peer = missing_rank(params, token, epoch);
    fail(params.peers, Waiting::kSlotsFilled, failure, peer, epoch_word(epoch), static_cast<uint64_t>(summed));
}

// Sweeps until all tokens are summed. Whole warp. Only after this rank's units have all been handed out or by warps
// that no unit needs: a CTA that waited here for its own tiles would wait for ever. kTakenTokens: that a warp takes at
// a time. Returns how many tokens this warp has summed.
template <int kBatch, int kSteps, int kTakenTokens>
__device__ int sum_tokens(const FusedParams& params, uint64_t& seen) {
    const Peers& peers = params.peers;
    const int lane = threadIdx.x & 31;
    const uint32_t epoch = static_cast<uint32_t>(state_word(peers, kStateOpEpoch));
    const int blocks = ceil_div(params.tokens, 32);
    // Whoever finishes has seen every peer start: none can be an operation behind.
    wait_for_all_peers(peers, expected_ready(params), seen);
    unsigned long long start = ptx::global_nanoseconds();  // of the time without any progress
    int before = 0, mine = 0;
    // Every warp sweeps over all blocks; only where it begins depends on its place.
    int block = blocks == 0 ? 0 : static_cast<int>((blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * 37 % blocks);
    for (int idle = 0;; block = block + 1 < blocks ? block + 1 : 0) {
        // One lane decides for the warp: another one might read a newer number and leave alone.
        int summed = lane == 0 ? ptx::load_relaxed_gpu(params.counters.summed) : 0;
        summed = __shfl_sync(0xffffffffu, summed, 0);
        if (summed >= params.tokens) return mine;
        if (summed != before) before = summed, start = ptx::global_nanoseconds();
        const int count = sum_block<kBatch, kSteps, kTakenTokens>(params, block, epoch);
        mine += count;
        if (count != 0) {
            if (lane == 0) atomicAdd(params.counters.summed, count);
            idle = 0;
            continue;
        }
        if (++idle < 4) continue;
        __nanosleep(1000);
        if (lane != 0) continue;
        if (ptx::load_relaxed_sys(words(peers, peers.rank, peers.layout.abort)) != 0) {
            fail_sum(params, Failure::kAborted, epoch, summed);
        }
        if (ptx::global_nanoseconds() - start > peers.deadline.nanoseconds) {
            fail_sum(params, Failure::kExpired, epoch, summed);
        }
    }
}

}  // namespace megamoe
