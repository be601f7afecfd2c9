// Loader role: one thread per CTA fills the operand ring by TMA. Each CTA loads its own operand whole, and half of the
// operand that both CTAs of the cluster need, multicast to both.
#pragma once
#include "ptx/tma.cuh"
#include "roles/output.cuh"

namespace megamoe {

constexpr uint16_t kBothCtas = 3;

// Left operand, half `half` (64 rows) of the stage's 128 rows.
template <Gemm kGemm>
__device__ __forceinline__ void load_a(const GemmParams& params, const UnitSlot& unit, uint8_t* stage, uint64_t* full,
                                       int m_tile, int k_block, int half, bool multicast) {
    uint8_t* dst = stage + half * (kBytesA / 2);
    if constexpr (GemmTraits<kGemm>::kIsWgrad) {
        const int row = unit.row_begin + k_block * kBlockK;
        ptx::tma_load_3d(dst, &params.a, full, 0, row, m_tile * 2 + half, ptx::kEvictNormal);
    } else {
        const int row = unit.row_begin + m_tile * kTileM + half * 64;
        if (multicast) {
            ptx::tma_load_2d_multicast(dst, &params.a, full, k_block * kBlockK, row, kBothCtas, ptx::kEvictNormal);
        } else {
            ptx::tma_load_2d(dst, &params.a, full, k_block * kBlockK, row, ptx::kEvictNormal);
        }
    }
}

// Right operand, half `half` (128 columns of the result) of the stage's 256.
template <Gemm kGemm>
__device__ __forceinline__ void load_b(const GemmParams& params, const CUtensorMap* weights, const UnitSlot& unit,
                                       uint8_t* stage, uint64_t* full, int n_tile, int k_block, int half,
                                       bool multicast) {
    uint8_t* dst = stage + kBytesA + half * (kBytesB / 2);
    if constexpr (GemmTraits<kGemm>::kMajorB == ptx::Major::K) {
        const int row = kGemm == Gemm::kFc1 ? half * params.n_extent + n_tile * 128 : n_tile * kTileN + half * 128;
        if (multicast) {
            ptx::tma_load_2d_multicast(dst, weights, full, k_block * kBlockK, row, kBothCtas, ptx::kEvictNormal);
        } else {
            ptx::tma_load_2d(dst, weights, full, k_block * kBlockK, row, ptx::kEvictNormal);
        }
    } else {
        const CUtensorMap* map = GemmTraits<kGemm>::kIsWgrad ? &params.b : weights;
        const int row = (GemmTraits<kGemm>::kIsWgrad ? unit.row_begin : 0) + k_block * kBlockK;
        const int block = n_tile * (kTileN / 64) + half * 2;
        if (multicast) {
            ptx::tma_load_3d_multicast(dst, map, full, 0, row, block, kBothCtas, ptx::kEvictNormal);
        } else {
            ptx::tma_load_3d(dst, map, full, 0, row, block, ptx::kEvictNormal);
        }
    }
}

// One stage of operands.
template <Gemm kGemm>
__device__ __forceinline__ void load_stage(SharedStorage& shared, const GemmParams& params, const UnitSlot& unit,
                                           const CUtensorMap* weights, int rank, int stage, int k_block) {
    uint8_t* dst = shared.ring[stage];
    uint64_t* full = &shared.stage_full[stage];
    const Unit pair{unit.m_tile, unit.n_tile, unit.n_pair != 0};
    const int m_tile = m_tile_of(pair, rank), n_tile = n_tile_of(pair, rank);
    ptx::mbarrier_expect(full, kStageBytes);
    if (unit.n_pair) {
        load_a<kGemm>(params, unit, dst, full, m_tile, k_block, rank, true);
        load_b<kGemm>(params, weights, unit, dst, full, n_tile, k_block, 0, false);
        load_b<kGemm>(params, weights, unit, dst, full, n_tile, k_block, 1, false);
    } else {
        load_b<kGemm>(params, weights, unit, dst, full, n_tile, k_block, rank, true);
        load_a<kGemm>(params, unit, dst, full, m_tile, k_block, 0, false);
        load_a<kGemm>(params, unit, dst, full, m_tile, k_block, 1, false);
    }
}

// The stages behind the operands: granted empty, or for dgrad2 with the h that its epilogue reads.
template <Gemm kGemm>
__device__ __forceinline__ void grant_outputs(SharedStorage& shared, const GemmParams& params, const UnitSlot& slot,
                                              int rank, StageCursor& cursor) {
    const int stages = output_stages<kGemm>(params, slot);
    for (int stage = 0; stage < stages; ++stage, cursor.advance()) {
        wait(&shared.stage_free[cursor.index], cursor.parity ^ 1, params.deadline, Waiting::kStageFree);
        uint64_t* full = &shared.stage_full[cursor.index];
        if constexpr (kGemm == Gemm::kDgrad2) {
            const Unit unit{slot.m_tile, slot.n_tile, slot.n_pair != 0};
            const int row = slot.row_begin + m_tile_of(unit, rank) * kTileM;
            const int column = n_tile_of(unit, rank) * kTileN + stage * kChunkColumns;
            uint8_t* dst = shared.ring[cursor.index];
            ptx::mbarrier_expect(full, 2 * kPartBytes);
            ptx::tma_load_2d(dst, &params.b, full, column, row, ptx::kEvictFirst);
            ptx::tma_load_2d(dst + kPartBytes, &params.b, full, params.n_extent + column, row, ptx::kEvictFirst);
        } else {
            ptx::mbarrier_arrive(full);
        }
    }
}

// By a whole warp; one lane issues.
template <Gemm kGemm>
__device__ void loader_role(SharedStorage& shared, const GemmParams& params, int rank) {
    const bool issues = (threadIdx.x & 31) == 0;
    StageCursor cursor;
    UnitCursor units;
    int known = -1;
    while (true) {
        const UnitSlot unit = next_unit(shared, units, params.deadline);
        if (unit.expert < 0) break;
        if (!issues) continue;
        const CUtensorMap* weights = params.expert_maps + unit.expert;
        if (!GemmTraits<kGemm>::kIsWgrad && unit.expert != known) {
            ptx::tensor_map_acquire(weights);
            known = unit.expert;
        }
        for (int k_block = 0; k_block < unit.k_blocks; ++k_block) {
            wait(&shared.stage_free[cursor.index], cursor.parity ^ 1, params.deadline, Waiting::kStageFree);
            load_stage<kGemm>(shared, params, unit, weights, rank, cursor.index, k_block);
            cursor.advance();
        }
        grant_outputs<kGemm>(shared, params, unit, rank, cursor);
    }
}

}  // namespace megamoe
