// Staging inside a fused launch: x of the second pull is not needed before the weight gradients, so movers copy it into
// this rank's staging buffer while they wait for other things, instead of a launch before. Peers that hold none of its
// rows acknowledge their pull before that: the next operation may stage because this launch is over, not because of
// them.
#pragma once
#include "roles/pull.cuh"

namespace megamoe {

// The next claim of tokens by a warp; false when none is left. Staged -> pulled: stores by all lanes; barrier;
// atom.acq_rel.gpu by each warp; the last one fence.acq_rel.sys, st.release.sys.
template <int kDepth>
__device__ __forceinline__ bool stage_claim(const FusedParams& params) {
    const Peers& peers = params.peers;
    const Pull& pull = params.pulls[1];
    const int lane = threadIdx.x & 31;
    const int claim = lane == 0 ? atomicAdd(params.counters.stagings, 1) : 0;
    const int64_t first = int64_t{__shfl_sync(0xffffffffu, claim, 0)} * params.claim_rows;
    if (first >= params.tokens) return false;
    const int rows = min(params.claim_rows, params.tokens - static_cast<int>(first));
    uint8_t* to = staging(peers, peers.rank, pull.buffer) + first * params.row_bytes;
    for (int i = 0; i < rows; ++i) {
        const int64_t at = int64_t{i} * params.row_bytes;
        copy_row<kDepth>(to + at, pull.tokens + first * params.row_bytes + at, params.row_bytes);
    }
    __syncwarp();
    if (lane == 0 && ptx::add_acq_rel_gpu(params.counters.staged, rows) + rows == params.tokens) {
        const uint32_t epoch = static_cast<uint32_t>(state_word(peers, kStateOpEpoch));
        for (int r = 0; r < peers.ranks; ++r) signal(peers, r, peers.layout.staged, peers.rank, epoch_word(epoch));
    }
    __syncwarp();
    return true;
}

// Of a mover: what it stages between two looks at what it waits for, and what is left before the second pull.
class MoverStaging {
public:
    __device__ __forceinline__ explicit MoverStaging(const FusedParams& params)
        : params_(params), open_(params.peers.ranks > 1 && params.num_pulls > 1) {}

    // One claim; false when there is none. Whole warp.
    template <int kDepth>
    __device__ __forceinline__ bool step() {
        if (open_) open_ = stage_claim<kDepth>(params_);
        return open_;
    }

private:
    const FusedParams& params_;
    bool open_;
};

}  // namespace megamoe
