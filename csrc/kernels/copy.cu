// A plain bulk copy on a few SMs: the floor that dispatch (from a peer) and combine (to a peer) are measured against.
#include "kernels/movers.cuh"
#include "kernels/rows.cuh"

namespace megamoe {
namespace {

constexpr RowCut kPieces{kMoverStageBytes, kMoverStageBytes, 1, 1, 8};

__global__ void __launch_bounds__(kMoverThreads, 1)
    copy_kernel(const uint8_t* source, uint8_t* target, int64_t pieces, Deadline deadline) {
    extern __shared__ __align__(128) uint8_t memory[];
    MoversShared& shared = *reinterpret_cast<MoversShared*>(memory);
    const RowCut cut = kPieces;
    Mover<kMoverStages> mover(shared.of_warp[threadIdx.x / 32], cut, deadline);
    const int lane = threadIdx.x & 31;
    const int64_t step = int64_t{gridDim.x} * kMoverWarps * cut.claim_rows;
    const int64_t start = (int64_t{blockIdx.x} * kMoverWarps + threadIdx.x / 32) * cut.claim_rows;
    for (int64_t first = start; first < pieces; first += step) {
        const int64_t piece = first + lane;
        const bool mine = lane < cut.claim_rows && piece < pieces;
        const int64_t at = piece * kMoverStageBytes;
        mover.move({mine ? source + at : nullptr, mine ? target + at : nullptr});
    }
    mover.finish();
}

}  // namespace

cudaError_t launch_copy(const void* source, void* target, int64_t pieces, int num_sms, const Deadline& deadline,
                        cudaStream_t stream) {
    const cudaError_t error =
        cudaFuncSetAttribute(copy_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(MoversShared));
    if (error != cudaSuccess) return error;
    copy_kernel<<<num_sms, kMoverThreads, sizeof(MoversShared), stream>>>(
        static_cast<const uint8_t*>(source), static_cast<uint8_t*>(target), pieces, deadline);
    return cudaGetLastError();
}

}  // namespace megamoe
