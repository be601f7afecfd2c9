// What the warps of a CTA share: the operand ring, the output staging, the queue of units, and their barriers.
#pragma once
#include "comm/wait.cuh"
#include "ptx/bulk.cuh"
#include "ptx/thread.cuh"
#include "schedule/ring.cuh"

namespace megamoe {

constexpr int kBytesA = kTileM * kBlockK * 2;
constexpr int kBytesB = kTileN * kBlockK * 2;
constexpr int kStageBytes = kBytesA + kBytesB;
constexpr int kSpareBytes = 32768;  // beside the ring: two parts of results (roles/output.cuh)
constexpr int kThreads = 128 * (1 + kMathWarpgroups);
constexpr int kWarpRows = 16;  // rows of a math warp

// Registers per thread. The launch bound gives 168; the producer warpgroup hands its share to the math warpgroups. With
// these the products spill next to nothing (build/kernels/**/*.log). More than the launch has would be waited for
// without end.
constexpr int kLaunchRegisters = 168;
constexpr int kProducerRegisters = 104;  // a mover that pulls also sums, six 16-byte loads per lane in flight
constexpr int kMathRegisters = 200;
static_assert(128 * kProducerRegisters + 128 * kMathWarpgroups * kMathRegisters <= kThreads * kLaunchRegisters);

// One unit of work as every role of a cluster reads it.
struct alignas(16) UnitSlot {
    int expert;  // -1: no more work
    int m_tile;  // as schedule/grouped.cuh's Unit
    int n_tile;
    int n_pair;
    int row_begin;  // first row of the expert in the row pools
    int rows;       // rows of the expert
    int k_blocks;   // steps of the reduction loop
    int product;    // which of the launch's products; 0 where there is one
};
static_assert(sizeof(UnitSlot) == 32);

struct alignas(1024) SharedStorage {
    uint8_t ring[kStages][kStageBytes];
    uint8_t spare[kSpareBytes];
    UnitSlot units[kUnitSlots];
    uint64_t stage_full[kStages + 1];  // [kSpare]: the spare place, here and below
    uint64_t stage_free[kStages + 1];
    uint64_t output_full[kMathWarpgroups][kStages + 1];
    uint64_t unit_full[kUnitSlots];
    uint64_t unit_free[kUnitSlots];
    uint64_t claim_due;            // first CTA only
    int expert_rows[kMaxExperts];  // scheduler only
};
static_assert(sizeof(SharedStorage) <= 227 * 1024);

__device__ __forceinline__ int warpgroup_index() { return __shfl_sync(0xffffffffu, threadIdx.x / 128, 0); }
__device__ __forceinline__ int warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }

// By one thread of each CTA, followed by a cluster_sync of all.
__device__ __forceinline__ void init_barriers(SharedStorage& shared) {
    for (int i = 0; i <= kStages; ++i) {
        ptx::mbarrier_init(&shared.stage_full[i], 1);
        for (int w = 0; w < kMathWarpgroups; ++w) ptx::mbarrier_init(&shared.output_full[w][i], kOutputFullArrivals);
        // By the math warps, or a storer for its four.
        ptx::mbarrier_init(&shared.stage_free[i], i == kSpare ? kSpareFreeArrivals : kStageFreeArrivals);
    }
    for (int i = 0; i < kUnitSlots; ++i) {
        ptx::mbarrier_init(&shared.unit_full[i], 1);
        ptx::mbarrier_init(&shared.unit_free[i], kUnitFreeArrivals);
    }
    ptx::mbarrier_init(&shared.claim_due, 1);
    ptx::fence_mbarrier_init();
}

// The next unit, read by every thread of the calling warp. The slot is handed back at once.
__device__ __forceinline__ UnitSlot next_unit(SharedStorage& shared, UnitCursor& cursor, const Deadline& deadline) {
    wait(&shared.unit_full[cursor.index], cursor.parity, deadline, Waiting::kUnit);
    const UnitSlot unit = shared.units[cursor.index];
    __syncwarp();
    if ((threadIdx.x & 31) == 0) ptx::mbarrier_arrive_cta(&shared.unit_free[cursor.index], 0);
    cursor.advance();
    return unit;
}

// A warp is done with a stage (-1: with none): tell the loaders of both CTAs. All lanes meet first: one that had not
// yet passed its wait for the stage would miss the phase.
__device__ __forceinline__ void release_stage(SharedStorage& shared, int stage) {
    const int lane = threadIdx.x & 31;
    __syncwarp();
    if (stage >= 0 && lane < kClusterSize) ptx::mbarrier_arrive_cta(&shared.stage_free[stage], lane);
}

}  // namespace megamoe
