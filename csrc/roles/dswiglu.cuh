// Epilogue of dgrad2. da_bar = fc2^T dY sits in the accumulators. The output stages arrive with h in them, 64 columns
// of I each, [128 gate rows][128 up rows]; dg, du and a replace it and leave from there.
#pragma once
#include "roles/epilogue.cuh"

namespace megamoe {

// Gate and up of blocks j and j + 1 in the accumulators' layout.
struct HBlocks {
    uint32_t g[4], u[4];
};

__device__ __forceinline__ void load_h_blocks(uint32_t rows, int j, HBlocks& h) {
    ptx::load_matrix_x4(block_address(rows, j), h.g);
    ptx::load_matrix_x4(block_address(rows, j) + kPartBytes, h.u);
}

// One chunk of a warp, the first in the accumulators; `rows` is the address of its 16 gate rows in the stage.
__device__ __forceinline__ void dswiglu_chunk(uint32_t rows, float2 p, Pair limit, float2& dp, const float (&d)[128]) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        // Not read ahead of their use: beside 128 accumulators these registers would be spilled.
        HBlocks now;
        load_h_blocks(rows, j, now);
        PairGrad grad[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* da_bar = &d[4 * j + 2 * i];
            grad[i] = swiglu_grad(now.g[i], now.u[i], i % 2 ? p.y : p.x, da_bar, limit, i % 2 ? dp.y : dp.x);
        }
        const uint32_t at = block_address(rows, j);
        ptx::store_matrix_x4(at, grad[0].dg, grad[1].dg, grad[2].dg, grad[3].dg);
        ptx::store_matrix_x4(at + kPartBytes, grad[0].du, grad[1].du, grad[2].du, grad[3].du);
        ptx::store_matrix_x4(at + 2 * kPartBytes, grad[0].a, grad[1].a, grad[2].a, grad[3].a);
    }
}

// Sums this column tile's share of dp over the four threads of a row, in a fixed order.
__device__ __forceinline__ void store_dp(const GemmParams& params, const Share& share, int warp_row, float2 dp) {
#pragma unroll
    for (int step = 1; step <= 2; step *= 2) {
        dp.x = __fadd_rn(dp.x, __shfl_xor_sync(0xffffffffu, dp.x, step));
        dp.y = __fadd_rn(dp.y, __shfl_xor_sync(0xffffffffu, dp.y, step));
    }
    const int lane = threadIdx.x & 31;
    const int row = warp_row + lane / 4;
    const int n_tiles = ceil_div(params.n_extent, kTileN);
    float* out = params.dp_partials + (share.row + row) * n_tiles + share.n_tile;
    if (lane % 4 == 0 && row < share.rows_left) out[0] = dp.x;
    if (lane % 4 == 0 && row + 8 < share.rows_left) out[8 * n_tiles] = dp.y;
}

// The next chunk's accumulators become the first.
__device__ __forceinline__ void shift_chunk(float (&d)[128]) {
    constexpr int kValues = 128 * kChunkColumns / kTileN;
#pragma unroll
    for (int i = 0; i < 128 - kValues; ++i) d[i] = d[i + kValues];
}

// The ring holds `stages` chunks, of which this CTA's column tile has the first `chunks`. A loop, for which the
// accumulators move: unrolled it is 51 KB of instructions, which the other roles' drive out of their cache.
__device__ __forceinline__ void dswiglu_epilogue(SharedStorage& shared, const GemmParams& params, const Share& share,
                                                 WarpPlace place, int stages, float2 p, float (&d)[128],
                                                 Position& position, Trace& trace) {
    const int chunks = dswiglu_chunks(params.n_extent, share.n_tile);
    float2 dp = {0.0f, 0.0f};
#pragma unroll 1
    for (int chunk = 0; chunk < stages; ++chunk) {
        const OutputPlace output = position.next_output<Gemm::kDgrad2>(chunk);
        const uint32_t rows = acquire_output(shared, params.deadline, place.row, output);
        if (chunk == 0) trace.mark(Mark::kFirstOutput);
        if (chunk < chunks) {
            dswiglu_chunk(rows, p, params.limit, dp, d);
            // Before the last hand-over, so that what the storer announces of this tile covers dp too.
            if (chunk == chunks - 1) store_dp(params, share, place.row - place.warpgroup * kWarpgroupM, dp);
            publish_output(shared, place.warpgroup, output);
        } else {
            release_output(shared, output, 1);
        }
        shift_chunk(d);
    }
}

}  // namespace megamoe
