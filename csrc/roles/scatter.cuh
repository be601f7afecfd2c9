// Scatter: the storer sends the rows of fc2's and dgrad1's tiles by bulk copies straight into the combine slots of the
// ranks that hold their tokens, over NVLink where those are peers.
#pragma once
#include "comm/counters.cuh"
#include "roles/fused_params.cuh"
#include "roles/output.cuh"

namespace megamoe {

constexpr int kRowsPerLane = kWarpgroupM / 32;

// Where the rows of a warpgroup's part of a tile belong; lane i holds rows i and i + 32. Null: no row.
struct RowTargets {
    uint8_t* slot[kRowsPerLane];
};

__device__ __forceinline__ RowTargets row_targets(const FusedParams& params, const Share& share) {
    RowTargets targets;
#pragma unroll
    for (int i = 0; i < kRowsPerLane; ++i) {
        const int row = (threadIdx.x & 31) + 32 * i;
        const RowSource source = decode_source(row < share.rows_left ? params.source_of[share.row + row] : -1);
        targets.slot[i] = source.rank < 0 ? nullptr
                                          : combine_slot(params.peers, source.rank, source.flat / params.top_k,
                                                         source.flat % params.top_k);
    }
    return targets;
}

// A warpgroup's rows of output stage `stage`, each in one piece; a lane takes two of them.
__device__ __forceinline__ void scatter_stage(const uint8_t* memory, int warpgroup, const RowTargets& targets,
                                              int column, int stage) {
    const int pitch = scatter_pitch(stage);
    const int64_t at = int64_t{column} * 2 + (stage == 0 ? 0 : scatter_pitch(0));
#pragma unroll
    for (int i = 0; i < kRowsPerLane; ++i) {
        const int row = warpgroup * kWarpgroupM + (threadIdx.x & 31) + 32 * i;
        if (targets.slot[i] != nullptr) ptx::bulk_store(targets.slot[i] + at, memory + row * pitch, pitch);
    }
}

// dp of a warpgroup's rows, summed over dgrad2's column tiles in ascending order, to where their tokens are.
__device__ __forceinline__ void push_dweights(const FusedParams& params, const Share& share) {
    const GemmParams& dgrad2 = params.products[kProductDgrad2];
    const int n_tiles = ceil_div(dgrad2.n_extent, kTileN);
#pragma unroll 1
    for (int row = threadIdx.x & 31; row < min(kWarpgroupM, share.rows_left); row += 32) {
        const RowSource source = decode_source(params.source_of[share.row + row]);
        const float* partial = dgrad2.dp_partials + (share.row + row) * n_tiles;
        float sum = ptx::load_float(partial);
        for (int i = 1; i < n_tiles; ++i) sum = __fadd_rn(sum, ptx::load_float(partial + i));
        reinterpret_cast<float*>(region(params.peers, source.rank, params.peers.layout.dweights))[source.flat] = sum;
    }
}

// One finished unit of a row tile. Pushed -> tile flag: every lane's wait_group 0 and fence.proxy.async over its bulk
// copies, and its plain stores of dp; barrier; one lane fence.acq_rel.sys; atom.acq_rel.gpu; whoever completes the tile
// st.release.sys at every rank (it fences again, over what the other units' fences made cumulative).
__device__ __forceinline__ void count_pushed(const FusedParams& params, int tile, int warpgroups, int all) {
    const Peers& peers = params.peers;
    ptx::tma_store_wait_all();
    ptx::fence_async();
    __syncwarp();
    if ((threadIdx.x & 31) != 0) return;
    random_delay();
    ptx::fence_acq_rel_sys();
    if (ptx::add_acq_rel_gpu(params.counters.pushed + tile, warpgroups) + warpgroups != all) return;
    const uint32_t epoch = static_cast<uint32_t>(state_word(peers, kStateOpEpoch));
    ptx::fence_acq_rel_sys();
    for (int r = 0; r < peers.ranks; ++r) ptx::store_release_sys(tile_flag(peers, r, peers.rank, tile), epoch);
}

template <Gemm kGemm>
__device__ __forceinline__ void scatter_unit(SharedStorage& shared, const FusedParams& params,
                                             const GemmParams& product, const UnitSlot& slot, int rank,
                                             Position& position, Laps& laps, Trace& trace) {
    const Unit unit = unit_of(slot);
    const int m_tile = m_tile_of(unit, rank);
    RowTargets targets[kMathWarpgroups];
#pragma unroll
    for (int w = 0; w < kMathWarpgroups; ++w) {
        targets[w] = row_targets(params, share_of<kGemm>(product, slot, rank, w));
    }
    const int working =
        store_unit<kGemm>(shared, product, slot, rank, position, laps, trace,
                          [&](int w, const Share& share, int stage, const uint8_t* memory) {
                              scatter_stage(memory, w, w == 0 ? targets[0] : targets[1], share.column, stage);
                          });
    if (working == 0) return;
    if (kGemm == Gemm::kDgrad1 && n_tile_of(unit, rank) == 0) {
        for (int w = 0; w < working; ++w) push_dweights(params, share_of<kGemm>(product, slot, rank, w));
    }
    const int all = tile_shares(kGemm, product.n_extent, slot.rows, m_tile);
    count_pushed(params, slot.row_begin / kRowTile + m_tile, working, all);
}

}  // namespace megamoe
