// Walks csrc/schedule/grouped.cuh on the host. Reads lines "n_tiles rows reduced"; prints for each "units" and then,
// per unit, the (m_tile, n_tile) of both CTAs. reduced: of a wgrad, the rows that it sums over, or -1 for the other
// products. `constexpr` use below proves that the schedule is a compile-time function too.
#include <cstdio>

#include "schedule/grouped.cuh"

static_assert(megamoe::num_units(0, 7) == 0);
static_assert(megamoe::num_units(256, 16) == 16);
static_assert(megamoe::num_units(1, 16) == 8);
static_assert(megamoe::unit_at(300, 4, 5).n_pair);
static_assert(megamoe::wgrad_unit_at(512, 1024, 28, 14).m_tile == 2);
static_assert(megamoe::wgrad_blocks(65) == 2);

int main() {
    int n_tiles, rows, reduced;
    while (std::scanf("%d %d %d", &n_tiles, &rows, &reduced) == 3) {
        const int units = megamoe::num_units(rows, n_tiles);
        std::printf("%d", units);
        for (int i = 0; i < units; ++i) {
            const megamoe::Unit unit =
                reduced < 0 ? megamoe::unit_at(rows, n_tiles, i) : megamoe::wgrad_unit_at(rows, reduced, n_tiles, i);
            for (int rank = 0; rank < 2; ++rank) {
                std::printf(" %d %d", megamoe::m_tile_of(unit, rank), megamoe::n_tile_of(unit, rank));
            }
        }
        std::printf("\n");
    }
}
