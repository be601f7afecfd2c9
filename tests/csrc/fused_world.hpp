// The state that walk_fused.cpp's agents share: each rank's counters, words and flags as the kernels have them, and
// what was really done there.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "fused_case.hpp"

namespace walk {

inline int seed_now = -1;

[[noreturn]] inline void fail(const char* what, int a = 0, int b = 0) {
    std::printf("failed: %s (%d, %d), seed %d\n", what, a, b, seed_now);
    std::exit(1);
}

constexpr int kReaders = 2 + 4 + 2;  // of a unit: loaders, math warpgroups, storers

struct Job {
    int product;
    int expert;  // -1: no more work
    Unit unit;
};

struct Cluster {
    Job slots[kUnitSlots];
    int reads[kUnitSlots] = {};
    int published = 0;
    int due = 0;  // units of which the first loader has so little left that the next one may be claimed
    int loaded[kClusterSize] = {};
    int computed[kClusterSize][kMathWarpgroups] = {};
    int agents = 0;  // that have not left
};

// One rank's counters, words and flags, and what was really done there.
struct Rank {
    // as in the kernels
    int units = 0, pulls[2] = {}, pulled[2] = {}, turns[2] = {}, frontier[2] = {}, stagings = 0, staged_tokens = 0;
    std::vector<int> arrived[2], made, pushed;
    std::vector<char> taken, ready, staged_word;  // staged_word: [R]
    std::vector<std::vector<char>> flags;         // [owner][tile]
    // truth
    bool staged = false;                   // of the first pull
    std::vector<char> late_copied;         // [T] of the second
    std::vector<char> copied[2];           // [M / claim_rows]
    std::vector<int> rows_here[2];         // [tiles]
    std::vector<int> shares[2];            // [tiles] of fc1 or dgrad2, of fc2 or dgrad1
    std::vector<char> done[kMaxProducts];  // a share each
    std::vector<int> sums;                 // [T]
    std::vector<int> acked[2];             // [R] by whom
    std::vector<Cluster> clusters;
    int started = 0, left = 0;
};

struct World;

enum Kind { kLauncher, kScheduler, kLoader, kMath, kStorer, kMover, kKinds };

struct Agent {
    Agent(World& world, Kind kind, int rank, int cluster) : world(world), kind(kind), rank(rank), cluster(cluster) {}
    virtual ~Agent() = default;
    // One step if it can; `sweep`: look at everything before saying no.
    virtual bool step(bool sweep) = 0;
    World& world;
    Kind kind;
    int rank, cluster;
    int state = 0;
    uint32_t pace = ~0u;
    bool done = false;
};

struct World {
    Case work;
    Random random;
    std::vector<Rank> ranks;
    std::vector<std::unique_ptr<Agent>> agents;
    uint32_t kind_pace[kKinds], rank_pace[4];
    int few_slow;

    World(Random& seed) : work(random_case(seed)), random{seed.next()}, ranks(work.ranks) {
        for (uint32_t& pace : kind_pace) pace = random.chance(15) ? ~0u / 50 : ~0u;
        for (uint32_t& pace : rank_pace) pace = random.chance(15) ? ~0u / 20 : ~0u;
        few_slow = random.one_of({0, 3, 25});
        for (int r = 0; r < work.ranks; ++r) init(ranks[r], work.parts[r]);
    }

    int tiles_of(const Part& part) const { return part.offset.back() / kRowTile; }

    // Shares of a row tile, counted anew: columns times groups of 64 rows.
    int all_shares(const Part& part, int product, int expert, int m_tile) const {
        const Product& p = work.products[product];
        const int columns = p.gemm == Gemm::kFc1 ? 128 : 256;
        const int rows = std::min(128, part.rows[expert] - 128 * m_tile);
        return (p.n_extent + columns - 1) / columns * ((rows + 63) / 64);
    }

    // Where a share is recorded: rows of 64 of the pool, or of an expert's gradient, times column tiles.
    size_t share_index(const Part& part, const Job& job, int cta, int warpgroup) const {
        const Product& p = work.products[job.product];
        const bool wgrad = is_wgrad(p.gemm);
        const int row = (wgrad ? job.expert * p.m_extent : part.offset[job.expert]) + m_tile_of(job.unit, cta) * kTileM;
        const int columns = ceil_div(p.n_extent, tile_columns(p.gemm));
        return size_t(row / kWarpgroupM + warpgroup) * columns + n_tile_of(job.unit, cta);
    }

    void init(Rank& rank, const Part& part) {
        const int tiles = tiles_of(part);
        for (int i = 0; i < 2; ++i) {
            rank.arrived[i].assign(tiles, 0), rank.rows_here[i].assign(tiles, 0), rank.shares[i].assign(tiles, 0);
            rank.copied[i].assign(part.offset.back() / work.claim_rows, 0);
            rank.acked[i].assign(work.ranks, 0);
        }
        rank.made.assign(tiles, 0), rank.pushed.assign(tiles, 0);
        rank.taken.assign(part.tokens, 0), rank.sums.assign(part.tokens, 0);
        rank.ready.assign(work.ranks, 0), rank.staged_word.assign(work.ranks, 0);
        rank.late_copied.assign(part.tokens, 0);
        for (const Part& owner : work.parts) rank.flags.emplace_back(tiles_of(owner), 0);
        for (int p = 0; p < work.order.products; ++p) {
            const Product& product = work.products[p];
            const int rows = is_wgrad(product.gemm) ? work.local * product.m_extent : part.offset.back();
            rank.done[p].assign(size_t(rows / 64) * ceil_div(product.n_extent, tile_columns(product.gemm)), 0);
        }
        rank.clusters.resize(work.clusters);
    }

    template <class Role, class... Args>
    void add(Kind kind, int rank, int cluster, Args... args) {
        agents.push_back(std::make_unique<Role>(*this, kind, rank, cluster, args...));
        const bool slow = random.below(100) < few_slow;
        agents.back()->pace = std::min({kind_pace[kind], rank_pace[rank], slow ? ~0u / 200 : ~0u});
        if (cluster >= 0) ++ranks[rank].clusters[cluster].agents;
    }

    void check_end() const;
};

inline void World::check_end() const {
    for (int r = 0; r < work.ranks; ++r) {
        const Rank& rank = ranks[r];
        const Part& part = work.parts[r];
        if (rank.left != work.clusters) fail("a cluster has not left", r, rank.left);
        for (int t = 0; t < part.tokens; ++t) {
            if (rank.sums[t] != 1) fail("a token is not summed once", r, t);
        }
        for (char copied : rank.late_copied) {
            if (copied != (work.ranks > 1 && work.num_pulls > 1)) fail("a token is not staged once", r);
        }
        for (int i = 0; i < 2; ++i) {
            for (int acked : rank.acked[i]) {
                if (acked != (work.ranks > 1 && i < work.num_pulls)) fail("acknowledgements of a pull", r, acked);
            }
            for (char copied : rank.copied[i]) {
                if (copied != (i < work.num_pulls)) fail("a row is not pulled once", r, i);
            }
        }
        for (int p = 0; p < work.order.products; ++p) {
            const Product& product = work.products[p];
            const bool wgrad = is_wgrad(product.gemm);
            const int columns = ceil_div(product.n_extent, tile_columns(product.gemm));
            for (int e = 0; e < work.local; ++e) {
                const bool skipped = !product.wanted || (wgrad && part.rows[e] == 0 && product.accumulate);
                const int begin = wgrad ? e * product.m_extent : part.offset[e];
                const int end = wgrad ? begin + product.m_extent : part.offset[e + 1];
                const int rows = begin + (wgrad ? product.m_extent : part.rows[e]);
                for (int row = begin; row < end; row += 64) {
                    for (int n = 0; n < columns; ++n) {
                        const int done = rank.done[p][size_t(row / 64) * columns + n];
                        if (done != (row < rows && !skipped)) fail("a share is not done once", p, e);
                    }
                }
            }
        }
    }
}

}  // namespace walk
