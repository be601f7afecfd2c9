// The byte layout of a rank's symmetric workspace: the single truth for host, device and, compared by a test,
// megamoe_train/workspace.py. Plain C++, so that a CPU test can compile it.
//
// Letters: T most tokens of a rank, K top-k, E experts in all, R ranks, H hidden.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define MEGAMOE_BOTH __host__ __device__
#else
#define MEGAMOE_BOTH
#endif

namespace megamoe {

constexpr int64_t kRegionAlignment = 1024;  // of every region; bulk copies need 16
constexpr int kStagingBuffers = 2;          // primary, secondary
constexpr int kWordBytes = 8;               // a signal word: epoch in the upper half, what it is about in the lower
// A rank may announce two operations before a peer has read the first word (dispatch into one staging buffer, dispatch
// into the other, combine, after which it waits for everybody's push): the words lie in a ring by epoch.
constexpr int kReadySlots = 4;
constexpr int kMaxRanks = 64;
constexpr int kMaxPlanExperts = 1024;

// What a rank tells the others behind its E counts.
enum CountsHeader : int {
    kHeaderBadSlot = 0,
    kHeaderBadId = 1,
    kHeaderTokens = 2,
    kHeaderCapacity = 3,
    kHeaderInts = 8
};

// Words of the `state` region. Only the owning rank touches them.
enum StateWord : int {
    kStatePlanEpoch = 0,
    kStateOpEpoch = 1,
    kStateStagedEpoch = 2,  // one a staging buffer
    // Of the plan in progress, as ints; zero between plans.
    kStateCountTicket = 2 + kStagingBuffers,
    kStatePlaceTicket,
    kStateBadSlots,
    kStateWords
};

struct WorkspaceShape {
    int64_t ranks;
    int64_t experts;
    int64_t top_k;
    int64_t hidden;
    int64_t tokens;
};

// Offsets in bytes from the base of the workspace. Written by: whose kernels store there.
struct WorkspaceLayout {
    // region                shape                      written by        may be rewritten after
    int64_t state;        // u64 [kStateWords]          owner             -
    int64_t abort;        // u64 [1]                    any rank          never: the process is finished
    int64_t counted;      // u64 [R]                    peer r            monotone
    int64_t listed;       // u64 [R]                    peer r            monotone
    int64_t ready;        // u64 [4, R]                 peer r            four operations later
    int64_t pulled;       // u64 [2, R]                 peer r            monotone
    int64_t pushed;       // u64 [R]                    peer r            monotone
    int64_t staged;       // u64 [R]                    peer r            monotone
    int64_t counts;       // i32 [2, R, E + header]     peer r            counted of the epoch after next
    int64_t row_sources;  // i32 [2, T*K]               owner             counted of the epoch after next, all peers
    int64_t weights;      // f32 [2, T*K]               owner             pulled[buffer] from all peers
    int64_t dweights;     // f32 [T*K]                  peers             the owner's next ready
    int64_t staging;      // bf16 [2, T, H]             owner             pulled[buffer] from all peers, launch over
    int64_t slots;        // bf16 [K, T, H]             peers             the owner's next ready
    int64_t tile_flags;   // u32 [R, tiles]            peer r            monotone
    int64_t bytes;        // in all

    WorkspaceShape shape;
};

MEGAMOE_BOTH constexpr int64_t align_region(int64_t bytes) {
    return (bytes + kRegionAlignment - 1) / kRegionAlignment * kRegionAlignment;
}

// Ints of one rank's row of `counts`.
MEGAMOE_BOTH constexpr int64_t counts_stride(int64_t experts) { return (experts + kHeaderInts + 31) / 32 * 32; }

// Row tiles of 128 that a rank can have at most: all slots of all ranks at its experts, each expert padded.
MEGAMOE_BOTH constexpr int64_t flag_tiles(const WorkspaceShape& shape) {
    return (shape.ranks * shape.tokens * shape.top_k + 127) / 128 + shape.experts / shape.ranks;
}

MEGAMOE_BOTH constexpr WorkspaceLayout workspace_layout(const WorkspaceShape& shape) {
    const int64_t flat = shape.tokens * shape.top_k;
    const int64_t row = shape.hidden * 2;
    WorkspaceLayout layout{};
    layout.shape = shape;
    int64_t next = 0;
    layout.state = next, next += align_region(kStateWords * kWordBytes);
    layout.abort = next, next += align_region(kWordBytes);
    layout.counted = next, next += align_region(shape.ranks * kWordBytes);
    layout.listed = next, next += align_region(shape.ranks * kWordBytes);
    layout.ready = next, next += align_region(kReadySlots * shape.ranks * kWordBytes);
    layout.pulled = next, next += align_region(kStagingBuffers * shape.ranks * kWordBytes);
    layout.pushed = next, next += align_region(shape.ranks * kWordBytes);
    layout.staged = next, next += align_region(shape.ranks * kWordBytes);
    layout.counts = next, next += align_region(2 * shape.ranks * counts_stride(shape.experts) * 4);
    layout.row_sources = next, next += align_region(2 * flat * 4);
    layout.weights = next, next += align_region(kStagingBuffers * flat * 4);
    layout.dweights = next, next += align_region(flat * 4);
    layout.staging = next, next += align_region(kStagingBuffers * shape.tokens * row);
    layout.slots = next, next += align_region(shape.top_k * shape.tokens * row);
    layout.tile_flags = next, next += align_region(shape.ranks * flag_tiles(shape) * 4);
    layout.bytes = next;
    return layout;
}

}  // namespace megamoe
