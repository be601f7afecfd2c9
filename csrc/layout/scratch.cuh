// The byte layout of what a fused launch needs besides its inputs and results, in this rank's own device memory and
// freed after the launch. Plain C++, so that a CPU test can compile it.
//
// Two allocations. Both passes need the first, of the same size: backward gets from the allocator what forward gave
// back. Letters: H hidden, I expert intermediate size; capacity: rows of the pools.
#pragma once
#include "layout/workspace.cuh"

namespace megamoe {

constexpr int64_t kCounterScalars = 11;    // ints before the counters that there is one of per tile or token
constexpr int64_t kCounterTileRows = 128;  // rows of a tile that has counters of its own
constexpr int64_t kDpTile = 256;           // columns of I that one partial sum of dp covers

// Offsets in bytes, each a multiple of kRegionAlignment.
struct ScratchLayout {
    int64_t pool;         // bf16 [capacity, H]: x, in backward dY
    int64_t act;          // bf16 [capacity, I]
    int64_t row_weights;  // f32 [capacity]
    int64_t counters;     // i32 [counter_ints]
    int64_t bytes;        // of the first allocation

    int64_t dp_partials;  // f32 [capacity, ceil(I / kDpTile)]
    int64_t second_pool;  // bf16 [capacity, H]: x. Last: a backward without the gradient of fc1 has none
    int64_t more_bytes;   // of the second allocation, second_pool included
};

MEGAMOE_BOTH constexpr int64_t counter_ints(int64_t capacity, int64_t tokens) {
    return kCounterScalars + 4 * (capacity / kCounterTileRows) + (tokens + 31) / 32;
}

MEGAMOE_BOTH constexpr ScratchLayout scratch_layout(int64_t capacity, int64_t tokens, int64_t hidden, int64_t inter) {
    ScratchLayout layout{};
    int64_t next = 0;
    layout.pool = next, next += align_region(capacity * hidden * 2);
    layout.act = next, next += align_region(capacity * inter * 2);
    layout.row_weights = next, next += align_region(capacity * 4);
    layout.counters = next, next += align_region(counter_ints(capacity, tokens) * 4);
    layout.bytes = next;
    next = 0;
    layout.dp_partials = next, next += align_region(capacity * ((inter + kDpTile - 1) / kDpTile) * 4);
    layout.second_pool = next, next += align_region(capacity * hidden * 2);
    layout.more_bytes = next;
    return layout;
}

}  // namespace megamoe
