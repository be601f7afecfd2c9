// The fused launches, from plain pointers.
#pragma once
#include "host/comm.hpp"
#include "schedule/order.cuh"

namespace megamoe {

struct FusedArgs {
    WorkspaceHandle workspace;
    Pass pass;

    // The plan.
    PlanPointers plan;
    int64_t tokens;
    int64_t capacity;  // rows of the pools

    // Tokens and their routing weights, of this rank.
    const void* x;         // [T, H]
    const void* dy;        // [T, H]; backward
    const float* weights;  // [T, K]
    void* tokens_out;      // [T, H] y or dx
    float* dweights;       // [T, K]; backward

    // Row pools, bf16; all but h are scratch: layout/scratch.cuh.
    void* h;             // [capacity, 2I]; backward replaces it by dh
    void* pool;          // [capacity, H] x, or dy in backward
    void* act;           // [capacity, I]
    float* row_weights;  // [capacity]
    int* counters;       // [counter_ints]
    float* dp_partials;  // [capacity, ceil(I / 256)]; backward
    void* second_pool;   // [capacity, H] x in backward; null: wgrad1 is not wanted

    // Tensor maps [L] in device memory: forward fc1, fc2 (kWeight); backward fc2, fc1 (kWeightMN), and the gradients.
    const void* maps[2];
    const void* gradient_maps[2];  // of fc2, of fc1; null: not wanted
    void* const* gradients[2];
    bool accumulate[2];

    int64_t inter;
    float limit;
    int num_sms;  // 0: all
    cudaStream_t stream;
};

// Loads every kernel whose launch another rank may be waiting for. Throws std::runtime_error.
void preload_kernels();

// Copies what peers will pull into this rank's staging buffers. Needs no plan and no memory of the pass.
void stage_fused(const FusedArgs& args);

// Announces the operation, with what was staged.
void announce_fused(const FusedArgs& args);

void run_fused(const FusedArgs& args);

}  // namespace megamoe
