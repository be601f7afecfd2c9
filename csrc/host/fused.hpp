// The fused launches, from plain pointers.
#pragma once
#include "host/comm.hpp"

namespace megamoe {

struct FusedArgs {
    WorkspaceHandle workspace;
    bool backward;

    // The plan.
    const int* plan_control;
    const int64_t* source_of;
    const int64_t* slot_of;
    const int* ids;
    const int* expert_rows;
    const int* expert_offset;
    int64_t tokens;
    int64_t capacity;  // rows of the pools

    // Tokens and their routing weights, of this rank.
    const void* x;         // [T, H]
    const void* dy;        // [T, H]; backward
    const float* weights;  // [T, K]
    void* tokens_out;      // [T, H] y or dx
    float* dweights;       // [T, K]; backward

    // Row pools, bf16.
    void* pool;          // [capacity, H] x, or dy in backward
    void* second_pool;   // [capacity, H] x in backward; null: wgrad1 is not wanted
    void* h;             // [capacity, 2I]
    void* act;           // [capacity, I]
    void* dh;            // [capacity, 2I]; backward
    float* row_weights;  // [capacity]
    float* dp_partials;  // [capacity, ceil(I / 256)]; backward

    // Tensor maps [L] in device memory: forward fc1, fc2 (kWeight); backward fc2, fc1 (kWeightMN), and the gradients.
    const void* maps[2];
    const void* gradient_maps[2];  // of fc2, of fc1; null: not wanted
    float* const* gradients[2];
    bool accumulate[2];

    int64_t inter;
    float limit;
    int* counters;
    int64_t counters_size;
    int num_sms;  // 0: all
    cudaStream_t stream;
};

// Loads every kernel whose launch another rank may be waiting for. Throws std::runtime_error.
void preload_kernels();

// Ints that `counters` needs.
int64_t fused_counters(int64_t capacity, int64_t tokens);

// Copies what peers will pull into this rank's staging buffers and announces the operation.
void begin_fused(const FusedArgs& args);

void run_fused(const FusedArgs& args);

}  // namespace megamoe
