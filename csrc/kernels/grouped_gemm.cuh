#pragma once
#include <cuda_runtime.h>

#include "roles/gemm_params.cuh"

namespace megamoe {

// Launches one product on `num_sms` SMs (rounded down to whole clusters). `claims`, one int, must be zero on the
// stream.
cudaError_t launch_grouped_gemm(Gemm gemm, const GemmParams& params, int* claims, int num_sms, cudaStream_t stream);

}  // namespace megamoe
