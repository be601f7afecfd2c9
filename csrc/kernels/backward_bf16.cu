#include "kernels/fused.hpp"
#include "roles/fused.cuh"

namespace megamoe {

cudaError_t launch_backward_bf16(const FusedParams& params, int num_sms, cudaStream_t stream) {
    return launch_fused_kernel<Pass::kBackwardBf16>(params, num_sms, stream);
}

cudaError_t load_backward_bf16_kernel() { return load_fused_kernel<Pass::kBackwardBf16>(); }

}  // namespace megamoe
