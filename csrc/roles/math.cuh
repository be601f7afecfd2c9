// Math role: a warpgroup multiplies its 64 rows of every tile and runs the epilogue. The two warpgroups of a CTA never
// wait for each other: while one is in its epilogue the other runs ahead through the ring.
#pragma once
#include "roles/epilogue.cuh"
#include "roles/loader.cuh"

namespace megamoe {

// Walks `k_blocks` stages; `multiplies` false only hands them back.
template <Gemm kGemm>
__device__ __forceinline__ void multiply(SharedStorage& shared, const GemmParams& params, int warpgroup, int k_blocks,
                                         bool multiplies, StageCursor& cursor, float (&d)[128]) {
    constexpr ptx::Major kA = GemmTraits<kGemm>::kMajorA, kB = GemmTraits<kGemm>::kMajorB;
    if (!multiplies) {
        for (int k_block = 0; k_block < k_blocks; ++k_block) {
            wait(&shared.stage_full[cursor.index], cursor.parity, params.deadline, Waiting::kStageFull);
            release_stage(shared, cursor.index);
            cursor.advance();
        }
        return;
    }
    int previous = -1;
    for (int k_block = 0; k_block < k_blocks; ++k_block) {
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
    }
    ptx::wgmma_wait<0>();
    ptx::pin_accumulators(d);
    if (previous >= 0) release_stage(shared, previous);
    if (k_blocks == 0) {
#pragma unroll
        for (int i = 0; i < 128; ++i) d[i] = 0.0f;
    }
}

template <Gemm kGemm>
__device__ void math_role(SharedStorage& shared, const GemmParams& params, int warpgroup, int rank) {
    using Traits = GemmTraits<kGemm>;
    constexpr bool kUsesWeights = kGemm == Gemm::kFc1 || kGemm == Gemm::kDgrad2;
    const int warp = (threadIdx.x / 32) & 3;
    const int warp_row = warpgroup * kWarpgroupM + warp * kChunkRows;
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
        float2 p = {0.0f, 0.0f};
        if (kUsesWeights && works) p = row_weights(params, tile);
        float d[128];
        multiply<kGemm>(shared, params, warpgroup, slot.k_blocks, works, stages, d);
        if constexpr (kGemm == Gemm::kDgrad2) {
            dswiglu_epilogue(shared, params, tile, warp_row, p, d, works ? dswiglu_chunks(params, n_tile) : 0,
                             dswiglu_stages(params, unit), stages);
        } else if (works) {
            if constexpr (kGemm == Gemm::kFc1) {
                swiglu_epilogue(params, staging, tile, p, d);
            } else if constexpr (kGemm == Gemm::kWgrad) {
                wgrad_epilogue(params, staging, tile, params.expert_maps + slot.expert, d);
            } else {
                store_epilogue(params, staging, tile, d);
            }
        }
    }
    // Everything stored is performed before the CTA exits.
    if (first_lane()) ptx::tma_store_wait_all();
}

}  // namespace megamoe
