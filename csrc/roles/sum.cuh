// Sum role of the fused kernels: y (or dx) of a token is the sum of its combine slots, fp32, k ascending, rounded once.
//
// While there is other work, movers sweep over blocks of 32 tokens and take those whose slots are all filled, in
// backward also when a pull makes them wait. Math warps that have no more units take turns instead, two tokens each:
// one round for those that are filled, and one that waits for the rest. (By sweeps many warps would look for few tokens
// at the end.)
#pragma once
#include "roles/combine.cuh"
#include "roles/fused_params.cuh"

namespace megamoe {

constexpr int kMaxTopK = 16;
constexpr int kSlotsAsked = 8;                // slots of a token that a lane looks at together
constexpr int kIdleBlocks = 4;                // blocks without work after which a sweep goes slowly
constexpr int kTurnTokens = 2;                // tokens of a turn
constexpr int kTurnLanes = 32 / kTurnTokens;  // that look at a token's slots
constexpr unsigned kTurnSlots = (1u << kTurnLanes) - 1;
static_assert(kTurnLanes >= kMaxTopK && 32 % kTurnTokens == 0);

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

// Takes filled tokens of a block of 32, a bit each; those that no other warp has are this one's to sum. Whole warp.
__device__ __forceinline__ unsigned take_tokens(const FusedParams& params, int block, unsigned filled) {
    unsigned taken = 0;
    if ((threadIdx.x & 31) == 0) taken = atomicOr(params.counters.taken + block, filled);
    const unsigned mine = filled & ~__shfl_sync(0xffffffffu, taken, 0);
    // Flag -> slots: ld.relaxed.sys by a lane, fence.acq_rel.sys by the same; barrier; loads by all lanes.
    ptx::fence_acq_rel_sys();
    random_delay();
    __syncwarp();
    return mine;
}

// Sums filled tokens of one block that no other warp has; returns how many. Whole warp.
template <int kBatch, int kSteps, int kTakenTokens>
__device__ __forceinline__ int sum_block(const FusedParams& params, int block, uint32_t epoch) {
    const int lane = threadIdx.x & 31;
    const int token = block * 32 + lane;
    const unsigned taken = *const_cast<volatile unsigned*>(params.counters.taken + block);
    TokenState state{0, false};
    if (token < params.tokens && !(taken >> lane & 1)) state = token_state(params, token, epoch);
    const unsigned picked = pick_tokens(__ballot_sync(0xffffffffu, state.filled), kTakenTokens);
    if (picked == 0) return 0;
    const unsigned mine = take_tokens(params, block, picked);
    for (unsigned rest = mine; rest != 0; rest &= rest - 1) {
        const int i = __ffs(rest) - 1;
        sum_slots<kBatch, kSteps>(params, block * 32 + i, __shfl_sync(0xffffffffu, state.kept, i));
    }
    return __popc(mine);
}

// Records the first slot that is missing of tokens [first, end), and the epoch in which its row tile was last pushed.
[[noreturn]] static __device__ __noinline__ void fail_sum(const FusedParams& params, Failure failure, uint32_t epoch,
                                                          int first, int end) {
    const Peers& peers = params.peers;
    for (int flat = first * params.top_k; flat < min(end, params.tokens) * params.top_k; ++flat) {
        const long long row = params.slot_of[flat];
        if (row < 0) continue;
        const int owner = params.ids[flat] / (params.experts / peers.ranks);
        const uint32_t flag =
            ptx::load_relaxed_sys(tile_flag(peers, peers.rank, owner, static_cast<int>(row / kRowTile)));
        if (static_cast<int>(flag - epoch) >= 0) continue;
        fail(peers, Waiting::kSlotsFilled, failure, owner, epoch_word(epoch), epoch_word(flag));
    }
    fail(peers, Waiting::kSlotsFilled, failure, -1, epoch_word(epoch), epoch_word(epoch));
}

// By one thread that waits for slots of tokens [first, end): ends the wait where there is nothing to wait for any more.
__device__ __forceinline__ void check_sum(const FusedParams& params, unsigned long long start, uint32_t epoch,
                                          int first, int end) {
    const Peers& peers = params.peers;
    if (ptx::load_relaxed_sys(words(peers, peers.rank, peers.layout.abort)) != 0) {
        fail_sum(params, Failure::kAborted, epoch, first, end);
    }
    if (ptx::global_nanoseconds() - start > peers.deadline.nanoseconds) {
        fail_sum(params, Failure::kExpired, epoch, first, end);
    }
}

// The slot of a turn that a lane looks at: k = lane % kTurnLanes of token lane / kTurnLanes.
struct TurnSlot {
    const uint32_t* flag;  // null: no slot, or a dropped one
    unsigned kept;         // of all tokens, kTurnLanes bits each; the same in all lanes
};

__device__ __forceinline__ TurnSlot turn_slot(const FusedParams& params, int first) {
    const Peers& peers = params.peers;
    const int lane = threadIdx.x & 31, token = first + lane / kTurnLanes, k = lane % kTurnLanes;
    const bool there = token < params.tokens && k < params.top_k;
    const int flat = token * params.top_k + k;
    const long long row = there ? params.slot_of[flat] : -1;
    const int owner = there ? params.ids[flat] / (params.experts / peers.ranks) : 0;
    TurnSlot slot{nullptr, __ballot_sync(0xffffffffu, row >= 0)};
    if (row >= 0) slot.flag = tile_flag(peers, peers.rank, owner, static_cast<int>(row / kRowTile));
    return slot;
}

// A bit per token of the turn whose slots are all filled.
__device__ __forceinline__ unsigned turn_filled(const TurnSlot& slot, uint32_t epoch) {
    const bool missing = slot.flag != nullptr && static_cast<int>(ptx::load_relaxed_sys(slot.flag) - epoch) < 0;
    const unsigned lanes = __ballot_sync(0xffffffffu, missing);
    unsigned filled = 0;
    for (int t = 0; t < kTurnTokens; ++t) {
        if ((lanes >> kTurnLanes * t & kTurnSlots) == 0) filled |= 1u << t;
    }
    return filled;
}

// Sums the filled tokens of a turn that nobody else has taken; returns how many. Whole warp.
template <int kBatch, int kSteps>
__device__ __forceinline__ int sum_filled(const FusedParams& params, int first, unsigned filled, unsigned kept) {
    const int shift = first % 32;
    const unsigned mine = take_tokens(params, first / 32, filled << shift) >> shift;
    for (int t = 0; t < kTurnTokens; ++t) {
        if (mine >> t & 1) sum_slots<kBatch, kSteps>(params, first + t, kept >> kTurnLanes * t & kTurnSlots);
    }
    return __popc(mine);
}

// The tokens of a turn that nobody else takes; `wait`: all of them. Returns how many were summed here. Whole warp.
template <int kBatch, int kSteps>
__device__ __forceinline__ int sum_turn(const FusedParams& params, int first, bool wait, uint32_t epoch) {
    const int lane = threadIdx.x & 31, shift = first % 32;
    unsigned* word = params.counters.taken + first / 32;
    // An older word costs a look at the slots, no more: the atomic decides.
    unsigned open = lane == 0 ? ~*const_cast<volatile unsigned*>(word) >> shift : 0;
    open = __shfl_sync(0xffffffffu, open, 0) & ((1u << min(kTurnTokens, params.tokens - first)) - 1);
    if (open == 0) return 0;
    const TurnSlot slot = turn_slot(params, first);
    const unsigned long long start = ptx::global_nanoseconds();
    for (int mine = 0;;) {
        const unsigned filled = turn_filled(slot, epoch) & open;
        if (filled != 0) mine += sum_filled<kBatch, kSteps>(params, first, filled, slot.kept);
        open &= ~filled;
        if (open == 0 || !wait) return mine;
        __nanosleep(500);
        if (lane == 0) check_sum(params, start, epoch, first, first + kTurnTokens);
        __syncwarp();
    }
}

__device__ __forceinline__ bool all_taken(const FusedParams& params) {
    bool open = false;
    for (int first = 32 * (threadIdx.x & 31); first < params.tokens; first += 1024) {
        const unsigned all = 0xffffffffu >> max(0, 32 - (params.tokens - first));
        const unsigned taken = *const_cast<volatile unsigned*>(params.counters.taken + first / 32);
        open = open || (taken & all) != all;
    }
    return !__any_sync(0xffffffffu, open);
}

// Both rounds of turns. Whole warp; only warps that no unit needs, since a CTA that waited here for its own tiles would
// wait for ever. Whoever has the last turn of the second round leaves no token behind that is not taken. Returns how
// many tokens this warp has summed.
template <int kBatch, int kSteps>
__device__ int sum_in_turns(const FusedParams& params, uint64_t& seen) {
    const int lane = threadIdx.x & 31;
    const uint32_t epoch = static_cast<uint32_t>(state_word(params.peers, kStateOpEpoch));
    // Whoever finishes has seen every peer start: none can be an operation behind.
    wait_for_all_peers(params.peers, expected_ready(params), seen);
    int mine = 0;
    for (int round = 0; round < 2; ++round) {
        const bool wait = round == 1;
        const auto take = [&] { return lane == 0 ? atomicAdd(params.counters.turns + round, 1) : 0; };
        int next = take();
        if (all_taken(params)) continue;  // of backward's tokens the movers leave none
        for (int turn; (turn = __shfl_sync(0xffffffffu, next, 0)) * kTurnTokens < params.tokens;) {
            if (!wait) next = take();  // on its way while this one is summed; whoever waits holds nothing back
            mine += sum_turn<kBatch, kSteps>(params, turn * kTurnTokens, wait, epoch);
            if (wait) next = take();
        }
    }
    return mine;
}

// Where a warp's sweeps stand.
struct Sweep {
    int block;       // to look at next
    int idle = 0;    // blocks in a row in which there was nothing to do
    int summed = 0;  // tokens
};

// Every warp sweeps over all blocks; only where it begins depends on its place.
__device__ __forceinline__ Sweep begin_sweep(const FusedParams& params) {
    const int place = static_cast<int>(blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32);
    return {place * 37 % max(1, ceil_div(params.tokens, 32))};
}

// One block; whether anything was summed. Whole warp. kTakenTokens: that a warp takes at a time.
template <int kBatch, int kSteps, int kTakenTokens>
__device__ __forceinline__ bool sweep_block(const FusedParams& params, Sweep& sweep, uint32_t epoch) {
    const int count = sum_block<kBatch, kSteps, kTakenTokens>(params, sweep.block, epoch);
    sweep.block = sweep.block + 1 < ceil_div(params.tokens, 32) ? sweep.block + 1 : 0;
    sweep.idle = count != 0 ? 0 : sweep.idle + 1;
    sweep.summed += count;
    return count != 0;
}

// Sweeps until all tokens are taken, or every turn of the second round is: somebody waits for each token then.
template <int kBatch, int kSteps, int kTakenTokens>
__device__ __forceinline__ void sum_in_sweeps(const FusedParams& params, Sweep& sweep, uint64_t& seen) {
    const int lane = threadIdx.x & 31;
    const uint32_t epoch = static_cast<uint32_t>(state_word(params.peers, kStateOpEpoch));
    wait_for_all_peers(params.peers, expected_ready(params), seen);
    unsigned long long start = ptx::global_nanoseconds();  // of the time in which this warp has found nothing
    sweep.idle = 0;  // others may have taken all tokens: found out after a few blocks
    while (true) {
        // One lane decides for the warp: another one might read a newer number and leave alone.
        const int turns = lane == 0 ? ptx::load_relaxed_gpu(params.counters.turns + 1) : 0;
        if (__shfl_sync(0xffffffffu, turns, 0) * kTurnTokens >= params.tokens) return;
        if (sweep_block<kBatch, kSteps, kTakenTokens>(params, sweep, epoch)) {
            start = ptx::global_nanoseconds();
            continue;
        }
        if (sweep.idle < kIdleBlocks) continue;
        if (sweep.idle % 64 == kIdleBlocks && all_taken(params)) return;
        __nanosleep(1000);
        if (lane == 0) check_sum(params, start, epoch, 0, params.tokens);
        __syncwarp();
    }
}

}  // namespace megamoe
