// Which tile next: the order of work of a grouped GEMM, the same code on device, host and in the CPU test.
//
// A *unit* is what one cluster of two CTAs does at a time: two neighbouring 128x256 output tiles.
//   M pair: the CTAs take rows [256i, 256i+128) and [256i+128, 256i+256) and share the B operand.
//   N pair: the CTAs take two neighbouring column tiles of the same 128 rows and share the A operand. Only an expert's
//           last 1..128 rows are done so; its rows are then computed at 64-row granularity.
#pragma once

#ifdef __CUDACC__
#define MEGAMOE_HD __host__ __device__ __forceinline__
#else
#define MEGAMOE_HD
#endif

namespace megamoe {

constexpr int kTileM = 128;
constexpr int kTileN = 256;
constexpr int kBlockK = 64;
constexpr int kSliceK = 16;  // of one matrix instruction
constexpr int kWarpgroupM = 64;
constexpr int kRowTile = 128;          // every expert's segment of a row pool starts at a multiple of this
constexpr int kRasterPairs = 8;        // M pairs that share a column tile before the next column tile starts
constexpr int kColumnBytes = 8 << 20;  // of a wgrad's right operand that a group of its columns holds, about
constexpr int kLeastColumns = 8;       // column tiles of such a group
constexpr int kMaxExperts = 512;       // local experts of one launch

struct Unit {
    int m_tile;   // first 128-row tile of the unit
    int n_tile;   // first 256-column tile of the unit
    bool n_pair;  // the CTAs sit side by side along N (else along M)
};

MEGAMOE_HD constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Rows of an expert that are done as M pairs, in pairs.
MEGAMOE_HD constexpr int num_pairs(int rows) { return rows / (2 * kTileM) + (rows % (2 * kTileM) > kTileM ? 1 : 0); }

MEGAMOE_HD constexpr bool has_tail(int rows) { return rows % (2 * kTileM) > 0 && rows % (2 * kTileM) <= kTileM; }

MEGAMOE_HD constexpr int num_units(int rows, int n_tiles) {
    return num_pairs(rows) * n_tiles + (has_tail(rows) ? ceil_div(n_tiles, 2) : 0);
}

// The index-th unit of an expert with `rows` rows. M pairs run fastest inside a group of kRasterPairs, so that a group
// re-uses each weight tile while it is in L2; so does the tail, whose units follow the last group's of the same
// columns.
MEGAMOE_HD constexpr Unit unit_at(int rows, int n_tiles, int index) {
    const int pairs = num_pairs(rows);
    const int last = pairs > 0 ? (pairs - 1) / kRasterPairs * kRasterPairs : 0;  // first pair of the last group
    const int begun = index / (kRasterPairs * n_tiles) * kRasterPairs;
    const int first = begun < last ? begun : last;
    const int inside = index - first * n_tiles;
    const int width = first < last ? kRasterPairs : pairs - last;
    const int units = 2 * width + (first == last && has_tail(rows) ? 1 : 0);  // of two column tiles, the tail's last
    const int column = inside / units * 2, at = inside % units;
    const int of_pairs = n_tiles - column < 2 ? width : 2 * width;
    if (at >= of_pairs) return {2 * pairs, column, true};
    return {2 * (first + at % width), column + at / width, false};
}

// Columns that the units of a wgrad over `rows` rows go along before they come back for the next rows of the gradient:
// an even number, of groups of about one width. Their part of the right operand stays in L2.
MEGAMOE_HD constexpr int wgrad_columns(int rows, int n_tiles) {
    const int fitting = kColumnBytes / (kTileN * 2) / (rows > 0 ? rows : 1);
    const int most = fitting > kLeastColumns ? fitting : kLeastColumns;
    return ceil_div(ceil_div(n_tiles, ceil_div(n_tiles, most)), 2) * 2;
}

// The index-th unit of a wgrad over `rows` rows; `m_extent`: rows of the gradient. Columns run fastest inside a group,
// so that memory gets whole rows of the gradient; pairs run down in one group and up in the next, the tail last.
MEGAMOE_HD constexpr Unit wgrad_unit_at(int m_extent, int rows, int n_tiles, int index) {
    const int pairs = num_pairs(m_extent), columns = wgrad_columns(rows, n_tiles);
    const int group = index / num_units(m_extent, columns), first = group * columns;
    const int width = n_tiles - first < columns ? n_tiles - first : columns;
    const int inside = index - group * num_units(m_extent, columns), tail = inside - pairs * width;
    if (tail >= 0) return {2 * pairs, first + 2 * tail, true};
    const int down = inside / width;
    return {2 * (group % 2 == 0 ? down : pairs - 1 - down), first + inside % width, false};
}

// The tile of CTA `rank` (0 or 1) of a unit.
MEGAMOE_HD constexpr int m_tile_of(Unit unit, int rank) { return unit.n_pair ? unit.m_tile : unit.m_tile + rank; }
MEGAMOE_HD constexpr int n_tile_of(Unit unit, int rank) { return unit.n_pair ? unit.n_tile + rank : unit.n_tile; }

// Math warpgroups with rows in row tile `m_tile` of an expert.
MEGAMOE_HD constexpr int warpgroups_of(int rows, int m_tile) { return rows - m_tile * kTileM > kWarpgroupM ? 2 : 1; }

// Steps of the reduction loop of a wgrad over an expert's rows. Slices of the last one behind them are not multiplied.
MEGAMOE_HD constexpr int wgrad_blocks(int rows) { return ceil_div(rows, kBlockK); }

}  // namespace megamoe
