// Megatron's dense routing to slots: a map of which experts each token takes becomes top-k ids, with their weights.
#pragma once
#include <cuda_runtime.h>

#include <climits>

namespace megamoe {

// The last id of a token that has more than K experts; plan_count reports it. ops_plan.py: TOO_MANY_EXPERTS.
constexpr int kTooManyExperts = INT_MIN;

struct RoutingParams {
    const unsigned char* map;  // [T, E] bool
    const float* probs;        // [T, E]
    int* ids;                  // [T, K] the token's experts ascending, then -1
    float* weights;            // [T, K] probs of these experts, then 0
    int tokens;
    int experts;  // E
    int top_k;    // K
};

cudaError_t launch_routing(const RoutingParams& params, cudaStream_t stream);

}  // namespace megamoe
