// The fused launches of a layer.
#pragma once
#include <cuda_runtime.h>

namespace megamoe {

struct FusedParams;

cudaError_t load_forward_kernel();  // on each device before the first launch there
cudaError_t load_backward_kernel();
cudaError_t load_backward_bf16_kernel();

// dispatch, fc1, SwiGLU, fc2, combine
cudaError_t launch_forward(const FusedParams& params, int num_sms, cudaStream_t stream);

// dispatch of dY and x, dgrad2 with dSwiGLU, dgrad1, both wgrads, combine of dX and dp
cudaError_t launch_backward(const FusedParams& params, int num_sms, cudaStream_t stream);

// The same with weight gradients in bf16, which are written and not added to. A kernel of its own: one more epilogue
// beside the others would cost them registers.
cudaError_t launch_backward_bf16(const FusedParams& params, int num_sms, cudaStream_t stream);

}  // namespace megamoe
