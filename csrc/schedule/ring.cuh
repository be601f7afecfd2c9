// The protocol of a CTA's operand ring: how many stages, in which order they are walked, who hands what back how often.
// Pure: the CPU test (tests/csrc/walk_ring.cpp) runs the roles' programs over it in random orders.
//
// Every unit walks its operand stages (`k_blocks`) and then its output stages, the places where results wait to be
// sent. One output stage of a unit, where it is small, lies in a spare place beside the ring, so that the next unit's
// operands find one more free stage. It is sent last: nobody needs its place before the next unit's results.
#pragma once
#include "schedule/grouped.cuh"

namespace megamoe {

// Letters as in DESIGN section 1; per expert, with its `rows` rows:
enum class Gemm : int {
    kFc1,        // [rows, 2I] = x[rows, H] fc1[2I, H]^T    epilogue: h, a = p silu(g')u'
    kFc2,        // [rows, H]  = a[rows, I] fc2[H, I]^T     epilogue: y rows
    kDgrad2,     // [rows, I]  = dy[rows, H] fc2[H, I]      epilogue: dh, a again, dp partials
    kDgrad1,     // [rows, H]  = dh[rows, 2I] fc1[2I, H]    epilogue: dx rows
    kWgrad,      // [out, in] += dout[rows, out]^T in[rows, in]   epilogue: fp32 add or store
    kWgradBf16,  // [out, in]  = the same                      epilogue: rounded to bf16, written
};

MEGAMOE_HD constexpr bool is_wgrad(Gemm gemm) { return gemm == Gemm::kWgrad || gemm == Gemm::kWgradBf16; }

constexpr int kClusterSize = 2;
constexpr int kMathWarpgroups = 2;
constexpr int kWarpgroupWarps = 4;
constexpr int kMathWarps = kWarpgroupWarps * kMathWarpgroups;
constexpr int kStages = 4;
constexpr int kSpare = kStages;  // index of the spare place where stages are counted
constexpr int kUnitSlots = 2;
constexpr int kUnitReaders = kMathWarps + 2;  // warps of a CTA that read each unit: math, loader, storer

// Arrivals that complete a phase.
constexpr int kUnitFreeArrivals = kUnitReaders * kClusterSize;
constexpr int kStageFreeArrivals = kMathWarps * kClusterSize;  // both CTAs: a multicast writes into both
constexpr int kSpareFreeArrivals = kMathWarps;
constexpr int kOutputFullArrivals = kWarpgroupWarps;

// The next unit is claimed when the loader has this many steps of the present one left, or begins it. No earlier: what
// a cluster has claimed no other one can take, and units that share a weight tile, neighbours in the order of claims,
// should begin together, while it is in L2. Not much later: looking at the inputs alone takes 4,000 cycles, a step
// 1,024.
constexpr int kClaimLead = 12;
MEGAMOE_HD constexpr int claim_step(int k_blocks) { return k_blocks > kClaimLead ? k_blocks - kClaimLead : 0; }

constexpr int kChunkColumns = 64;                  // columns of I in one output stage of dgrad2
constexpr int kParts = 3;                          // 16 KB parts of a stage
constexpr int kGradColumns = 32;                   // fp32 columns of a part
constexpr int kGradParts = kTileN / kGradColumns;  // parts of a gradient tile
constexpr int kSpareParts = 2;
constexpr int kGradStages = 1 + (kGradParts - kSpareParts) / kParts;
static_assert(kSpareParts + (kGradStages - 1) * kParts == kGradParts);

// Position in a ring of kCount slots: index and the parity of the lap.
template <int kCount>
struct Cursor {
    int index = 0;
    unsigned parity = 0;
    MEGAMOE_HD constexpr void advance() {
        if (++index == kCount) {
            index = 0;
            parity ^= 1;
        }
    }
    MEGAMOE_HD constexpr void skip(int steps) {
        const int to = index + steps;
        parity ^= (to / kCount) & 1;
        index = to % kCount;
    }
};
using StageCursor = Cursor<kStages>;
using UnitCursor = Cursor<kUnitSlots>;

// Columns of a tile of the result: fc1's holds 128 gate columns and the 128 up columns that belong to them.
MEGAMOE_HD constexpr int tile_columns(Gemm gemm) { return gemm == Gemm::kFc1 ? kTileN / 2 : kTileN; }

// Chunks of dgrad2's column tile `n_tile`: fewer than four where I ends inside the tile, none behind its end.
MEGAMOE_HD constexpr int dswiglu_chunks(int n_extent, int n_tile) {
    const int left = (n_extent - n_tile * kTileN) / kChunkColumns;
    return left < 0 ? 0 : (left < kTileN / kChunkColumns ? left : kTileN / kChunkColumns);
}

// Output stages of a unit. A stage is free only when both CTAs are done with it, so both walk the same number.
MEGAMOE_HD constexpr int output_stages(Gemm gemm, int n_extent, Unit unit, int k_blocks) {
    if (is_wgrad(gemm) && k_blocks == 0) return 0;
    if (gemm == Gemm::kWgrad) return kGradStages;
    if (gemm != Gemm::kDgrad2) return 2;
    const int first = dswiglu_chunks(n_extent, n_tile_of(unit, 0));
    const int second = dswiglu_chunks(n_extent, n_tile_of(unit, 1));
    return first > second ? first : second;
}

// Whether output stage `stage`, as the epilogue fills them, lies in the spare place. Of a wgrad it is the first one:
// what the ring's stages add to is on its way meanwhile.
MEGAMOE_HD constexpr bool in_spare(Gemm gemm, int stage) {
    if (gemm == Gemm::kFc1 || gemm == Gemm::kDgrad2) return false;
    return stage == (gemm == Gemm::kWgrad ? 0 : 1);
}

// The stage that is sent in turn `turn`: those in the ring first.
MEGAMOE_HD constexpr int sent_stage(Gemm gemm, int turn, int stages) {
    return gemm == Gemm::kWgrad ? (turn + 1) % stages : turn;
}

// Of an adding wgrad, whether the TMA unit adds this stage to memory, in L2, and the math warps need no old values.
// That sends at half the rate of a store: good for what nobody waits for (measured; of all stages it would be slower).
// It rounds to nearest too, but may take a subnormal sum for zero.
MEGAMOE_HD constexpr bool added_in_l2(int grad_stage) { return in_spare(Gemm::kWgrad, grad_stage); }

// Parts of a gradient tile that lie in one of its output stages.
struct GradParts {
    int first, count;
};
MEGAMOE_HD constexpr GradParts grad_parts(int stage) {
    return stage == 0 ? GradParts{0, kSpareParts} : GradParts{kSpareParts + (stage - 1) * kParts, kParts};
}

// A place for results: a stage of the ring or the spare.
struct OutputPlace {
    int index;
    unsigned parity;
};

// Where a role stands: in the ring, and in the laps of the spare.
struct Position {
    StageCursor ring;
    unsigned spare_parity = 0;

    // The place of output stage `stage`; moves on.
    template <Gemm kGemm>
    MEGAMOE_HD constexpr OutputPlace next_output(int stage) {
        if (in_spare(kGemm, stage)) {
            const OutputPlace place{kSpare, spare_parity};
            spare_parity ^= 1;
            return place;
        }
        const OutputPlace place{ring.index, ring.parity};
        ring.advance();
        return place;
    }
};

// Whether a math warpgroup has rows and columns in its CTA's tile of a unit: compute goes by 64 rows.
MEGAMOE_HD constexpr bool has_work(Gemm gemm, Unit unit, int rank, int warpgroup, int m_rows, int n_extent) {
    return m_tile_of(unit, rank) * kTileM + warpgroup * kWarpgroupM < m_rows &&
           n_tile_of(unit, rank) * tile_columns(gemm) < n_extent;
}

}  // namespace megamoe
