// Epilogues of a math warp: from its 16x256 fp32 accumulators to memory.
// Accumulator layout (wgmma m64n256): block n8 = 0..31 of 8 columns, d[4 n8 + i]; a thread holds rows lane/4 (i = 0, 1)
// and lane/4 + 8 (i = 2, 3) of its warp's 16 rows, columns 2 (lane % 4) + {0, 1} of the block.
#pragma once
#include "roles/gemm_params.cuh"
#include "roles/staging.cuh"

namespace megamoe {

// What an epilogue needs to know of its warp's 16 rows.
struct TileView {
    int row;        // first row in the row pools (wgrad: in the gradient)
    int rows_left;  // rows from there to the end of the expert; may be <= 0
    int column;     // first column of the result
    int n_tile;
};

// Eight n8 blocks from `first` as 64 columns of bf16.
__device__ __forceinline__ void stage_bf16(const float (&d)[128], int first, uint32_t chunk) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        const float* v = &d[4 * (first + j)];
        ptx::store_matrix_x4(matrix_address(chunk, j), pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]),
                             pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
    }
}

// fc2 and dgrad1: rows of bf16.
__device__ __forceinline__ void store_epilogue(const GemmParams& params, Staging& staging, const TileView& tile,
                                               const float (&d)[128]) {
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
        stage_bf16(d, chunk * 8, staging.acquire());
        staging.store(&params.out, tile.column + chunk * 64, tile.row);
    }
}

// The routing weights of this thread's two rows; 0 for padding.
__device__ __forceinline__ float2 row_weights(const GemmParams& params, const TileView& tile) {
    const int row = (threadIdx.x & 31) / 4;
    const float* p = params.row_weights + tile.row + row;
    return {row < tile.rows_left ? p[0] : 0.0f, row + 8 < tile.rows_left ? p[8] : 0.0f};
}

// The value that h holds after rounding; a is computed from it, in forward and in backward alike.
__device__ __forceinline__ float rounded(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

__device__ __forceinline__ uint32_t swiglu_pair(const float* g, const float* u, float p, float limit) {
    return pack_bf16(swiglu(rounded(g[0]), rounded(u[0]), p, limit), swiglu(rounded(g[1]), rounded(u[1]), p, limit));
}

// fc1: blocks 0-15 are gate columns, 16-31 the up columns that belong to them.
__device__ __forceinline__ void swiglu_epilogue(const GemmParams& params, Staging& staging, const TileView& tile,
                                                float2 p, const float (&d)[128]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int column = tile.column + half * 64;
        stage_bf16(d, half * 8, staging.acquire());
        staging.store(&params.out, column, tile.row);
        stage_bf16(d, 16 + half * 8, staging.acquire());
        staging.store(&params.out, params.n_extent + column, tile.row);
        const uint32_t chunk = staging.acquire();
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            const float* g = &d[4 * (half * 8 + j)];
            const float* u = g + 64;
            ptx::store_matrix_x4(matrix_address(chunk, j), swiglu_pair(g, u, p.x, params.limit),
                                 swiglu_pair(g + 2, u + 2, p.y, params.limit),
                                 swiglu_pair(g + 4, u + 4, p.x, params.limit),
                                 swiglu_pair(g + 6, u + 6, p.y, params.limit));
        }
        staging.store(&params.act, column, tile.row);
    }
}

// wgrad: fp32, 32 columns a chunk.
__device__ __forceinline__ void wgrad_epilogue(const GemmParams& params, Staging& staging, const TileView& tile,
                                               const CUtensorMap* gradient, const float (&d)[128]) {
    const int lane = threadIdx.x & 31;
    const int row = lane / 4;
#pragma unroll
    for (int chunk = 0; chunk < 8; ++chunk) {
        const uint32_t base = staging.acquire() + (lane & 1) * 8;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float* v = &d[4 * (chunk * 4 + j)];
            const int unit = 2 * j + (lane & 3) / 2;
            ptx::store_shared_v2(base + ptx::swizzle_128(row, unit), v[0], v[1]);
            ptx::store_shared_v2(base + ptx::swizzle_128(row + 8, unit), v[2], v[3]);
        }
        if (params.accumulate) {
            staging.reduce_add(gradient, tile.column + chunk * 32, tile.row);
        } else {
            staging.store(gradient, tile.column + chunk * 32, tile.row);
        }
    }
}

}  // namespace megamoe
