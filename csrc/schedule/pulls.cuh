// Which rows are pulled when, and by whom. Pure, the same code on device, host and in the CPU test.
#pragma once
#include <cstdint>

#include "schedule/order.cuh"

namespace megamoe {

constexpr int kPullLeadBytes = 12 << 20;  // rows pulled ahead of those in work: soon enough, and still in L2 when read
constexpr int kPullClaimBytes = 16384;    // small claims, so that the first expert's rows are there soon

// Rows of a claim: a power of two up to 32, so that none crosses a row tile.
MEGAMOE_HD constexpr int claim_rows(int row_bytes) {
    int rows = 1;
    while (rows < 32 && 2 * rows * row_bytes <= kPullClaimBytes) rows *= 2;
    return rows;
}

// Rows that feed the first tiles of all clusters.
MEGAMOE_HD constexpr int first_rows(Gemm gemm, int n_extent, int clusters) {
    return ceil_div(clusters, ceil_div(n_extent, tile_columns(gemm))) * 2 * kTileM;
}

// Experts that rows are pulled ahead of the frontier. rows: of an expert, on average.
MEGAMOE_HD constexpr int pull_lead(int rows, int row_bytes) {
    const int64_t bytes = int64_t{rows > 0 ? rows : 1} * row_bytes;
    return static_cast<int>(1 + (kPullLeadBytes + bytes - 1) / bytes);
}

// Where the frontier must be before a mover pulls rows of `expert`.
MEGAMOE_HD constexpr int least_frontier(int expert, int lead) { return expert - lead; }

// Whether warp `warp` of the producer warpgroup of CTA `rank` moves rows: dY before x, since no unit that waits for x
// comes before the last one that waits for dY (backward_order).
MEGAMOE_HD constexpr bool is_mover(int warp, int rank) { return warp == 3 || (warp == 1 && rank == 1); }

// Row tile that movers see pushed before they sweep over the tokens.
MEGAMOE_HD constexpr int first_swept(int tiles) { return tiles * 3 / 4; }

}  // namespace megamoe
