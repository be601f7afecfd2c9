// Grouped GEMM: one of the six products of an MoE layer, alone in a launch. The fused kernels use the same roles.
#include "kernels/grouped_gemm.cuh"

#include "roles/loader.cuh"
#include "roles/math.cuh"
#include "roles/scheduler.cuh"

namespace megamoe {

template <Gemm kGemm>
__global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    grouped_gemm_kernel(const __grid_constant__ GemmParams params, int* claims) {
    extern __shared__ __align__(1024) uint8_t memory[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(memory);
    if (threadIdx.x == 0) init_barriers(shared);
    if (warp_index() == 0) acquire_maps(params);
    ptx::cluster_sync();

    const int rank = static_cast<int>(ptx::cluster_rank());
    if (warpgroup_index() == 0) {
        ptx::give_registers<kProducerRegisters>();
        if (warp_index() == 0) loader_role<kGemm>(shared, params, rank);
        if (warp_index() == 1 && rank == 0)
            scheduler_role(shared, &params, {1, params.num_experts, {}}, claims, [](const UnitSlot&) {});
        if (warp_index() == 2) storer_role<kGemm>(shared, params, rank);
    } else {
        ptx::take_registers<kMathRegisters>();
        math_role<kGemm>(shared, params, warpgroup_index() - 1, rank);
    }
    __syncwarp();
    // A CTA must stay until its peer has sent it the last arrival and multicast.
    ptx::cluster_sync();
}

template <Gemm kGemm>
cudaError_t launch(const GemmParams& params, int* claims, int num_sms, cudaStream_t stream) {
    constexpr int kBytes = sizeof(SharedStorage);
    const cudaError_t error =
        cudaFuncSetAttribute(grouped_gemm_kernel<kGemm>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return error;
    grouped_gemm_kernel<kGemm><<<num_sms / kClusterSize * kClusterSize, kThreads, kBytes, stream>>>(params, claims);
    return cudaGetLastError();
}

cudaError_t launch_grouped_gemm(Gemm gemm, const GemmParams& params, int* claims, int num_sms, cudaStream_t stream) {
    switch (gemm) {
        case Gemm::kFc1: return launch<Gemm::kFc1>(params, claims, num_sms, stream);
        case Gemm::kFc2: return launch<Gemm::kFc2>(params, claims, num_sms, stream);
        case Gemm::kDgrad2: return launch<Gemm::kDgrad2>(params, claims, num_sms, stream);
        case Gemm::kDgrad1: return launch<Gemm::kDgrad1>(params, claims, num_sms, stream);
        case Gemm::kWgradBf16: return launch<Gemm::kWgradBf16>(params, claims, num_sms, stream);
        case Gemm::kWgrad: return launch<Gemm::kWgrad>(params, claims, num_sms, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace megamoe
