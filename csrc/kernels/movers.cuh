// How many warps of the stand-alone kernels move rows, and their shared memory.
#pragma once
#include "roles/mover.cuh"

namespace megamoe {

constexpr int kMoverStages = 4;
constexpr int kMoverWarps = 6;  // x 4 stages x 8 KB = 192 KB: one CTA on an SM
constexpr int kMoverThreads = 32 * kMoverWarps;
static_assert(kMoverThreads >= kMaxRanks);  // one thread per peer signals

struct MoversShared {
    MoverShared<kMoverStages> of_warp[kMoverWarps];
};
static_assert(sizeof(MoversShared) <= 227 * 1024);

}  // namespace megamoe
