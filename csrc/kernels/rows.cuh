// Dispatch and combine as stand-alone kernels. In stream order, and on every rank the same operations:
//   dispatch:  stage (several ranks only), announce, pull       combine:  announce, push (several ranks only), sum
#pragma once
#include <cuda_runtime.h>

#include "roles/dispatch.cuh"

namespace megamoe {

cudaError_t load_dispatch_kernels();  // see load.cuh
cudaError_t load_combine_kernels();

// What goes into one staging buffer.
struct StagedRows {
    int buffer;
    const void* tokens;    // [T, H] bf16
    const float* weights;  // [T, K]; null: none
};

// What a launch copies, and for which buffers it waits.
struct StageParams {
    Peers peers;
    int64_t row_bytes;
    int tokens;
    int top_k;
    unsigned buffers;  // that the operation fills, a bit each; others than that of `rows` later, by itself
    StagedRows rows;
};

// Copies tokens and weights into this rank's staging buffer, once every peer has pulled what all `buffers` held
// before. Needs no plan, and may be done again until it is announced.
cudaError_t launch_stage(const StageParams& params, cudaStream_t stream);

// Starts an operation: counts its epoch, zeroes its control block and sends the ready word to all peers.
// `staged`: the staging buffers that the operation offers, a bit each.
cudaError_t launch_announce(const RowsParams& params, unsigned staged, cudaStream_t stream);

inline int64_t row_of_ints(const RowsParams& params) {
    return params.peers.ranks * params.peers.layout.shape.tokens * params.top_k;
}

// nvlink_ctas: of `ctas`, those that pull from peers; the others only move the rank's own rows.
cudaError_t launch_pull(const RowsParams& params, int ctas, int nvlink_ctas, cudaStream_t stream);
cudaError_t launch_push(const RowsParams& params, int num_sms, cudaStream_t stream);
cudaError_t launch_sum(const RowsParams& params, cudaStream_t stream);

// Copies `pieces` pieces of kMoverStageBytes by the same warps: the floor of pull and push.
cudaError_t launch_copy(const void* source, void* target, int64_t pieces, int num_sms, const Deadline& deadline,
                        cudaStream_t stream);

// Raises the abort word at every rank: the host of this one has failed.
cudaError_t launch_abort(const Peers& peers, cudaStream_t stream);

}  // namespace megamoe
