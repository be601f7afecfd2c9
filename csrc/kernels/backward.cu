#include "kernels/fused.hpp"
#include "roles/fused.cuh"

namespace megamoe {

cudaError_t launch_backward(const FusedParams& params, int num_sms, cudaStream_t stream) {
    return launch_fused_kernel<Pass::kBackward>(params, num_sms, stream);
}

cudaError_t load_backward_kernel() { return load_fused_kernel<Pass::kBackward>(); }

}  // namespace megamoe
