// The byte layout of a plan's tables: one allocation in this rank's own device memory, kept until backward is done.
// Plain C++, so that a CPU test can compile it.
//
// Letters: T tokens of this rank, K top-k, E experts in all, R ranks, L = E / R.
#pragma once
#include "layout/workspace.cuh"

namespace megamoe {

constexpr int kTableControlInts = 8;

// Offsets in bytes, each a multiple of kRegionAlignment.
struct PlanLayout {
    int64_t control;        // i32 [kTableControlInts]
    int64_t counts;         // i32 [R, E]
    int64_t expert_rows;    // i32 [L]
    int64_t expert_offset;  // i32 [L + 1]
    int64_t block_counts;   // i32 [blocks, E], read by the plan's kernels only
    int64_t topk_ids;       // i32 [T, K]
    int64_t slot_of;        // i64 [T, K]
    int64_t source_of;      // i64 [capacity]: last, as its size may not be known when the others are allocated
};

// slots = T * K; blocks: CTAs that count them.
MEGAMOE_BOTH constexpr PlanLayout plan_layout(int64_t ranks, int64_t experts, int64_t slots, int64_t blocks) {
    const int64_t local = experts / ranks;
    PlanLayout layout{};
    int64_t next = 0;
    layout.control = next, next += align_region(kTableControlInts * 4);
    layout.counts = next, next += align_region(ranks * experts * 4);
    layout.expert_rows = next, next += align_region(local * 4);
    layout.expert_offset = next, next += align_region((local + 1) * 4);
    layout.block_counts = next, next += align_region(blocks * experts * 4);
    layout.topk_ids = next, next += align_region(slots * 4);
    layout.slot_of = next, next += align_region(slots * 8);
    layout.source_of = next;
    return layout;
}

}  // namespace megamoe
