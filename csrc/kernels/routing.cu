#include "kernels/routing.cuh"

#include <cstdint>

namespace megamoe {
namespace {

constexpr int kRoutingThreads = 256;
constexpr int kTokensPerCta = kRoutingThreads / 32;

// One token a warp.
__global__ void __launch_bounds__(kRoutingThreads) routing_kernel(const __grid_constant__ RoutingParams params) {
    const int lane = threadIdx.x & 31;
    const int64_t token = int64_t{blockIdx.x} * kTokensPerCta + threadIdx.x / 32;
    if (token >= params.tokens) return;
    const unsigned char* map = params.map + token * params.experts;
    const float* probs = params.probs + token * params.experts;
    int* ids = params.ids + token * params.top_k;
    float* weights = params.weights + token * params.top_k;
    int found = 0;
    for (int first = 0; first < params.experts; first += 32) {
        const int expert = first + lane;
        const bool taken = expert < params.experts && map[expert] != 0;
        const unsigned all = __ballot_sync(0xffffffffu, taken);
        const int k = found + __popc(all & ((1u << lane) - 1));
        if (taken && k < params.top_k) ids[k] = expert, weights[k] = probs[expert];
        found += __popc(all);
    }
    for (int k = found + lane; k < params.top_k; k += 32) ids[k] = -1, weights[k] = 0;
    __syncwarp();
    if (lane == 0 && found > params.top_k) ids[params.top_k - 1] = kTooManyExperts;
}

}  // namespace

cudaError_t launch_routing(const RoutingParams& params, cudaStream_t stream) {
    if (params.tokens == 0) return cudaSuccess;
    const int blocks = (params.tokens + kTokensPerCta - 1) / kTokensPerCta;
    routing_kernel<<<blocks, kRoutingThreads, 0, stream>>>(params);
    return cudaGetLastError();
}

}  // namespace megamoe
