#include "kernels/fused.hpp"
#include "roles/fused.cuh"

namespace megamoe {

cudaError_t launch_forward(const FusedParams& params, int num_sms, cudaStream_t stream) {
    return launch_fused_kernel<Pass::kForward>(params, num_sms, stream);
}

cudaError_t load_forward_kernel() { return load_fused_kernel<Pass::kForward>(); }

}  // namespace megamoe
