// Epilogues of a math warp: from its 16x256 fp32 accumulators to memory.
// Accumulator layout (wgmma m64n256): block n8 = 0..31 of 8 columns, d[4 n8 + i]; a thread holds rows lane/4 (i = 0, 1)
// and lane/4 + 8 (i = 2, 3) of its warp's 16 rows, columns 2 (lane % 4) + {0, 1} of the block.
#pragma once
#include "ptx/reduce.cuh"
#include "roles/gemm_params.cuh"
#include "roles/staging.cuh"

namespace megamoe {

// What an epilogue needs to know of its warp's 16 rows.
struct TileView {
    int64_t row;    // first row in the row pools (wgrad: in the gradient)
    int rows_left;  // rows from there to the end of the expert; may be <= 0
    int column;     // first column of the result
    int n_tile;
};

// Blocks j and j + 1 of the 64 columns that start at block `first`.
__device__ __forceinline__ uint4 rounded_blocks(const float (&d)[128], int first, int j) {
    const float* v = &d[4 * (first + j)];
    return {pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])};
}

// fc2 and dgrad1: rows of bf16.
__device__ __forceinline__ void store_epilogue(const GemmParams& params, Staging& staging, const TileView& tile,
                                               const float (&d)[128]) {
    __nv_bfloat16* out = params.out + tile.row * params.n_extent + tile.column;
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
        if (tile.column + chunk * kChunkColumns >= params.n_extent) break;
        store_rows(staging.next_chunk(), out + chunk * kChunkColumns, params.n_extent,
                   [&](int j) { return rounded_blocks(d, chunk * 8, j); });
    }
}

// The routing weights of this thread's two rows; 0 for padding.
__device__ __forceinline__ float2 row_weights(const GemmParams& params, const TileView& tile) {
    const int row = (threadIdx.x & 31) / 4;
    const float* p = params.row_weights + tile.row + row;
    return {row < tile.rows_left ? p[0] : 0.0f, row + 8 < tile.rows_left ? p[8] : 0.0f};
}

// a of a thread's two columns; h is rounded first, as it will be read back in backward.
__device__ __forceinline__ uint32_t swiglu_of(const float* g, const float* u, float p, Pair limit) {
    return swiglu(pack_bf16(g[0], g[1]), pack_bf16(u[0], u[1]), p, limit);
}

// fc1: blocks 0-15 are gate columns, 16-31 the up columns that belong to them.
__device__ __forceinline__ void swiglu_epilogue(const GemmParams& params, Staging& staging, const TileView& tile,
                                                float2 p, const float (&d)[128]) {
    const int inter = params.n_extent;
    __nv_bfloat16* h = params.out + tile.row * (2 * inter) + tile.column;
    __nv_bfloat16* act = params.act + tile.row * inter + tile.column;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int column = half * kChunkColumns;
        store_rows(staging.next_chunk(), h + column, 2 * inter,
                   [&](int j) { return rounded_blocks(d, half * 8, j); });
        store_rows(staging.next_chunk(), h + inter + column, 2 * inter,
                   [&](int j) { return rounded_blocks(d, 16 + half * 8, j); });
        store_rows(staging.next_chunk(), act + column, inter, [&](int j) {
            const float* g = &d[4 * (half * 8 + j)];
            const float* u = g + 64;
            return uint4{swiglu_of(g, u, p.x, params.limit), swiglu_of(g + 2, u + 2, p.y, params.limit),
                         swiglu_of(g + 4, u + 4, p.x, params.limit), swiglu_of(g + 6, u + 6, p.y, params.limit)};
        });
    }
}

// 32 columns of fp32 as rows of 128 bytes.
__device__ __forceinline__ void put_floats(uint32_t chunk, const float* v) {
    const int lane = threadIdx.x & 31;
    const int row = lane / 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int unit = 2 * j + (lane & 3) / 2;
        ptx::store_shared_v2(chunk + ptx::swizzle_128(row, unit) + (lane & 1) * 8, v[4 * j], v[4 * j + 1]);
        ptx::store_shared_v2(chunk + ptx::swizzle_128(row + 8, unit) + (lane & 1) * 8, v[4 * j + 2], v[4 * j + 3]);
    }
}

// wgrad: fp32, added in the L2 cache or stored. Each element gets one add per launch, so the result is fixed.
template <bool kAdd>
__device__ __forceinline__ void write_gradient(const GemmParams& params, Staging& staging, const TileView& tile,
                                               float* gradient, const float (&d)[128]) {
    const int64_t pitch = params.n_extent;
    float* out = gradient + (tile.row + row_of_step(0)) * pitch + tile.column + (threadIdx.x & 7) * 4;
#pragma unroll
    for (int chunk = 0; chunk < 8; ++chunk) {
        if (chunk == 4 && tile.column + 128 >= params.n_extent) break;
        const uint32_t at = staging.next_chunk();
        put_floats(at, &d[16 * chunk]);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint4 v = ptx::load_shared_v4(unit_address(at, i));
            float* address = out + 4 * i * pitch + chunk * 32;
            if constexpr (kAdd) {
                ptx::reduce_add_v4(address, v);
            } else {
                *reinterpret_cast<uint4*>(address) = v;
            }
        }
    }
}

__device__ __forceinline__ void wgrad_epilogue(const GemmParams& params, Staging& staging, const TileView& tile,
                                               int expert, const float (&d)[128]) {
    float* gradient = params.gradients[expert];
    if (params.accumulate) {
        write_gradient<true>(params, staging, tile, gradient, d);
    } else {
        write_gradient<false>(params, staging, tile, gradient, d);
    }
}

// A first write for an expert without rows.
__device__ __forceinline__ void zero_gradient(const GemmParams& params, const TileView& tile, int expert) {
    const int lane = threadIdx.x & 31;
    const int columns = min(kTileN, params.n_extent - tile.column);
    float* out = params.gradients[expert] + tile.row * params.n_extent + tile.column;
    for (int row = 0; row < kWarpRows; ++row, out += params.n_extent) {
        for (int column = lane * 4; column < columns; column += 128) {
            *reinterpret_cast<float4*>(out + column) = {0.0f, 0.0f, 0.0f, 0.0f};
        }
    }
}

}  // namespace megamoe
