// Loading kernels before their first launch. CUDA loads a kernel when it is first launched, which can wait for kernels
// that are running: one that waits for this very launch would then wait for ever.
#pragma once
#include <cuda_runtime.h>

namespace megamoe {

template <class... Kernels>
cudaError_t load_kernels(Kernels*... kernels) {
    cudaError_t error = cudaSuccess;
#ifdef __CUDACC__
    cudaFuncAttributes attributes;
    ((error = error == cudaSuccess ? cudaFuncGetAttributes(&attributes, kernels) : error), ...);
#endif
    return error;
}

}  // namespace megamoe
