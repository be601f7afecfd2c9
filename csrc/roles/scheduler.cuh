// Scheduler role: one warp of the cluster's first CTA claims units in their fixed order and hands each to both CTAs.
#pragma once
#include "roles/gemm_params.cuh"

namespace megamoe {

// Rows and column tiles that the schedule counts for an expert: output rows, which for a wgrad are weight rows.
template <Gemm kGemm>
__device__ __forceinline__ int units_of(const GemmParams& params, int n_tiles, int rows) {
    if (GemmTraits<kGemm>::kIsWgrad) {
        // Nothing to add for an expert without rows; but a first write must write its zeros.
        return rows == 0 && params.accumulate ? 0 : num_units(params.m_extent, n_tiles);
    }
    return num_units(rows, n_tiles);
}

// Running totals of units per expert, by one warp.
template <Gemm kGemm>
__device__ void total_units(SharedStorage& shared, const GemmParams& params, int n_tiles) {
    const int lane = threadIdx.x & 31;
    int carry = 0;
    for (int base = 0; base < params.num_experts; base += 32) {
        const int expert = base + lane;
        int sum = expert < params.num_experts ? units_of<kGemm>(params, n_tiles, params.expert_rows[expert]) : 0;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, sum, step);
            if (lane >= step) sum += other;
        }
        if (expert < params.num_experts) shared.unit_end[expert] = carry + sum;
        carry += __shfl_sync(0xffffffffu, sum, 31);
    }
    __syncwarp();
}

template <Gemm kGemm>
__device__ UnitSlot unit_of_claim(const SharedStorage& shared, const GemmParams& params, int n_tiles, int claim,
                                  int& expert) {
    // Claims of one cluster only grow, so the search goes on from the last expert.
    while (expert < params.num_experts && claim >= shared.unit_end[expert]) ++expert;
    if (expert == params.num_experts) return {-1, 0, 0, 0, 0, 0, 0, 0};
    const int rows = params.expert_rows[expert];
    const int first = expert == 0 ? 0 : shared.unit_end[expert - 1];
    const int m_rows = GemmTraits<kGemm>::kIsWgrad ? params.m_extent : rows;
    const Unit unit = unit_at(m_rows, n_tiles, claim - first);
    const int k_blocks = GemmTraits<kGemm>::kIsWgrad ? wgrad_blocks(rows) : params.k_blocks;
    return {expert, unit.m_tile, unit.n_tile, unit.n_pair, params.expert_offset[expert], rows, k_blocks, 0};
}

template <Gemm kGemm>
__device__ void scheduler_role(SharedStorage& shared, const GemmParams& params) {
    const int n_tiles = ceil_div(params.n_extent, GemmTraits<kGemm>::kColumns);
    total_units<kGemm>(shared, params, n_tiles);
    if ((threadIdx.x & 31) != 0) return;
    UnitCursor cursor;
    int expert = 0;
    while (true) {
        const int claim = atomicAdd(params.claims, 1);
        const UnitSlot unit = unit_of_claim<kGemm>(shared, params, n_tiles, claim, expert);
        wait(&shared.unit_free[cursor.index], cursor.parity ^ 1, params.deadline, Waiting::kUnitSlotFree);
        const int4* words = reinterpret_cast<const int4*>(&unit);
        int4* slot = reinterpret_cast<int4*>(&shared.units[cursor.index]);
        for (uint32_t cta = 0; cta < kClusterSize; ++cta) {
            uint64_t* full = &shared.unit_full[cursor.index];
            ptx::mbarrier_expect_cta(full, cta, sizeof(UnitSlot));
            ptx::store_async_cta(slot, words[0], full, cta);
            ptx::store_async_cta(slot + 1, words[1], full, cta);
        }
        if (unit.expert < 0) return;
        cursor.advance();
    }
}

}  // namespace megamoe
