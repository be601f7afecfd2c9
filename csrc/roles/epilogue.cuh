// Epilogues of a math warp: from its 16x256 fp32 accumulators to output stages.
// Accumulator layout (wgmma m64n256): block n8 = 0..31 of 8 columns, d[4 n8 + i]; a thread holds rows lane/4 (i = 0, 1)
// and lane/4 + 8 (i = 2, 3) of its warp's 16 rows, columns 2 (lane % 4) + {0, 1} of the block.
#pragma once
#include "roles/output.cuh"
#include "roles/swiglu.cuh"

namespace megamoe {

// A math warp's place: which warpgroup, and its first row in the CTA's tile.
struct WarpPlace {
    int warpgroup;
    int row;
};

// Blocks j and j + 1 of the 64 columns that start at block `first`.
__device__ __forceinline__ uint4 rounded_blocks(const float (&d)[128], int first, int j) {
    const float* v = &d[4 * (first + j)];
    return {pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])};
}

// fc2, dgrad1 and wgrad in bf16: rounded.
template <Gemm kGemm>
__device__ __forceinline__ void store_epilogue(SharedStorage& shared, const GemmParams& params, WarpPlace place,
                                               const float (&d)[128], Position& position) {
#pragma unroll
    for (int stage = 0; stage < 2; ++stage) {
        const OutputPlace output = position.next_output<kGemm>(stage);
        const uint32_t rows = acquire_output(shared, params.deadline, place.row, output);
        put_part(rows, [&](int j) { return rounded_blocks(d, stage * 16, j); });
        put_part(rows + kPartBytes, [&](int j) { return rounded_blocks(d, stage * 16 + 8, j); });
        publish_output(shared, place.warpgroup, output);
    }
}

// The routing weights of this thread's two rows; 0 for padding.
__device__ __forceinline__ float2 row_weights(const GemmParams& params, const Share& share, int warp_row) {
    const int row = warp_row + (threadIdx.x & 31) / 4;
    const float* p = params.row_weights + share.row + row;
    return {row < share.rows_left ? p[0] : 0.0f, row + 8 < share.rows_left ? p[8] : 0.0f};
}

// fc1: blocks 0-15 are gate columns, 16-31 the up columns that belong to them. h is rounded first, as it will be read
// back in backward. Two blocks at a time through all three parts, so that few registers hold rounded values.
__device__ __forceinline__ void swiglu_epilogue(SharedStorage& shared, const GemmParams& params, WarpPlace place,
                                                float2 p, const float (&d)[128], Position& position) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const OutputPlace output = position.next_output<Gemm::kFc1>(half);
        const uint32_t rows = acquire_output(shared, params.deadline, place.row, output);
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            const uint4 g = rounded_blocks(d, half * 8, j), u = rounded_blocks(d, 16 + half * 8, j);
            const uint32_t at = block_address(rows, j);
            ptx::store_matrix_x4(at, g.x, g.y, g.z, g.w);
            ptx::store_matrix_x4(at + kPartBytes, u.x, u.y, u.z, u.w);
            ptx::store_matrix_x4(at + 2 * kPartBytes, swiglu(g.x, u.x, p.x, params.limit),
                                 swiglu(g.y, u.y, p.y, params.limit), swiglu(g.z, u.z, p.x, params.limit),
                                 swiglu(g.w, u.w, p.y, params.limit));
        }
        publish_output(shared, place.warpgroup, output);
    }
}

// Odd rows take blocks j ^ 2 of 32 columns of fp32, so that the accesses of half a warp fall into all banks.
__device__ __forceinline__ bool odd_row() { return (threadIdx.x & 4) != 0; }

// Where this thread's two neighbouring columns of each block, row lane/4, lie in a part of 32 columns of fp32. The
// swizzle of row lane/4 + 8 is the same.
struct FloatPlaces {
    uint32_t block[4];
};

__device__ __forceinline__ FloatPlaces float_places(uint32_t rows) {
    const int lane = threadIdx.x & 31;
    const uint32_t first = ptx::swizzle_128(lane / 4, (lane & 3) / 2) + (lane & 1) * 8;
    FloatPlaces places;
#pragma unroll
    for (int j = 0; j < 4; ++j) places.block[j] = rows + (first ^ (odd_row() ? j ^ 2 : j) * 32);
    return places;
}

// 32 columns of fp32, added to what part `part` of a stage holds or written. All loads go first: one by one, each store
// would wait out a load's latency.
__device__ __forceinline__ void put_floats(const FloatPlaces& places, int part, const float* v, bool add) {
    const auto place = [&](int i) { return places.block[i / 2] + part * kPartBytes + i % 2 * 8 * 128; };
    float2 old[8] = {};
    if (add) {
#pragma unroll
        for (int i = 0; i < 8; ++i) old[i] = ptx::load_shared_v2(place(i));
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int other = i ^ 4;
        ptx::store_shared_v2(place(i), __fadd_rn(old[i].x, odd_row() ? v[2 * other] : v[2 * i]),
                             __fadd_rn(old[i].y, odd_row() ? v[2 * other + 1] : v[2 * i + 1]));
    }
}

// wgrad: one fp32 addition per element and launch, here or in L2.
__device__ __forceinline__ void wgrad_epilogue(SharedStorage& shared, const GemmParams& params, WarpPlace place,
                                               const float (&d)[128], Position& position, Trace& trace) {
#pragma unroll
    for (int stage = 0; stage < kGradStages; ++stage) {
        const OutputPlace output = position.next_output<Gemm::kWgrad>(stage);
        const FloatPlaces places = float_places(acquire_output(shared, params.deadline, place.row, output));
        if (stage == 0) trace.mark(Mark::kFirstOutput);
#pragma unroll
        for (int i = 0; i < grad_parts(stage).count; ++i) {
            const float* part = &d[16 * (grad_parts(stage).first + i)];
            put_floats(places, i, part, params.accumulate && !added_in_l2(stage));
        }
        publish_output(shared, place.warpgroup, output);
    }
}

// A first write for an expert without rows, straight to memory. Element: of the gradient.
template <class Element>
__device__ __forceinline__ void zero_gradient(const GemmParams& params, const Share& share, int warp_row,
                                              Element* gradient) {
    constexpr int kEach = sizeof(uint4) / sizeof(Element);
    const int lane = threadIdx.x & 31;
    const int columns = min(kTileN, params.n_extent - share.column);
    Element* out = gradient + (share.row + warp_row) * params.n_extent + share.column;
    for (int row = 0; row < kWarpRows; ++row, out += params.n_extent) {
        for (int column = lane * kEach; column < columns; column += 32 * kEach) {
            *reinterpret_cast<uint4*>(out + column) = {0, 0, 0, 0};
        }
    }
}

}  // namespace megamoe
