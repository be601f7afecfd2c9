#include "kernels/load.cuh"
#include "kernels/movers.cuh"
#include "kernels/plan.cuh"
#include "kernels/rows.cuh"

namespace megamoe {
namespace {

constexpr int kStageThreads = 256;
constexpr int kStageBlocks = 264;
constexpr int kAnnounceThreads = 256;
static_assert(kAnnounceThreads >= kMaxRanks);

// Waits by one small CTA: a wide kernel that waits holds every SM, and keeps other kernels off it, those too that only
// need another split of L1 and shared memory.
__global__ void wait_pulled_kernel(const __grid_constant__ StageParams params) {
    const Peers& peers = params.peers;
    if (threadIdx.x >= peers.ranks) return;
    for (int buffer = 0; buffer < kStagingBuffers; ++buffer) {
        if (!(params.buffers >> buffer & 1)) continue;
        const uint32_t last = static_cast<uint32_t>(state_word(peers, kStateStagedEpoch + buffer));
        const int64_t index = int64_t{buffer} * peers.ranks + threadIdx.x;
        wait_word(peers, words(peers, peers.rank, peers.layout.pulled) + index, last, Waiting::kPulled, threadIdx.x);
    }
}

// Four copies of a thread are under way at a time.
__global__ void __launch_bounds__(kStageThreads) stage_kernel(const __grid_constant__ StageParams params) {
    constexpr int kDepth = 4;
    const Peers& peers = params.peers;
    const StagedRows& rows = params.rows;
    const int64_t step = int64_t{gridDim.x} * kStageThreads, start = int64_t{blockIdx.x} * kStageThreads + threadIdx.x;
    const int64_t parts = params.tokens * params.row_bytes / 16;
    const uint4* from = static_cast<const uint4*>(rows.tokens);
    uint4* to = reinterpret_cast<uint4*>(staging(peers, peers.rank, rows.buffer));
    for (int64_t first = start; first < parts; first += kDepth * step) {
        uint4 part[kDepth];
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            if (first + i * step < parts) part[i] = from[first + i * step];
        }
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            if (first + i * step < parts) to[first + i * step] = part[i];
        }
    }
    if (rows.weights == nullptr) return;
    float* weights = staged_weights(peers, peers.rank, rows.buffer);
    for (int64_t i = start; i < int64_t{params.tokens} * params.top_k; i += step) weights[i] = rows.weights[i];
}

// Staged -> ready: the staging copy, and for a combine the last sum over the slots, are earlier launches of this
// stream; then each thread fence.acq_rel.sys, st.release.sys.
__global__ void __launch_bounds__(kAnnounceThreads)
    announce_kernel(const __grid_constant__ RowsParams params, unsigned staged) {
    const Peers& peers = params.peers;
    __shared__ uint32_t epoch;
    if (threadIdx.x == 0) {
        uint64_t& counter = state_word(peers, kStateOpEpoch);
        epoch = static_cast<uint32_t>(++counter);
        for (int b = 0; b < kStagingBuffers; ++b) {
            if (staged >> b & 1) state_word(peers, kStateStagedEpoch + b) = epoch;
        }
    }
    for (int i = threadIdx.x; i < params.control_ints; i += kAnnounceThreads) params.control[i] = 0;
    __syncthreads();
    if (threadIdx.x >= peers.ranks) return;
    // What this rank staged through the generic proxy is pulled by its peers' async proxy.
    ptx::fence_async();
    signal(peers, threadIdx.x, peers.layout.ready, ready_index(peers, epoch, peers.rank),
           ready_word(epoch, params.op, params.plan_control[kPlanId], params.op >= Op::kForward ? staged : 0));
}

// Fills row_of; what it does not fill is negative already.
__global__ void __launch_bounds__(kStageThreads) index_kernel(const __grid_constant__ RowsParams params) {
    if (params.plan_control[kPlanCode] != static_cast<int>(PlanCode::kGood)) return;
    const int rows = *params.num_rows, step = gridDim.x * kStageThreads;
    for (int row = blockIdx.x * kStageThreads + threadIdx.x; row < rows; row += step) {
        const RowSource source = decode_source(params.source_of[row]);
        if (source.rank < 0 || source.rank == params.peers.rank) continue;
        rows_of_token(params, source.rank, source.flat / params.top_k)[source.flat % params.top_k] = row;
    }
}

// The first `nvlink_ctas` CTAs pull tokens of peers, and all pull the rank's own. Pulled -> acknowledged: every warp's
// mbarrier waits and wait_group 0; ticket (atom.acq_rel.gpu); the last CTA fence.acq_rel.sys, st.release.sys. Only then
// may a source stage anew.
__global__ void __launch_bounds__(kMoverThreads, 1)
    pull_kernel(const __grid_constant__ RowsParams params, int nvlink_ctas) {
    extern __shared__ __align__(128) uint8_t memory[];
    MoversShared& shared = *reinterpret_cast<MoversShared*>(memory);
    const Peers& peers = params.peers;
    if (params.plan_control[kPlanCode] == static_cast<int>(PlanCode::kGood)) {
        const bool peers_too = static_cast<int>(blockIdx.x) < nvlink_ctas;
        dispatch_role(shared.of_warp[threadIdx.x / 32], params, params.plan_control[kPlanId], peers_too);
    }
    if (peers.ranks == 1 || !last_cta(params.control + kRowTicket, gridDim.x)) return;
    if (threadIdx.x >= peers.ranks) return;
    const uint32_t epoch = static_cast<uint32_t>(state_word(peers, kStateOpEpoch));
    signal(peers, threadIdx.x, peers.layout.pulled, params.buffer * peers.ranks + peers.rank, epoch_word(epoch));
}

__global__ void abort_kernel(const __grid_constant__ Peers peers) {
    if (threadIdx.x < peers.ranks) signal(peers, threadIdx.x, peers.layout.abort, 0, peers.rank + 1);
}

}  // namespace

cudaError_t launch_stage(const StageParams& params, cudaStream_t stream) {
    wait_pulled_kernel<<<1, kMaxRanks, 0, stream>>>(params);
    stage_kernel<<<kStageBlocks, kStageThreads, 0, stream>>>(params);
    return cudaGetLastError();
}

cudaError_t launch_announce(const RowsParams& params, unsigned staged, cudaStream_t stream) {
    announce_kernel<<<1, kAnnounceThreads, 0, stream>>>(params, staged);
    return cudaGetLastError();
}

cudaError_t launch_pull(const RowsParams& params, int ctas, int nvlink_ctas, cudaStream_t stream) {
    cudaError_t error =
        cudaFuncSetAttribute(pull_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(MoversShared));
    if (error == cudaSuccess && params.peers.ranks > 1) {
        error = cudaMemsetAsync(params.row_of, 0xff, row_of_ints(params) * sizeof(int), stream);
        index_kernel<<<kStageBlocks, kStageThreads, 0, stream>>>(params);
    }
    if (error != cudaSuccess) return error;
    pull_kernel<<<ctas, kMoverThreads, sizeof(MoversShared), stream>>>(params, nvlink_ctas);
    return cudaGetLastError();
}

cudaError_t launch_abort(const Peers& peers, cudaStream_t stream) {
    abort_kernel<<<1, kMaxRanks, 0, stream>>>(peers);
    return cudaGetLastError();
}

cudaError_t load_dispatch_kernels() {
    return load_kernels(wait_pulled_kernel, stage_kernel, announce_kernel, index_kernel, pull_kernel, abort_kernel);
}

}  // namespace megamoe
