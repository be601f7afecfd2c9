// A math warp turns accumulator fragments into rows and back through private chunks of shared memory, 16 rows x 128 bytes
// each, so that memory sees 16 bytes a lane and eight lanes a row. No barrier but the warp's own, no asynchronous store
// to wait for, and each row may go to an address of its own.
// Measured: 8-byte stores straight from the fragments touch 8 rows an instruction and cost a wgrad 10% of its rate.
#pragma once
#include "ptx/matrix.cuh"
#include "roles/shared.cuh"
#include "roles/swiglu.cuh"

namespace megamoe {

class Staging {
public:
    __device__ Staging(SharedStorage& shared, int math_warp)
        : chunks_(ptx::smem_address(&shared.staging[math_warp][0][0])) {}

    __device__ __forceinline__ uint32_t chunk(int index) const { return chunks_ + index * kChunkBytes; }

    // The two chunks in turn: when one is written again, the __syncwarp of the other has ordered its last reads.
    __device__ __forceinline__ uint32_t next_chunk() {
        next_ ^= 1;
        return chunk(next_);
    }

private:
    uint32_t chunks_;
    int next_ = 0;
};
static_assert(kStagingChunks == 2);

// Address of this lane's row of the 8x8 blocks (rows 0-7, 8-15) x (columns 8j, 8j + 8) of bf16.
__device__ __forceinline__ uint32_t block_address(uint32_t chunk, int j) {
    const int lane = threadIdx.x & 31;
    const int row = (lane & 7) + ((lane >> 3) & 1) * 8;
    return chunk + ptx::swizzle_128(row, j + (lane >> 4));
}

__device__ __forceinline__ void put_blocks(uint32_t chunk, int j, uint4 v) {
    ptx::store_matrix_x4(block_address(chunk, j), v.x, v.y, v.z, v.w);
}

// When a whole warp moves a chunk by rows: step i = 0..3 takes rows 4i..4i+3, 16 bytes a lane.
__device__ __forceinline__ int row_of_step(int i) { return i * 4 + (threadIdx.x & 31) / 8; }
__device__ __forceinline__ uint32_t unit_address(uint32_t chunk, int i) {
    return chunk + ptx::swizzle_128(row_of_step(i), threadIdx.x & 7);
}

// Chunk to memory; row r of the warp lies at `rows` + r * pitch (elements). The caller's writes were ordered by
// __syncwarp.
__device__ __forceinline__ void write_rows(uint32_t chunk, __nv_bfloat16* rows, int64_t pitch) {
    __nv_bfloat16* out = rows + row_of_step(0) * pitch + (threadIdx.x & 7) * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) *reinterpret_cast<uint4*>(out + 4 * i * pitch) = ptx::load_shared_v4(unit_address(chunk, i));
}

// 64 columns of bf16: `fragment(j)` returns the registers of blocks j and j + 1.
template <typename Fragment>
__device__ __forceinline__ void store_rows(uint32_t chunk, __nv_bfloat16* rows, int64_t pitch, Fragment fragment) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) put_blocks(chunk, j, fragment(j));
    __syncwarp();
    write_rows(chunk, rows, pitch);
}

}  // namespace megamoe
