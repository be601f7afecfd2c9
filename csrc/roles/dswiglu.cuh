// Epilogue of dgrad2. da_bar = fc2^T dY sits in the accumulators. h comes through the operand ring in chunks of 64
// columns of I, [128 gate rows][128 up rows]; dg, du and a replace it there and leave as rows.
#pragma once
#include "roles/epilogue.cuh"

namespace megamoe {

// Chunks of column tile `n_tile`: fewer than four where I ends inside the tile, none behind its end.
__device__ __forceinline__ int dswiglu_chunks(const GemmParams& params, int n_tile) {
    const int left = (params.n_extent - n_tile * kTileN) / kChunkColumns;
    return max(0, min(kTileN / kChunkColumns, left));
}

// A stage is free only when both CTAs are done with it, so both walk the longer of the two.
__device__ __forceinline__ int dswiglu_stages(const GemmParams& params, Unit unit) {
    return max(dswiglu_chunks(params, n_tile_of(unit, 0)), dswiglu_chunks(params, n_tile_of(unit, 1)));
}

// One chunk of a warp; `gate` is the address of its 16 gate rows in the stage.
template <int kChunk>
__device__ __forceinline__ void dswiglu_chunk(uint32_t gate, float2 p, Pair limit, float2& dp, const float (&d)[128]) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        const uint32_t at = block_address(gate, j);
        uint32_t g[4], u[4];
        PairGrad grad[4];
        ptx::load_matrix_x4(at, g);
        ptx::load_matrix_x4(at + kBytesA, u);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* da_bar = &d[4 * (kChunk * 8 + j) + 2 * i];
            grad[i] = swiglu_grad(g[i], u[i], i % 2 ? p.y : p.x, da_bar, limit, i % 2 ? dp.y : dp.x);
        }
        ptx::store_matrix_x4(at, grad[0].dg, grad[1].dg, grad[2].dg, grad[3].dg);
        ptx::store_matrix_x4(at + kBytesA, grad[0].du, grad[1].du, grad[2].du, grad[3].du);
        ptx::store_matrix_x4(at + 2 * kBytesA, grad[0].a, grad[1].a, grad[2].a, grad[3].a);
    }
}

// Sums this column tile's share of dp over the four threads of a row, in a fixed order.
__device__ __forceinline__ void store_dp(const GemmParams& params, const TileView& tile, float2 dp) {
#pragma unroll
    for (int step = 1; step <= 2; step *= 2) {
        dp.x = __fadd_rn(dp.x, __shfl_xor_sync(0xffffffffu, dp.x, step));
        dp.y = __fadd_rn(dp.y, __shfl_xor_sync(0xffffffffu, dp.y, step));
    }
    const int lane = threadIdx.x & 31;
    const int row = lane / 4;
    const int n_tiles = ceil_div(params.n_extent, kTileN);
    float* out = params.dp_partials + (tile.row + row) * n_tiles + tile.n_tile;
    if (lane % 4 == 0 && row < tile.rows_left) out[0] = dp.x;
    if (lane % 4 == 0 && row + 8 < tile.rows_left) out[8 * n_tiles] = dp.y;
}

template <int kChunk>
__device__ __forceinline__ void dswiglu_step(SharedStorage& shared, const GemmParams& params, const TileView& tile,
                                             int warp_row, float2 p, float2& dp, const float (&d)[128], int chunks,
                                             StageCursor& cursor) {
    wait(&shared.stage_full[cursor.index], cursor.parity, params.deadline, Waiting::kStageFull);
    if (kChunk < chunks) {
        const uint32_t gate = ptx::smem_address(shared.ring[cursor.index]) + warp_row * 128;
        dswiglu_chunk<kChunk>(gate, p, params.limit, dp, d);
        __syncwarp();
        const int inter = params.n_extent;
        const int column = tile.column + kChunk * kChunkColumns;
        __nv_bfloat16* dh = params.out + tile.row * (2 * inter) + column;
        write_rows(gate, dh, 2 * inter);
        write_rows(gate + kBytesA, dh + inter, 2 * inter);
        write_rows(gate + 2 * kBytesA, params.act + tile.row * inter + column, inter);
        // Written by st.shared, read by ld.shared, refilled by TMA: order this proxy's accesses before the TMA's.
        ptx::fence_async_shared();
        __syncwarp();
    }
    release_stage(shared, cursor.index);
    cursor.advance();
}

// `warp_row`: the warp's first row in the CTA's tile. The ring holds `stages` chunks, this warp computes `chunks`.
__device__ __forceinline__ void dswiglu_epilogue(SharedStorage& shared, const GemmParams& params, const TileView& tile,
                                                 int warp_row, float2 p, const float (&d)[128], int chunks, int stages,
                                                 StageCursor& cursor) {
    float2 dp = {0.0f, 0.0f};
    dswiglu_step<0>(shared, params, tile, warp_row, p, dp, d, chunks, cursor);
    dswiglu_step<1>(shared, params, tile, warp_row, p, dp, d, chunks, cursor);
    if (stages > 2) {
        dswiglu_step<2>(shared, params, tile, warp_row, p, dp, d, chunks, cursor);
        dswiglu_step<3>(shared, params, tile, warp_row, p, dp, d, chunks, cursor);
    }
    if (chunks > 0) store_dp(params, tile, dp);
}

}  // namespace megamoe
