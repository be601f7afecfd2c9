// Runs the roles of the fused kernels over csrc/schedule on the host: R ranks, each a grid of clusters of which some
// find room at first and the others when one leaves or later. Per cluster a scheduler, two loaders, four math
// warpgroups, two storers and the movers, as agents that take one step at a time in random order, some, or all of a
// kind or of a rank, very slow. What an agent waits for are the kernels' counters and words; beside these the walk
// keeps what was really done, and checks
//   - no deadlock: some agent can always go on until all clusters of all ranks have left;
//   - nothing is read that is not made: rows, tiles of fc1 and dgrad2, combine slots, the staging buffers of a peer;
//   - every share of every tile is computed once, every row pulled once, every token summed once;
//   - a pull is acknowledged once, after its last row.
// The ring inside a cluster is walk_ring.cpp's.
// usage: walk_fused SEED COUNT   cases SEED, SEED + 1, ...; prints "ok N" (steps) or "failed: what", and exits 1.
//        walk_fused order        every dependency points to earlier work, in the orders of very many shapes.
#include <algorithm>
#include <cstring>

#include "fused_movers.hpp"

using namespace walk;

namespace {

void start_cluster(World& world, int r);

struct Launcher : Agent {
    using Agent::Agent;
    bool step(bool sweep) override {
        const Case& work = world.work;
        const Part& part = work.parts[rank];
        Rank& here = world.ranks[rank];
        if (state == 0) {
            here.staged = true;
        } else if (state <= work.ranks) {
            world.ranks[state - 1].ready[rank] = 1;
        } else if (here.started < part.resident) {
            start_cluster(world, rank);
        } else if (here.started < work.clusters && !part.waits) {
            // Some day the others find room too. No agent may count on that.
            if (sweep) return false;
            if (world.random.below(500) == 0) start_cluster(world, rank);
            return false;
        } else {
            done = true;
        }
        ++state;
        return true;
    }
};

struct Scheduler : Agent {
    Scheduler(World& world, Kind kind, int rank, int cluster)
        : Agent(world, kind, rank, cluster),
          finder(world.work.products, world.work.order, world.work.parts[rank].rows.data()) {}
    bool step(bool) override {
        const Part& part = world.work.parts[rank];
        Rank& here = world.ranks[rank];
        Cluster& mine = here.clusters[cluster];
        if (state == 0) {
            if (mine.due < mine.published) return false;
            const FoundUnit found = finder.find(here.units++);
            const int product = found.segment.product, expert = found.segment.expert;
            job = {product, expert, {}};
            state = expert < 0 ? 3 : 1;
            if (expert < 0) return true;
            job.unit = unit_of_product(world.work.products[product], part.rows[expert], found.index);
            inputs = inputs_of(product, job.unit, part.rows[expert]);
            waited = 0;
        } else if (state == 1) {
            const int pull = pull_of_product(job.product);
            if (pull >= 0) here.frontier[pull] = std::max(here.frontier[pull], job.expert);
            state = 2;
        } else if (state == 2) {
            const Product& maker = world.work.products[0];
            for (; waited < inputs.tiles; ++waited) {
                const int tile = inputs.first + waited, at = part.offset[job.expert] / kRowTile + tile;
                const int shares = tile_shares(maker.gemm, maker.n_extent, part.rows[job.expert], tile);
                if (inputs.made && here.made[at] < shares) return false;
                if (inputs.pull >= 0 && here.arrived[inputs.pull][at] < kRowTile) return false;
            }
            state = 3;
        } else {
            const int slot = mine.published % kUnitSlots;
            if (mine.published >= kUnitSlots && mine.reads[slot] < kReaders) return false;
            mine.slots[slot] = job, mine.reads[slot] = 0;
            ++mine.published;
            done = job.expert < 0;
            state = 0;
        }
        return true;
    }
    UnitFinder<Product> finder;
    Job job{0, -1, {}};
    Inputs inputs{};
    int waited = 0;
};

// Reads the units that the scheduler hands out, in order.
struct Reader : Agent {
    Reader(World& world, Kind kind, int rank, int cluster, int cta)
        : Agent(world, kind, rank, cluster), mine(world.ranks[rank].clusters[cluster]), cta(cta) {}
    bool take() {
        if (mine.published <= units) return false;
        const int slot = units++ % kUnitSlots;
        job = mine.slots[slot];
        ++mine.reads[slot];
        return true;
    }
    Cluster& mine;
    int cta;
    int units = 0;  // read so far
    Job job{0, -1, {}};
};

struct Loader : Reader {
    using Reader::Reader;
    bool step(bool) override {
        if (state == 1) return come_near_the_end();
        if (!take()) return false;
        done = job.expert < 0;
        if (!done) check_inputs();
        mine.loaded[cta] = units;
        state = !done && cta == 0;
        short_unit = world.random.chance(50);
        return true;
    }
    // Of a short unit at once; beyond the ring's few stages a loader comes only when all products of the unit before
    // are done.
    bool come_near_the_end() {
        for (const auto& of_cta : mine.computed) {
            for (int computed : of_cta) {
                if (!short_unit && computed < units - 1) return false;
            }
        }
        mine.due = units;
        state = 0;
        return true;
    }
    // With numbers of its own: what the product of this tile reads.
    void check_inputs() const {
        const Part& part = world.work.parts[rank];
        const Rank& here = world.ranks[rank];
        const bool wgrad = is_wgrad(world.work.products[job.product].gemm);
        const int begin = part.offset[job.expert] / 128, rows = part.rows[job.expert];
        for (int tile = 0; tile * 128 < rows; ++tile) {
            if (!wgrad && tile != m_tile_of(job.unit, cta)) continue;
            const int pull = job.product == kProductWgrad1 ? 1 : 0;
            if (here.rows_here[pull][begin + tile] != 128) fail("a row is read that is not there", rank, begin + tile);
            if (job.product > 0 && here.shares[0][begin + tile] != world.all_shares(part, 0, job.expert, tile)) {
                fail("a tile is read that is not made", rank, begin + tile);
            }
        }
    }
    bool short_unit = false;
};

struct Math : Reader {
    Math(World& world, Kind kind, int rank, int cluster, int cta, int warpgroup)
        : Reader(world, kind, rank, cluster, cta), warpgroup(warpgroup) {}
    bool step(bool sweep) override {
        bool finished = false;
        if (state == 0) {
            if (!puller.step(world, rank, finished)) return false;
            state = finished ? 1 : 0;
        } else if (state == 1) {
            if (!take()) return false;
            state = job.expert < 0 ? 3 : 2;
        } else if (state == 2) {
            if (mine.loaded[0] < units || mine.loaded[1] < units) return false;
            mine.computed[cta][warpgroup] = units;
            state = 1;
        } else {
            if (!summer.step(world, rank, sweep, done)) return false;
        }
        return true;
    }
    int warpgroup;
    Puller puller;
    Summer summer{false};
};

struct Storer : Reader {
    using Reader::Reader;
    bool step(bool) override {
        const Case& work = world.work;
        const Part& part = work.parts[rank];
        const Product& product = work.products[job.product];
        const bool scatters = product.gemm == Gemm::kFc2 || product.gemm == Gemm::kDgrad1;
        Rank& here = world.ranks[rank];
        if (state == 0) {
            if (!take()) return false;
            done = job.expert < 0;
            state = 1;
        } else if (state == 1) {
            if (scatters && !all_ready(world, rank)) return false;
            state = 2;
        } else if (state == 2) {
            if (mine.computed[cta][0] < units || mine.computed[cta][1] < units) return false;
            store(here, part, product, scatters);
            const bool counts = working > 0 && !is_wgrad(product.gemm);
            state = counts ? 3 : 0;
        } else if (state == 3) {
            int& counter = (scatters ? here.pushed : here.made)[tile];
            counter += working;
            const int all =
                tile_shares(product.gemm, product.n_extent, part.rows[job.expert], m_tile_of(job.unit, cta));
            state = scatters && counter == all ? 4 : 0;
        } else {
            world.ranks[state - 4].flags[rank][tile] = 1;
            state = state - 3 < work.ranks ? state + 1 : 0;
        }
        return true;
    }
    void store(Rank& here, const Part& part, const Product& product, bool scatters) {
        const bool wgrad = is_wgrad(product.gemm);
        const int rows = wgrad ? product.m_extent : part.rows[job.expert];
        tile = part.offset[job.expert] / kRowTile + m_tile_of(job.unit, cta);
        working = 0;
        for (int w = 0; w < kMathWarpgroups; ++w) {
            if (!has_work(product.gemm, job.unit, cta, w, rows, product.n_extent)) continue;
            ++working;
            if (here.done[job.product][world.share_index(part, job, cta, w)]++)
                fail("a share is done twice", rank, tile);
        }
        if (!wgrad) here.shares[scatters][tile] += working;
    }
    int tile = 0, working = 0;
};

struct Mover : Agent {
    using Agent::Agent;
    bool step(bool sweep) override {
        const int pulls = world.work.num_pulls, tiles = world.tiles_of(world.work.parts[rank]);
        bool finished = false;
        if (state < pulls) {
            if (summer.summing()) return summer.step(world, rank, sweep, finished);
            if (stager.busy()) return stager.step(world, rank);
            if (state == 1 && stager.step(world, rank)) return true;
            puller.which = state, puller.throttled = true;
            if (!puller.step(world, rank, finished)) return meanwhile(sweep, tiles);
            if (finished) puller = {}, ++state;
            if (state == pulls) summer.state = 0;
        } else if (state == pulls) {
            if (tiles > 0 && world.ranks[rank].pushed[first_swept(tiles)] < 1) return false;
            ++state;
        } else {
            if (!summer.step(world, rank, sweep, done)) return false;
        }
        return true;
    }
    // As MoverStaging::step(), then MoverSums::meanwhile().
    bool meanwhile(bool sweep, int tiles) {
        if (world.work.backward && puller.state == 1 && stager.step(world, rank)) return true;
        const bool begun = tiles > 0 && world.ranks[rank].pushed[first_swept(tiles)] > 0;
        if (!world.work.backward || puller.state != 1 || world.work.parts[rank].tokens == 0 || !begun) return false;
        bool finished = false;
        summer.state = 1;
        return summer.step(world, rank, sweep, finished) && !finished;
    }
    Puller puller;
    Stager stager;
    Summer summer{true};
};

// The agents of the next cluster of a rank.
void start_cluster(World& world, int r) {
    const int c = world.ranks[r].started++;
    world.add<Scheduler>(kScheduler, r, c);
    for (int cta = 0; cta < kClusterSize; ++cta) {
        world.add<Loader>(kLoader, r, c, cta);
        world.add<Storer>(kStorer, r, c, cta);
        for (int w = 0; w < kMathWarpgroups; ++w) world.add<Math>(kMath, r, c, cta, w);
        for (int warp = 0; warp < kWarpgroupWarps; ++warp) {
            if (is_mover(warp, cta)) world.add<Mover>(kMover, r, c);
        }
    }
}

// An agent has nothing more to do; when all of its cluster have not, the next cluster finds room.
void leave(World& world, size_t which) {
    const int r = world.agents[which]->rank, c = world.agents[which]->cluster;
    std::swap(world.agents[which], world.agents.back());
    world.agents.pop_back();
    if (c < 0 || --world.ranks[r].clusters[c].agents > 0) return;
    ++world.ranks[r].left;
    if (world.ranks[r].started < world.work.clusters) start_cluster(world, r);
}

// Steps until everybody has left.
long run(World& world) {
    auto& agents = world.agents;
    for (int r = 0; r < world.work.ranks; ++r) world.add<Launcher>(kLauncher, r, -1);
    long steps = 0;
    for (size_t idle = 0; !agents.empty();) {
        size_t pick = world.random.below(static_cast<int>(agents.size()));
        bool moved = world.random.next() <= agents[pick]->pace && agents[pick]->step(false);
        if (!moved && ++idle <= 2 * agents.size()) continue;
        // Whoever can: slow ones too.
        for (size_t i = 0; i < agents.size() && !moved; ++i) {
            pick = pick + 1 < agents.size() ? pick + 1 : 0;
            moved = agents[pick]->step(true);
        }
        if (!moved) fail("deadlock: agents left, units claimed", static_cast<int>(agents.size()), world.ranks[0].units);
        if (agents[pick]->done) leave(world, pick);
        ++steps, idle = 0;
    }
    return steps;
}

// Each product of each expert stands in the order once, behind all products of the expert that it may need.
void check_order(const Order& order) {
    std::vector<int> at(order.products * order.experts, -1);
    for (int i = 0; i < num_segments(order); ++i) {
        const Segment segment = segment_at(order, i);
        if (segment.expert < 0) continue;
        int& place = at[segment.product * order.experts + segment.expert];
        if (place >= 0) fail("a product stands in the order twice", segment.product, segment.expert);
        place = i;
    }
    for (int p = 0; p < order.products; ++p) {
        for (int e = 0; e < order.experts; ++e) {
            if (at[p * order.experts + e] < 0) fail("a product is missing in the order", p, e);
            if (p > 0 && at[p * order.experts + e] < at[(p - 1) * order.experts + e])
                fail("later work is needed", p, e);
        }
    }
}

long check_orders() {
    long count = 0;
    for (int hidden = 256; hidden <= 65536; hidden += 256) {
        // claims that cross a row tile would count for one alone
        if (const int rows = claim_rows(2 * hidden); rows < 1 || rows > 32 || kRowTile % rows)
            fail("rows of a claim", rows);
    }
    for (int experts : {1, 2, 3, 7, 32, 48, 64, 512}) {
        for (int rows : {0, 1, 129, 1000, 20000}) {
            for (int inter : {128, 640, 2048, 3072}) {
                for (int clusters : {1, 2, 3, 7, 66, 72}) {
                    check_order(forward_order(experts));
                    check_order(backward_order(experts, rows, inter, clusters));
                    count += 2;
                }
            }
        }
    }
    return count;
}

}  // namespace

int main(int argc, char** argv) {
    long steps = 0;
    if (argc == 2 && !std::strcmp(argv[1], "order")) {
        std::printf("ok %ld\n", check_orders());
        return 0;
    }
    if (argc != 3) return 2;
    for (int i = 0; i < std::atoi(argv[2]); ++i) {
        seed_now = std::atoi(argv[1]) + i;
        Random random{static_cast<uint64_t>(seed_now)};
        World world(random);
        steps += run(world);
        world.check_end();
    }
    std::printf("ok %ld\n", steps);
}
