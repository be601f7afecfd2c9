#include "roles/combine.cuh"

#include "kernels/load.cuh"
#include "kernels/movers.cuh"
#include "kernels/plan.cuh"
#include "kernels/rows.cuh"

namespace megamoe {
namespace {

constexpr int kMaxTopK = 16;
constexpr int kSumThreads = 256;
constexpr int kSumBatch = 8;  // rows of a token in flight per thread

// Pushed -> pushed word: every warp's wait_group 0 and fence.proxy.async, and plain stores of dp; ticket
// (atom.acq_rel.gpu); the last CTA fence.acq_rel.sys, st.release.sys.
__global__ void __launch_bounds__(kMoverThreads, 1) push_kernel(const __grid_constant__ RowsParams params) {
    extern __shared__ __align__(128) uint8_t memory[];
    MoversShared& shared = *reinterpret_cast<MoversShared*>(memory);
    const Peers& peers = params.peers;
    if (params.plan_control[kPlanCode] == static_cast<int>(PlanCode::kGood)) {
        push_role(shared.of_warp[threadIdx.x / 32], params, params.plan_control[kPlanId]);
    }
    if (!last_cta(params.control + kRowTicket, gridDim.x)) return;
    if (threadIdx.x >= peers.ranks) return;
    const uint32_t epoch = static_cast<uint32_t>(state_word(peers, kStateOpEpoch));
    signal(peers, threadIdx.x, peers.layout.pushed, peers.rank, epoch_word(epoch));
}

// Waits by one small CTA (see wait_pulled_kernel), and on a rank without tokens too: after a combine every rank knows
// that all have come to it, which bounds how far a rank that has nothing to move runs ahead (kReadySlots).
__global__ void wait_pushed_kernel(const __grid_constant__ RowsParams params) {
    const Peers& peers = params.peers;
    if (threadIdx.x >= peers.ranks) return;
    const uint32_t epoch = static_cast<uint32_t>(state_word(peers, kStateOpEpoch));
    wait_word(peers, words(peers, peers.rank, peers.layout.pushed) + threadIdx.x, epoch, Waiting::kPushed, threadIdx.x);
}

// One token a CTA. Pushed rows are visible: wait_pushed acquired them earlier in the stream.
__global__ void __launch_bounds__(kSumThreads) sum_kernel(const __grid_constant__ RowsParams params) {
    __shared__ const uint8_t* rows[kMaxTopK];
    if (params.plan_control[kPlanCode] != static_cast<int>(PlanCode::kGood)) return;
    const int token = blockIdx.x;
    if (threadIdx.x < params.top_k) rows[threadIdx.x] = slot_row(params, token, threadIdx.x);
    __syncthreads();
    if (params.dweights != nullptr && threadIdx.x < params.top_k) {
        params.dweights[token * params.top_k + threadIdx.x] = collect_dweight(params, token, threadIdx.x);
    }
    sum_token<kSumBatch>(params, rows, token);
}

}  // namespace

cudaError_t launch_push(const RowsParams& params, int num_sms, cudaStream_t stream) {
    const cudaError_t error =
        cudaFuncSetAttribute(push_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(MoversShared));
    if (error != cudaSuccess) return error;
    push_kernel<<<num_sms, kMoverThreads, sizeof(MoversShared), stream>>>(params);
    return cudaGetLastError();
}

cudaError_t launch_sum(const RowsParams& params, cudaStream_t stream) {
    if (params.peers.ranks > 1) wait_pushed_kernel<<<1, kMaxRanks, 0, stream>>>(params);
    if (params.tokens == 0) return cudaGetLastError();
    const int parts = params.cut.row_bytes / 16, rounds = (parts + kSumThreads - 1) / kSumThreads;
    const int threads = (parts / rounds + 31) / 32 * 32;
    sum_kernel<<<params.tokens, threads, 0, stream>>>(params);
    return cudaGetLastError();
}

cudaError_t load_combine_kernels() { return load_kernels(push_kernel, wait_pushed_kernel, sum_kernel); }

}  // namespace megamoe
