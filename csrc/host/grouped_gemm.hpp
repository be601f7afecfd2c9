// One grouped product, from plain pointers to its launch.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace megamoe {

struct GroupedGemmArgs {
    int gemm;  // Gemm

    // Row pools, bf16, row-major; null where the product has none.
    const void* a;
    int64_t a_cols;
    const void* b;
    int64_t b_cols;
    const void* h;
    void* out;
    int64_t out_cols;
    void* act;
    int64_t pool_rows;

    // Per expert, in device memory.
    const void* expert_maps;  // tensor maps of the weights, or of the gradients
    void* const* gradients;   // wgrad: their addresses
    const int* expert_rows;
    const int* expert_offset;
    int num_experts;

    // Epilogues.
    const float* row_weights;
    float* dp_partials;
    float limit;
    bool accumulate;

    // Extents of the result and of the reduction (columns of the left operand).
    int m_extent;
    int n_extent;
    int k_extent;

    int* claims;
    int num_sms;  // 0: all
    int64_t deadline_ns;
    void* wait_record;
    cudaStream_t stream;
};

// Throws std::runtime_error naming what is wrong.
void run_grouped_gemm(const GroupedGemmArgs& args);

}  // namespace megamoe
