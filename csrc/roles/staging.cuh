// Output staging of a math warp: chunks of 16 rows x 128 bytes go registers -> shared memory -> TMA store, with
// kStagingChunks chunks under way. Warps stage on their own, so no epilogue needs a barrier.
#pragma once
#include "ptx/matrix.cuh"
#include "ptx/tma.cuh"
#include "roles/shared.cuh"
#include "roles/swiglu.cuh"

namespace megamoe {

__device__ __forceinline__ bool first_lane() { return (threadIdx.x & 31) == 0; }

// Orders this warp's shared-memory writes before the reads of a TMA store that its first lane issues next.
__device__ __forceinline__ void publish_to_tma() {
    ptx::fence_async_shared();
    __syncwarp();
}

class Staging {
public:
    __device__ Staging(SharedStorage& shared, int math_warp) : chunks_(&shared.staging[math_warp][0][0]) {}

    // A chunk that no store reads any more; its shared-memory address.
    __device__ __forceinline__ uint32_t acquire() {
        if (first_lane()) ptx::tma_store_wait_read<kStagingChunks - 1>();
        __syncwarp();
        return ptx::smem_address(chunk());
    }

    __device__ __forceinline__ void store(const CUtensorMap* map, int x, int y) { send<false>(map, x, y); }
    __device__ __forceinline__ void reduce_add(const CUtensorMap* map, int x, int y) { send<true>(map, x, y); }

private:
    __device__ __forceinline__ uint8_t* chunk() const { return chunks_ + next_ * kChunkBytes; }

    template <bool kAdd>
    __device__ __forceinline__ void send(const CUtensorMap* map, int x, int y) {
        publish_to_tma();
        if (first_lane()) {
            if constexpr (kAdd) {
                ptx::tma_reduce_add_2d(map, chunk(), x, y);
            } else {
                ptx::tma_store_2d(map, chunk(), x, y);
            }
            ptx::tma_store_commit();
        }
        next_ = (next_ + 1) % kStagingChunks;
    }

    uint8_t* chunks_;
    int next_ = 0;
};

// Where this lane's row of an 8x8 block lies when a warp moves 16 rows x 64 columns of bf16 with x4 instructions:
// blocks (rows 0-7, 8-15) x (columns 8j, 8j+8).
__device__ __forceinline__ uint32_t matrix_address(uint32_t chunk, int j) {
    const int lane = threadIdx.x & 31;
    const int row = (lane & 7) + ((lane >> 3) & 1) * 8;
    return chunk + ptx::swizzle_128(row, j + (lane >> 4));
}

}  // namespace megamoe
