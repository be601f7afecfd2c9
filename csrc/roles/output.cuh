// How results leave a CTA. An SM sends at most 32 bytes a cycle, so a tile's results take thousands of cycles to go:
// they must travel while the next tile is multiplied. Behind a unit's operand stages the ring therefore grants *output
// stages*: the math warps only drop their results there, and the storer warp sends them and then hands the stage back.
//
// A stage holds three parts of [128 rows][128 bytes] in the 128-byte swizzle; warpgroup w owns rows 64w..64w+63 of
// each.
//   fc1, dgrad2: gate, up, a of 64 columns      fc2, dgrad1, wgrad in bf16: two parts of 64 columns
//   wgrad: two or three of 32 columns of fp32
// Where the epilogue adds to or transforms what is in memory (h for dgrad2, the gradient for an adding wgrad), the
// stage arrives with it, but for what is added in L2 (added_in_l2).
#pragma once
#include "ptx/matrix.cuh"
#include "ptx/tma.cuh"
#include "roles/gemm_params.cuh"

namespace megamoe {

constexpr int kPartBytes = kTileM * 128;
static_assert(kParts * kPartBytes == kStageBytes && kPartBytes == kBytesA && kSpareParts * kPartBytes == kSpareBytes);

__device__ __forceinline__ Unit unit_of(const UnitSlot& slot) { return {slot.m_tile, slot.n_tile, slot.n_pair != 0}; }

__device__ __forceinline__ uint8_t* output_memory(SharedStorage& shared, OutputPlace place) {
    return place.index == kSpare ? shared.spare : shared.ring[place.index];
}

// `count` warps of this CTA are done with the place. Only a stage of the ring concerns the peer's loader too. Arrivals
// there count one each: an idle warp of the peer may arrive for the next lap while ours are under way. It then takes
// the place of one of them, which is as good, but a larger one would no longer fit.
__device__ __forceinline__ void release_output(SharedStorage& shared, OutputPlace place, uint32_t count) {
    const uint32_t lane = threadIdx.x & 31;
    __syncwarp();  // as in release_stage
    if (place.index == kSpare) {
        if (lane == 0) ptx::mbarrier_arrive(&shared.stage_free[kSpare], count);
    } else if (lane < kClusterSize * count) {
        ptx::mbarrier_arrive_cta(&shared.stage_free[place.index], lane % kClusterSize);
    }
}

// What one math warpgroup does of a unit.
struct Share {
    int64_t row;    // its first row in the row pools (wgrad: in the gradient)
    int rows_left;  // rows from there to the end of the expert
    int column;     // first column of the result
    int n_tile;
    bool works;
};

template <Gemm kGemm>
__device__ __forceinline__ Share share_of(const GemmParams& params, const UnitSlot& slot, int rank, int warpgroup) {
    using Traits = GemmTraits<kGemm>;
    const Unit unit = unit_of(slot);
    const int row = m_tile_of(unit, rank) * kTileM + warpgroup * kWarpgroupM;
    const int n_tile = n_tile_of(unit, rank);
    Share share;
    share.row = row + (Traits::kIsWgrad ? 0 : slot.row_begin);
    const int m_rows = Traits::kIsWgrad ? params.m_extent : slot.rows;
    share.rows_left = m_rows - row;
    share.column = n_tile * Traits::kColumns;
    share.n_tile = n_tile;
    share.works = has_work(kGemm, unit, rank, warpgroup, m_rows, params.n_extent);
    return share;
}

// --- math warps
// -------------------------------------------------------------------------------------------------------

// Waits for a place; the address of this warp's 16 rows in its first part.
__device__ __forceinline__ uint32_t acquire_output(SharedStorage& shared, const Deadline& deadline, int warp_row,
                                                   OutputPlace place) {
    wait(&shared.stage_full[place.index], place.parity, deadline, Waiting::kStageFull);
    __syncwarp();
    return ptx::smem_address(output_memory(shared, place)) + warp_row * 128;
}

// Hands the warp's rows to the storer.
__device__ __forceinline__ void publish_output(SharedStorage& shared, int warpgroup, OutputPlace place) {
    ptx::fence_async_shared();  // this thread's writes before the TMA unit's reads
    __syncwarp();
    if ((threadIdx.x & 31) == 0) ptx::mbarrier_arrive(&shared.output_full[warpgroup][place.index]);
}

// Address of this lane's row of the 8x8 blocks (rows 0-7, 8-15) x (columns 8j, 8j + 8) of a warp's rows of a part.
__device__ __forceinline__ uint32_t block_address(uint32_t rows, int j) {
    const int lane = threadIdx.x & 31;
    const int row = (lane & 7) + ((lane >> 3) & 1) * 8;
    return rows + ptx::swizzle_128(row, j + (lane >> 4));
}

// 64 columns of bf16: `fragment(j)` returns the registers of blocks j and j + 1.
template <typename Fragment>
__device__ __forceinline__ void put_part(uint32_t rows, Fragment fragment) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        const uint4 v = fragment(j);
        ptx::store_matrix_x4(block_address(rows, j), v.x, v.y, v.z, v.w);
    }
}

// --- storer warps
// -----------------------------------------------------------------------------------------------------

// One output stage of a warpgroup; `part` is its first part in shared memory.
template <Gemm kGemm>
__device__ __forceinline__ void send_stage(const GemmParams& params, const Share& share, const CUtensorMap* gradient,
                                           int stage, const uint8_t* part) {
    const int row = static_cast<int>(share.row);
    if constexpr (kGemm == Gemm::kFc1 || kGemm == Gemm::kDgrad2) {
        const int column = share.column + stage * kChunkColumns;
        ptx::tma_store_2d(&params.out, part, column, row);
        ptx::tma_store_2d(&params.out, part + kPartBytes, params.n_extent + column, row);
        ptx::tma_store_2d(&params.act, part + 2 * kPartBytes, column, row);
    } else if constexpr (kGemm == Gemm::kWgrad) {
        const auto [first, parts] = grad_parts(stage);
        for (int i = 0; i < parts; ++i) {
            const uint8_t* from = part + i * kPartBytes;
            const int column = share.column + (first + i) * kGradColumns;
            if (params.accumulate && added_in_l2(stage)) {
                ptx::tma_add_2d(gradient, from, column, row);
            } else {
                ptx::tma_store_2d(gradient, from, column, row);
            }
        }
    } else {
        const int column = share.column + stage * 2 * kChunkColumns;
        const CUtensorMap* out = kGemm == Gemm::kWgradBf16 ? gradient : &params.out;
        ptx::tma_store_2d(out, part, column, row);
        ptx::tma_store_2d(out, part + kPartBytes, column + kChunkColumns, row);
    }
}

// Parity of output_full, a bit per place and warpgroup.
struct Laps {
    uint32_t of[kMathWarpgroups] = {};
};

// Sends a unit's output stages of both warpgroups, by a whole warp. `send(warpgroup, share, stage, part)` copies what
// lies at `part`: on return it has been read or, where the TMA unit reads it (kByTma), will be. Returns how many
// warpgroups had work.
template <Gemm kGemm, bool kByTma, class Send>
__device__ __forceinline__ int store_unit(SharedStorage& shared, const GemmParams& params, const UnitSlot& slot,
                                          int rank, Position& position, Laps& laps, Trace& trace, Send&& send) {
    const Unit unit = unit_of(slot);
    const int outputs = output_stages(kGemm, params.n_extent, unit, slot.k_blocks);
    position.ring.skip(slot.k_blocks);
    int working = 0;
#pragma unroll
    for (int w = 0; w < kMathWarpgroups; ++w) working += share_of<kGemm>(params, slot, rank, w).works;
    // By TMA a stage is handed back when the next one is on its way, so that the SM never stops sending. Not where
    // gradients come in too: there, sending faster slowed what is loaded (measured: 2 to 8%).
    const bool in_step = !kByTma || (kGemm == Gemm::kWgrad && params.accumulate);
    OutputPlace on_the_way{-1, 0};
    for (int turn = 0; turn < outputs; ++turn) {
        const int stage = sent_stage(kGemm, turn, outputs);
        const OutputPlace place = position.next_output<kGemm>(stage);
        // Handed back by the math warps:
        if (kGemm == Gemm::kDgrad2 && stage >= dswiglu_chunks(params.n_extent, n_tile_of(unit, rank))) continue;
        if (working == 0) continue;
#pragma unroll
        for (int w = 0; w < kMathWarpgroups; ++w) {
            if (w >= working) break;
            wait(&shared.output_full[w][place.index], laps.of[w] >> place.index & 1, params.deadline,
                 Waiting::kOutputFull);
            laps.of[w] ^= 1u << place.index;
            if (turn == 0) trace.mark(Mark::kFirstFull);
            send(w, share_of<kGemm>(params, slot, rank, w), stage, output_memory(shared, place) + w * (kPartBytes / 2));
        }
        if (kByTma) ptx::tma_store_commit();
        if (in_step) {
            if (kByTma) ptx::tma_store_wait_read<0>();
            release_output(shared, place, working * kWarpgroupWarps);
            continue;
        }
        if (on_the_way.index >= 0) {
            ptx::tma_store_wait_read<1>();
            release_output(shared, on_the_way, working * kWarpgroupWarps);
        }
        on_the_way = place;
    }
    if (on_the_way.index >= 0) {
        ptx::tma_store_wait_read<0>();
        release_output(shared, on_the_way, working * kWarpgroupWarps);
    }
    trace.mark(Mark::kSent);
    return working;
}

// Sends by TMA.
template <Gemm kGemm>
__device__ __forceinline__ int store_unit_tma(SharedStorage& shared, const GemmParams& params, const UnitSlot& slot,
                                              int rank, Position& position, Laps& laps, Trace& trace) {
    const CUtensorMap* gradient = params.expert_maps + slot.expert;
    return store_unit<kGemm, true>(shared, params, slot, rank, position, laps, trace,
                                   [&](int, const Share& share, int stage, const uint8_t* part) {
                                       if ((threadIdx.x & 31) != 0) return;
                                       send_stage<kGemm>(params, share, gradient, stage, part);
                                   });
}

// Everything that this lane sent is performed.
__device__ __forceinline__ void finish_stores() { ptx::tma_store_wait_all(); }

// Storer role: a whole warp; one lane issues.
template <Gemm kGemm>
__device__ void storer_role(SharedStorage& shared, const GemmParams& params, int rank) {
    Position position;
    UnitCursor units;
    Laps laps;
    Trace trace(params.trace);
    while (true) {
        const UnitSlot slot = next_unit(shared, units, params.deadline);
        if (slot.expert < 0) break;
        trace.begin_unit();
        store_unit_tma<kGemm>(shared, params, slot, rank, position, laps, trace);
    }
    finish_stores();
}

}  // namespace megamoe
