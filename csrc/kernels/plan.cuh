// The routing plan on the device: a stable counting sort from prefix sums; no atomic decides an order.
//
//   plan_count    ids -> counts per CTA and expert; the last CTA sums them and sends this rank's counts to every peer
//   plan_place    waits for all counts; row offsets, slot_of, and the sorted list of this rank's slots for its peers
//   plan_sources  waits for all lists; source_of of this rank's rows. With one rank plan_place does it, if it has the
//   room
//
// In stream order, so that none needs more than one resident CTA. Bitwise the same as megamoe_train/plan.py.
#pragma once
#include <cuda_runtime.h>

#include "comm/peers.cuh"

namespace megamoe {

// Why a plan cannot be used; ops_plan.py: class PlanCode.
enum class PlanCode : int { kGood = 0, kBadId = 1, kOverflow = 2 };

// In mapped pinned host memory, one per plan. `epoch` is written last; 0 before.
struct PlanStatus {
    unsigned long long epoch;
    long long code;
    long long rank;       // where the bad id or the overflow is; the lowest such rank
    long long position;   // bad id: its first flat position t * K + k
    long long value;      // bad id: the id itself; overflow: that rank's capacity
    long long rows;       // M of this rank
    long long most_rows;  // most M of any rank
    long long unused;
};

// Ints of a plan in device memory.
enum PlanControl : int { kPlanCode, kPlanId, kPlanEpoch, kPlanControlInts = 8 };

struct PlanParams {
    Peers peers;
    const void* ids;  // [T, K], int64 or int32
    bool wide_ids;
    int slots;          // T * K
    int experts;        // E
    int chunk;          // slots per CTA, a multiple of kPlanThreads
    int blocks;         // CTAs of plan_count and plan_place
    int row_tile;       // every expert's segment starts at a multiple of it
    int capacity;       // rows that source_of holds; INT_MAX while it is not allocated yet
    int* block_counts;  // [blocks, E]
    int* control;       // [kPlanControlInts]
    PlanStatus* status;

    long long* slot_of;    // [T, K]
    int* ids_out;          // [T, K] as int32; bad ones -1
    int* counts;           // [R, E]
    int* expert_rows;      // [L]
    int* expert_offset;    // [L + 1]
    long long* source_of;  // [capacity]; null before plan_sources, except where one rank's plan_place fills it
};

constexpr int kPlanThreads = 256;
constexpr int kPlanSlotsPerCta = 1024;
constexpr int kPlanMaxBlocks = 128;

cudaError_t load_plan_kernels();  // see load.cuh

cudaError_t launch_plan_count(const PlanParams& params, cudaStream_t stream);
cudaError_t launch_plan_place(const PlanParams& params, cudaStream_t stream);
cudaError_t launch_plan_sources(const PlanParams& params, cudaStream_t stream);

}  // namespace megamoe
