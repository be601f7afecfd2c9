// Epilogue of dgrad2. da_bar = fc2^T dY sits in the accumulators; h comes through the operand ring in chunks of 64
// columns of I, and dh and a leave from the same shared memory: dg over g, du over u, a behind them.
#pragma once
#include "roles/epilogue.cuh"

namespace megamoe {

constexpr int kChunkColumns = 64;

// Chunks of column tile `n_tile`: fewer than four where I ends inside the tile, none behind its end.
__device__ __forceinline__ int dswiglu_chunks(const GemmParams& params, int n_tile) {
    const int left = params.n_extent - n_tile * kTileN;
    return left >= kTileN ? kTileN / kChunkColumns : (left > 0 ? left / kChunkColumns : 0);
}

// A stage is free only when both CTAs are done with it, so both walk the longer of the two.
__device__ __forceinline__ int dswiglu_stages(const GemmParams& params, Unit unit) {
    return max(dswiglu_chunks(params, n_tile_of(unit, 0)), dswiglu_chunks(params, n_tile_of(unit, 1)));
}

// One row's two neighbouring columns.
struct GradPair {
    uint32_t dg, du, a;
};

__device__ __forceinline__ GradPair grad_pair(uint32_t g, uint32_t u, const float* da_bar, float p, float limit,
                                              float& dp) {
    const SwiGLUGrad low = swiglu_grad(bf16_low(g), bf16_low(u), p, da_bar[0], limit);
    const SwiGLUGrad high = swiglu_grad(bf16_high(g), bf16_high(u), p, da_bar[1], limit);
    dp = __fadd_rn(__fadd_rn(dp, low.dp), high.dp);
    return {pack_bf16(low.dg, high.dg), pack_bf16(low.du, high.du), pack_bf16(low.a, high.a)};
}

// One chunk of a warp: `d` are its accumulators, `gate` the address of its 16 gate rows in the stage.
template <int kChunk>
__device__ __forceinline__ void dswiglu_chunk(const GemmParams& params, uint32_t gate, float2 p, float2& dp,
                                              const float (&d)[128]) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        const uint32_t at = matrix_address(gate, j);
        uint32_t g[4], u[4];
        GradPair grad[4];
        ptx::load_matrix_x4(at, g);
        ptx::load_matrix_x4(at + kBytesA, u);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* da_bar = &d[4 * (kChunk * 8 + j) + 2 * i];
            grad[i] = grad_pair(g[i], u[i], da_bar, i % 2 ? p.y : p.x, params.limit, i % 2 ? dp.y : dp.x);
        }
        ptx::store_matrix_x4(at, grad[0].dg, grad[1].dg, grad[2].dg, grad[3].dg);
        ptx::store_matrix_x4(at + kBytesA, grad[0].du, grad[1].du, grad[2].du, grad[3].du);
        ptx::store_matrix_x4(at + 2 * kBytesA, grad[0].a, grad[1].a, grad[2].a, grad[3].a);
    }
}

__device__ __forceinline__ void send_dswiglu_chunk(const GemmParams& params, const TileView& tile, const uint8_t* gate,
                                                   int column) {
    publish_to_tma();
    if (!first_lane()) return;
    ptx::tma_store_2d(&params.out, gate, column, tile.row);
    ptx::tma_store_2d(&params.out, gate + kBytesA, params.n_extent + column, tile.row);
    ptx::tma_store_2d(&params.act, gate + 2 * kBytesA, column, tile.row);
    ptx::tma_store_commit();
}

// The chunk's stage goes back once the stores of the warp have read it: when the next chunk is on its way.
template <int kPending>
__device__ __forceinline__ void release_after_stores(SharedStorage& shared, int stage) {
    if (first_lane()) ptx::tma_store_wait_read<kPending>();
    __syncwarp();
    release_stage(shared, stage);
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
    float* out = params.dp_partials + static_cast<int64_t>(tile.row + row) * n_tiles + tile.n_tile;
    if (lane % 4 == 0 && row < tile.rows_left) out[0] = dp.x;
    if (lane % 4 == 0 && row + 8 < tile.rows_left) out[8 * n_tiles] = dp.y;
}

template <int kChunk>
__device__ __forceinline__ void dswiglu_step(SharedStorage& shared, const GemmParams& params, const TileView& tile,
                                             int warp_row, float2 p, float2& dp, const float (&d)[128], int chunks,
                                             StageCursor& cursor, int& previous) {
    wait(&shared.stage_full[cursor.index], cursor.parity, params.deadline, Waiting::kStageFull);
    if (kChunk < chunks) {
        const uint8_t* gate = shared.ring[cursor.index] + warp_row * 128;
        dswiglu_chunk<kChunk>(params, ptx::smem_address(gate), p, dp, d);
        send_dswiglu_chunk(params, tile, gate, tile.column + kChunk * kChunkColumns);
        if (previous >= 0) release_after_stores<1>(shared, previous);
        previous = cursor.index;
    } else {
        release_stage(shared, cursor.index);
    }
    cursor.advance();
}

// `warp_row`: the warp's first row in the CTA's tile. `chunks`: chunks this warp computes, of `stages` in the ring.
__device__ __forceinline__ void dswiglu_epilogue(SharedStorage& shared, const GemmParams& params, const TileView& tile,
                                                 int warp_row, float2 p, const float (&d)[128], int chunks, int stages,
                                                 StageCursor& cursor) {
    float2 dp = {0.0f, 0.0f};
    int previous = -1;
    dswiglu_step<0>(shared, params, tile, warp_row, p, dp, d, chunks, cursor, previous);
    dswiglu_step<1>(shared, params, tile, warp_row, p, dp, d, chunks, cursor, previous);
    if (stages > 2) {
        dswiglu_step<2>(shared, params, tile, warp_row, p, dp, d, chunks, cursor, previous);
        dswiglu_step<3>(shared, params, tile, warp_row, p, dp, d, chunks, cursor, previous);
    }
    if (previous >= 0) release_after_stores<0>(shared, previous);
    if (chunks > 0) store_dp(params, tile, dp);
}

}  // namespace megamoe
