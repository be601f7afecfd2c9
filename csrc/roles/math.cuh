// Math role: a warpgroup multiplies its 64 rows of every tile and runs the epilogue. The two warpgroups of a CTA never
// wait for each other: while one is in its epilogue the other runs ahead through the ring.
#pragma once
#include "roles/dswiglu.cuh"

namespace megamoe {

// Hands `k_blocks` stages back unread: this warpgroup has no row in the tile.
__device__ __forceinline__ void skip(SharedStorage& shared, const GemmParams& params, int k_blocks,
                                     StageCursor& cursor) {
    for (int k_block = 0; k_block < k_blocks; ++k_block) {
        wait(&shared.stage_full[cursor.index], cursor.parity, params.deadline, Waiting::kStageFull);
        release_stage(shared, cursor.index);
        cursor.advance();
    }
}

// Issues the reduction loop, of at least one step. Its last step is still running on return: finish_multiply waits for
// it. Returns the stage of that step.
template <Gemm kGemm>
__device__ __forceinline__ int multiply(SharedStorage& shared, const GemmParams& params, int warpgroup, int k_blocks,
                                        StageCursor& cursor, float (&d)[128]) {
    constexpr ptx::Major kA = GemmTraits<kGemm>::kMajorA, kB = GemmTraits<kGemm>::kMajorB;
    int previous = -1;
    int k_block = 0;
    do {
        wait(&shared.stage_full[cursor.index], cursor.parity, params.deadline, Waiting::kStageFull);
        const uint32_t stage = ptx::smem_address(shared.ring[cursor.index]);
        const uint64_t a = ptx::smem_descriptor<kA>(stage + warpgroup * (kBytesA / 2));
        const uint64_t b = ptx::smem_descriptor<kB>(stage + kBytesA);
        ptx::pin_accumulators(d);
        ptx::wgmma_fence();
#pragma unroll
        for (int slice = 0; slice < kBlockK / 16; ++slice) {
            ptx::wgmma_m64n256k16<kA, kB>(d, a + slice * ptx::kSliceStep<kA>, b + slice * ptx::kSliceStep<kB>,
                                          k_block > 0 || slice > 0);
        }
        ptx::wgmma_commit();
        ptx::pin_accumulators(d);
        // The step before this one is complete: its stage can be refilled.
        ptx::wgmma_wait<1>();
        if (previous >= 0) release_stage(shared, previous);
        previous = cursor.index;
        cursor.advance();
    } while (++k_block < k_blocks);
    return previous;
}

__device__ __forceinline__ void finish_multiply(SharedStorage& shared, int last_stage, float (&d)[128]) {
    ptx::wgmma_wait<0>();
    ptx::pin_accumulators(d);
    release_stage(shared, last_stage);
}

template <Gemm kGemm>
__device__ void math_role(SharedStorage& shared, const GemmParams& params, int warpgroup, int rank) {
    using Traits = GemmTraits<kGemm>;
    constexpr bool kUsesWeights = kGemm == Gemm::kFc1 || kGemm == Gemm::kDgrad2;
    const int warp = (threadIdx.x / 32) & 3;
    const int warp_row = warpgroup * kWarpgroupM + warp * kWarpRows;
    const int n_tiles = ceil_div(params.n_extent, Traits::kColumns);
    Staging staging(shared, warpgroup * 4 + warp);
    StageCursor stages;
    UnitCursor units;
    while (true) {
        const UnitSlot slot = next_unit(shared, units, params.deadline);
        if (slot.expert < 0) break;
        const Unit unit{slot.m_tile, slot.n_tile, slot.n_pair != 0};
        const int n_tile = n_tile_of(unit, rank);
        const int tile_row = m_tile_of(unit, rank) * kTileM;
        const int rows = Traits::kIsWgrad ? params.m_extent : slot.rows;
        const TileView tile{tile_row + warp_row + (Traits::kIsWgrad ? 0 : slot.row_begin), rows - tile_row - warp_row,
                            n_tile * Traits::kColumns, n_tile};
        // Compute goes by 64 rows: a warpgroup works when its first row exists.
        const bool works = tile_row + warpgroup * kWarpgroupM < rows && n_tile < n_tiles;
        if (!works) {
            skip(shared, params, slot.k_blocks + (kGemm == Gemm::kDgrad2 ? dswiglu_stages(params, unit) : 0), stages);
            continue;
        }
        if (Traits::kIsWgrad && slot.k_blocks == 0) {
            zero_gradient(params, tile, slot.expert);
            continue;
        }
        float d[128];
        const int last_stage = multiply<kGemm>(shared, params, warpgroup, slot.k_blocks, stages, d);
        // What the epilogue reads from memory is asked for while the last step runs.
        const float2 p = kUsesWeights ? row_weights(params, tile) : float2{0.0f, 0.0f};
        finish_multiply(shared, last_stage, d);
        if constexpr (kGemm == Gemm::kFc1) {
            swiglu_epilogue(params, staging, tile, p, d);
        } else if constexpr (kGemm == Gemm::kDgrad2) {
            dswiglu_epilogue(shared, params, tile, warp_row, p, d, dswiglu_chunks(params, n_tile),
                             dswiglu_stages(params, unit), stages);
        } else if constexpr (kGemm == Gemm::kWgrad) {
            wgrad_epilogue(params, staging, tile, slot.expert, d);
        } else {
            store_epilogue(params, staging, tile, d);
        }
    }
}

}  // namespace megamoe
