// Scatter: the storer copies the rows of fc2's and dgrad1's tiles straight into the combine slots of the ranks that
// hold their tokens, over NVLink where those are peers.
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

// 128 columns of 64 rows: two neighbouring parts. Eight lanes a row, 16 bytes each of either part: one pointer serves
// two stores of whole lines.
__device__ __forceinline__ void scatter_stage(uint32_t part, const RowTargets& targets, int column) {
    constexpr int kRows = 4;  // a warp at a time
    const int lane = threadIdx.x & 31, row = lane / 8, unit = lane % 8;
    const int64_t at = int64_t{column} * 2 + unit * 16;
    // Row r of a batch of eight, r = row and row + 4: the swizzle is that of any batch.
    const uint32_t low = part + ptx::swizzle_128(row, unit), high = part + ptx::swizzle_128(row + kRows, unit);
#pragma unroll 2
    for (int first = 0; first < kWarpgroupM; first += 2 * kRows) {
        const uint4 v[4] = {ptx::load_shared_v4(low + first * 128), ptx::load_shared_v4(low + first * 128 + kPartBytes),
                            ptx::load_shared_v4(high + first * 128),
                            ptx::load_shared_v4(high + first * 128 + kPartBytes)};
        // The rows of a batch are neighbours: either all below 32 or none.
        const uint64_t mine = reinterpret_cast<uint64_t>(first < 32 ? targets.slot[0] : targets.slot[1]);
        const uint64_t slots[2] = {__shfl_sync(0xffffffffu, mine, (first & 31) + row),
                                   __shfl_sync(0xffffffffu, mine, (first & 31) + row + kRows)};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (slots[i] == 0) continue;
            uint8_t* to = reinterpret_cast<uint8_t*>(slots[i]) + at;
            ptx::store_v4_once(to, v[2 * i]);
            ptx::store_v4_once(to + 128, v[2 * i + 1]);
        }
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

// One finished unit of a row tile. Pushed -> tile flag: all lanes' stores; barrier; one lane fence.acq_rel.sys;
// atom.acq_rel.gpu; whoever completes the tile st.release.sys at every rank (signal fences again, over what the other
// units' fences made cumulative).
__device__ __forceinline__ void count_pushed(const FusedParams& params, int tile, int warpgroups, int all) {
    const Peers& peers = params.peers;
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
        store_unit<kGemm, false>(shared, product, slot, rank, position, laps, trace,
                                 [&](int w, const Share& share, int stage, const uint8_t* part) {
                                     scatter_stage(ptx::smem_address(part), w == 0 ? targets[0] : targets[1],
                                                   share.column + stage * 2 * kChunkColumns);
                                 });
    if (working == 0) return;
    if (kGemm == Gemm::kDgrad1 && n_tile_of(unit, rank) == 0) {
        for (int w = 0; w < working; ++w) push_dweights(params, share_of<kGemm>(product, slot, rank, w));
    }
    const int all = tile_shares(kGemm, product.n_extent, slot.rows, m_tile);
    count_pushed(params, slot.row_begin / kRowTile + m_tile, working, all);
}

}  // namespace megamoe
