// Which matrix product a unit belongs to, and the tensors of one product.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>

#include "ptx/wgmma.cuh"
#include "roles/shared.cuh"
#include "roles/trace.cuh"

namespace megamoe {

template <Gemm kGemm>
struct GemmTraits {
    static constexpr bool kIsWgrad = is_wgrad(kGemm);
    static constexpr bool kIsDgrad = kGemm == Gemm::kDgrad2 || kGemm == Gemm::kDgrad1;
    static constexpr ptx::Major kMajorA = kIsWgrad ? ptx::Major::MN : ptx::Major::K;
    static constexpr ptx::Major kMajorB = kIsWgrad || kIsDgrad ? ptx::Major::MN : ptx::Major::K;
    static constexpr int kColumns = tile_columns(kGemm);
};

// The tensors of one product; which fields it uses follows from the table in schedule/ring.cuh.
struct GemmParams {
    Gemm gemm;
    CUtensorMap a;                   // left operand: a row pool
    CUtensorMap b;                   // wgrad: right operand, a row pool; dgrad2: h, for the epilogue
    CUtensorMap out;                 // h (fc1), y rows (fc2), dh (dgrad2), dx rows (dgrad1)
    CUtensorMap act;                 // a (fc1, dgrad2)
    const CUtensorMap* expert_maps;  // [L] weights, or gradients for wgrad
    void* const* gradients;          // [L] wgrad: where each expert's gradient lies
    const int* expert_rows;          // [L]
    const int* expert_offset;        // [L] first row of each expert in the pools
    const float* row_weights;        // [M] p of each row
    float* dp_partials;              // [M, n_tiles]
    int num_experts;
    int m_extent;          // wgrad: rows of the gradient
    int n_extent;          // columns of the result; I for fc1 and dgrad2, whose h and dh have twice as many
    int k_blocks;          // reduction steps; not for wgrad
    __nv_bfloat162 limit;  // SwiGLU clamp twice; +inf when off
    int accumulate;        // wgrad: add to what is there
    int wanted;            // 0: the launch leaves this product out
    Deadline deadline;
    TraceBuffer trace;
};

}  // namespace megamoe
