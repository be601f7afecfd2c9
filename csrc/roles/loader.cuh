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
__device__ __forceinline__ void load_a(const GemmParams& params, const UnitSlot& unit, uint8_t* stage, uint64_t* full,
                                       int m_tile, int k_block, int half, bool multicast) {
    uint8_t* dst = stage + half * (kBytesA / 2);
    const int row = unit.row_begin + m_tile * kTileM + half * 64;
    load_rows(dst, &params.a, full, k_block * kBlockK, row, multicast);
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
        load_blocks(dst, weights, full, k_block * kBlockK, n_tile * (kTileN / 64) + half * 2, multicast);
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
        load_a(params, unit, dst, full, m_tile, k_block, rank, true);
        load_b<kGemm>(params, weights, unit, dst, full, n_tile, k_block, 0, false);
        load_b<kGemm>(params, weights, unit, dst, full, n_tile, k_block, 1, false);
    } else {
        load_b<kGemm>(params, weights, unit, dst, full, n_tile, k_block, rank, true);
        load_a(params, unit, dst, full, m_tile, k_block, 0, false);
        load_a(params, unit, dst, full, m_tile, k_block, 1, false);
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

// A stage's parts of the gradient, as they are before this launch adds to them.
__device__ __forceinline__ void load_gradient(SharedStorage& shared, const CUtensorMap* gradient, const Share& share,
                                              int stage, OutputPlace place) {
    const int parts = grad_parts(stage), row = static_cast<int>(share.row);
    uint64_t* full = &shared.stage_full[place.index];
    ptx::mbarrier_expect(full, parts * kPartBytes);
    for (int i = 0; i < parts; ++i) {
        uint8_t* dst = output_memory(shared, place) + i * kPartBytes;
        const int column = share.column + (grad_part(stage) + i) * kGradColumns;
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
        } else if (kGemm == Gemm::kWgrad && params.accumulate) {
            load_gradient(shared, params.expert_maps + slot.expert, share, stage, place);
        } else {
            ptx::mbarrier_arrive(&shared.stage_full[place.index]);
        }
    }
}

// Half a stage of a wgrad's operands: 32 rows of the expert. A: [2][32 k][64 m], B: [4][32 k][64 n].
__device__ __forceinline__ void load_half(SharedStorage& shared, const GemmParams& params, const UnitSlot& unit,
                                          int rank, int half, int step) {
    constexpr int kBlockBytes = kBlockK / 2 * 128;
    using Half = Operands<Gemm::kWgrad>;
    uint8_t* a = Half::memory(shared, half);
    uint8_t* b = a + Half::kBytesA;
    uint64_t* full = Half::full(shared, half);
    const Unit pair = unit_of(unit);
    const int row = unit.row_begin + step * (kBlockK / 2);
    const int m = m_tile_of(pair, rank) * (kTileM / 64), n = n_tile_of(pair, rank) * (kTileN / 64);
    ptx::mbarrier_expect(full, kHalfBytes);
    if (unit.n_pair) {
        load_blocks(a + rank * kBlockBytes, &params.a, full, row, m + rank, true);
        load_blocks(b, &params.b, full, row, n, false);
        load_blocks(b + 2 * kBlockBytes, &params.b, full, row, n + 2, false);
    } else {
        load_blocks(b + rank * 2 * kBlockBytes, &params.b, full, row, n + rank * 2, true);
        load_blocks(a, &params.a, full, row, m, false);
        load_blocks(a + kBlockBytes, &params.a, full, row, m + 1, false);
    }
}

// What another product has in the stage is gone, for good where `stage` is not loaded before.
__device__ __forceinline__ void wait_for_stage(SharedStorage& shared, const Deadline& deadline, const StageCursor& ring,
                                               int stage) {
    wait(&shared.stage_free[stage], ring.next_parity(stage) ^ 1, deadline, Waiting::kStageFree);
}

// What a wgrad has in the stage's memory, in both CTAs, is gone.
__device__ __forceinline__ void wait_for_wgrad(SharedStorage& shared, const Deadline& deadline,
                                               const Position& position, int stage) {
    if (stage == kStages - 1) {
        wait(&shared.stage_free[kGradPlace], position.grad_parity ^ 1, deadline, Waiting::kStageFree);
        return;
    }
    for (int half = 2 * stage; half < 2 * stage + 2; ++half) {
        wait(&shared.half_free[half], position.halves.next_parity(half) ^ 1, deadline, Waiting::kStageFree);
    }
}

// All that a wgrad's unit needs, by one thread. The places for its results are beside its operands, and asked for on
// the way, when the last unit's results have left.
__device__ __forceinline__ void load_wgrad(SharedStorage& shared, const GemmParams& params, const UnitSlot& unit,
                                           int rank, Position& position, Trace& trace) {
    HalfCursor& halves = position.halves;
    const int steps = operand_steps(Gemm::kWgrad, unit.k_blocks);
    for (int step = 0; step < steps; ++step) {
        if (step < kHalves) wait_for_stage(shared, params.deadline, position.ring, halves.index / 2);
        wait(&shared.half_free[halves.index], halves.parity ^ 1, params.deadline, Waiting::kStageFree);
        if (step == 0) trace.mark(Mark::kLoading);
        load_half(shared, params, unit, rank, halves.index, step);
        halves.advance();
        if (step + 1 == grant_step(steps)) {
            wait_for_stage(shared, params.deadline, position.ring, kStages - 1);
            grant_outputs<Gemm::kWgrad>(shared, params, unit, rank, position);
        }
    }
    trace.mark(Mark::kLoaded);
}

// All that a unit needs, by one thread: its operands, then the places for its results.
template <Gemm kGemm>
__device__ __forceinline__ void load_unit(SharedStorage& shared, const GemmParams& params, const UnitSlot& unit,
                                          int rank, Position& position, Trace& trace) {
    if constexpr (GemmTraits<kGemm>::kIsWgrad) {
        load_wgrad(shared, params, unit, rank, position, trace);
    } else {
        const CUtensorMap* weights = params.expert_maps + unit.expert;
        StageCursor& ring = position.ring;
        for (int k_block = 0; k_block < unit.k_blocks; ++k_block) {
            wait(&shared.stage_free[ring.index], ring.parity ^ 1, params.deadline, Waiting::kStageFree);
            if (k_block < kStages) wait_for_wgrad(shared, params.deadline, position, ring.index);
            if (k_block == 0) trace.mark(Mark::kLoading);
            load_stage<kGemm>(shared, params, unit, weights, rank, ring.index, k_block);
            ring.advance();
        }
        grant_outputs<kGemm>(shared, params, unit, rank, position);
        trace.mark(Mark::kLoaded);
    }
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
