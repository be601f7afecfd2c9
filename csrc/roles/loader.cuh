// Loader role: one thread per CTA fills the operand ring by TMA. Each CTA loads its own operand whole, and half of the
// operand that both CTAs of the cluster need, multicast to both.
#pragma once
#include "ptx/tma.cuh"
#include "roles/output.cuh"

namespace megamoe {

constexpr uint16_t kBothCtas = 3;

// A box of a K-major operand, to this CTA or to both.
__device__ __forceinline__ void load_rows(void* dst, const CUtensorMap* map, uint64_t* full, int column, int row,
                                          bool multicast) {
    if (multicast) {
        ptx::tma_load_2d_multicast(dst, map, full, column, row, kBothCtas, ptx::kEvictNormal);
    } else {
        ptx::tma_load_2d(dst, map, full, column, row, ptx::kEvictNormal);
    }
}

// Of an MN-major one: blocks of 64 columns.
__device__ __forceinline__ void load_blocks(void* dst, const CUtensorMap* map, uint64_t* full, int row, int block,
                                            bool multicast) {
    if (multicast) {
        ptx::tma_load_3d_multicast(dst, map, full, 0, row, block, kBothCtas, ptx::kEvictNormal);
    } else {
        ptx::tma_load_3d(dst, map, full, 0, row, block, ptx::kEvictNormal);
    }
}

// Left operand, half `half` (64 rows) of the stage's 128 rows.
template <Gemm kGemm>
__device__ __forceinline__ void load_a(const GemmParams& params, const UnitSlot& unit, uint8_t* stage, uint64_t* full,
                                       int m_tile, int k_block, int half, bool multicast) {
    uint8_t* dst = stage + half * (kBytesA / 2);
    if constexpr (GemmTraits<kGemm>::kIsWgrad) {
        load_blocks(dst, &params.a, full, unit.row_begin + k_block * kBlockK, m_tile * 2 + half, multicast);
    } else {
        const int row = unit.row_begin + m_tile * kTileM + half * 64;
        load_rows(dst, &params.a, full, k_block * kBlockK, row, multicast);
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
        load_rows(dst, weights, full, k_block * kBlockK, row, multicast);
    } else {
        const CUtensorMap* map = GemmTraits<kGemm>::kIsWgrad ? &params.b : weights;
        const int row = (GemmTraits<kGemm>::kIsWgrad ? unit.row_begin : 0) + k_block * kBlockK;
        load_blocks(dst, map, full, row, n_tile * (kTileN / 64) + half * 2, multicast);
    }
}

// One stage of operands.
template <Gemm kGemm>
__device__ __forceinline__ void load_stage(SharedStorage& shared, const GemmParams& params, const UnitSlot& unit,
                                           const CUtensorMap* weights, int rank, int stage, int k_block) {
    uint8_t* dst = shared.ring[stage];
    uint64_t* full = &shared.stage_full[stage];
    const Unit pair = unit_of(unit);
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

// 64 gate and 64 up columns of h.
__device__ __forceinline__ void load_h(SharedStorage& shared, const GemmParams& params, const Share& share, int stage,
                                       OutputPlace place) {
    uint8_t* dst = output_memory(shared, place);
    uint64_t* full = &shared.stage_full[place.index];
    const int column = share.column + stage * kChunkColumns, row = static_cast<int>(share.row);
    ptx::mbarrier_expect(full, 2 * kPartBytes);
    ptx::tma_load_2d(dst, &params.b, full, column, row, ptx::kEvictFirst);
    ptx::tma_load_2d(dst + kPartBytes, &params.b, full, params.n_extent + column, row, ptx::kEvictFirst);
}

// An output stage's parts of the gradient, as they are before this launch adds to them.
__device__ __forceinline__ void load_gradient(SharedStorage& shared, const CUtensorMap* gradient, const Share& share,
                                              int stage, OutputPlace place) {
    const auto [first, parts] = grad_parts(stage);
    const int row = static_cast<int>(share.row);
    uint64_t* full = &shared.stage_full[place.index];
    ptx::mbarrier_expect(full, parts * kPartBytes);
    for (int i = 0; i < parts; ++i) {
        uint8_t* dst = output_memory(shared, place) + i * kPartBytes;
        const int column = share.column + (first + i) * kGradColumns;
        ptx::tma_load_2d(dst, gradient, full, column, row, ptx::kEvictFirst);
        ptx::tma_load_2d(dst + kPartBytes / 2, gradient, full, column, row + kWarpgroupM, ptx::kEvictFirst);
    }
}

// The places for a unit's results: granted empty, or with what the epilogue works on.
template <Gemm kGemm>
__device__ __forceinline__ void grant_outputs(SharedStorage& shared, const GemmParams& params, const UnitSlot& slot,
                                              int rank, Position& position) {
    const Share share = share_of<kGemm>(params, slot, rank, 0);
    const int stages = output_stages(kGemm, params.n_extent, unit_of(slot), slot.k_blocks);
    for (int stage = 0; stage < stages; ++stage) {
        const OutputPlace place = position.next_output<kGemm>(stage);
        wait(&shared.stage_free[place.index], place.parity ^ 1, params.deadline, Waiting::kStageFree);
        if (kGemm == Gemm::kDgrad2) {
            load_h(shared, params, share, stage, place);
        } else if (kGemm == Gemm::kWgrad && params.accumulate && !added_in_l2(stage)) {
            load_gradient(shared, params.expert_maps + slot.expert, share, stage, place);
        } else {
            ptx::mbarrier_arrive(&shared.stage_full[place.index]);
        }
    }
}

// All that a unit needs, by one thread: its operands, then the places for its results.
template <Gemm kGemm>
__device__ __forceinline__ void load_unit(SharedStorage& shared, const GemmParams& params, const UnitSlot& unit,
                                          int rank, Position& position, Trace& trace) {
    const CUtensorMap* weights = params.expert_maps + unit.expert;
    StageCursor& ring = position.ring;
    const int claim_at = rank == 0 ? claim_step(unit.k_blocks) : -1;
    if (claim_at == 0) ptx::mbarrier_arrive(&shared.claim_due);
    for (int k_block = 0; k_block < unit.k_blocks; ++k_block) {
        wait(&shared.stage_free[ring.index], ring.parity ^ 1, params.deadline, Waiting::kStageFree);
        if (k_block == 0) trace.mark(Mark::kLoading);
        load_stage<kGemm>(shared, params, unit, weights, rank, ring.index, k_block);
        ring.advance();
        if (k_block + 1 == claim_at) ptx::mbarrier_arrive(&shared.claim_due);
    }
    grant_outputs<kGemm>(shared, params, unit, rank, position);
    trace.mark(Mark::kLoaded);
}

// The tensor maps of all experts before their first use, by a whole warp; a barrier with their users must follow.
__device__ __forceinline__ void acquire_maps(const GemmParams& params) {
    for (int i = threadIdx.x & 31; i < params.num_experts; i += 32) ptx::tensor_map_acquire(params.expert_maps + i);
}

// By a whole warp; one lane issues.
template <Gemm kGemm>
__device__ void loader_role(SharedStorage& shared, const GemmParams& params, int rank) {
    Position position;
    UnitCursor units;
    Trace trace(params.trace);
    while (true) {
        const UnitSlot unit = next_unit(shared, units, params.deadline);
        if (unit.expert < 0) break;
        trace.begin_unit();
        if ((threadIdx.x & 31) == 0) load_unit<kGemm>(shared, params, unit, rank, position, trace);
    }
}

}  // namespace megamoe
