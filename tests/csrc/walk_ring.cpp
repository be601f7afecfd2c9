// Runs the roles' programs over csrc/schedule/ring.cuh on the host, units of all products mixed as in a fused launch:
// two CTAs, each with a loader, eight math warps and a storer, and the cluster's scheduler, as agents that wait for and
// arrive at modelled mbarriers. The order in which runnable agents and TMA transfers go on is random, with some agents
// made very slow. Checks, at every step:
//   - no deadlock: some agent can always go on until all are done;
//   - no wait passes on a phase other than the one meant (parity tells only odd from even);
//   - a stage is written only when everybody has handed back what it held, and read only with what was meant in it.
// usage: walk_ring SEED UNITS; prints "ok N" (steps) or "failed: what", and exits 1.
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "schedule/ring.cuh"

using namespace megamoe;

namespace {

[[noreturn]] void fail(const std::string& what) {
    std::printf("failed: %s\n", what.c_str());
    std::exit(1);
}

struct Barrier {
    int expected = 0, pending = 0, bytes = 0, phase = 0;
    void init(int count) { expected = pending = count; }
    void settle() {
        if (pending < 0) fail("more arrivals than a phase takes");
        if (pending == 0 && bytes == 0) {
            ++phase;
            pending = expected;
        }
    }
    void arrive(int count) {
        pending -= count;
        settle();
    }
    void expect(int more) {
        bytes += more;
        arrive(1);
    }
    void complete(int done) {
        bytes -= done;
        settle();
    }
    // As the hardware tells it: the phase with this parity is over.
    bool passed(unsigned parity) const { return (phase & 1u) != parity; }
};

// What lies in a stage: the walk number of its contents, and how many warps have yet to hand it back.
struct Memory {
    long content = -1;
    int readers = 0;
};

struct Cta {
    Barrier stage_full[kStages + 1], stage_free[kStages + 1], output_full[kMathWarpgroups][kStages + 1];
    Barrier unit_full[kUnitSlots], unit_free[kUnitSlots], claim_due;
    Memory memory[kStages + 1];
    int slot[kUnitSlots];
};

struct Task {
    Gemm gemm;
    int n_extent;
    Unit unit;
    int k_blocks;
    bool in_step;  // the storer hands a stage back before it sends the next
    bool works[kClusterSize][kMathWarpgroups];
    int chunks[kClusterSize];  // output stages that each CTA itself computes
};

struct Step {
    const Barrier* barrier;  // null: nothing to wait for
    unsigned parity;
    int phase;  // the phase meant
    std::function<void()> action;
};

struct Agent {
    std::deque<Step> steps;
    double slowness = 1;
};

struct Case {
    std::vector<Task> tasks;
};

OutputPlace next_output(Position& position, Gemm gemm, int stage) {
    switch (gemm) {
        case Gemm::kFc1: return position.next_output<Gemm::kFc1>(stage);
        case Gemm::kFc2: return position.next_output<Gemm::kFc2>(stage);
        case Gemm::kDgrad2: return position.next_output<Gemm::kDgrad2>(stage);
        case Gemm::kDgrad1: return position.next_output<Gemm::kDgrad1>(stage);
        case Gemm::kWgrad: return position.next_output<Gemm::kWgrad>(stage);
        case Gemm::kWgradBf16: return position.next_output<Gemm::kWgradBf16>(stage);
    }
    fail("no such product");
}

class Cluster {
public:
    Cluster(const Case& work, std::mt19937& random) : work_(work), random_(random) {
        for (Cta& cta : ctas_) {
            for (int i = 0; i <= kStages; ++i) {
                cta.stage_full[i].init(1);
                cta.stage_free[i].init(i == kSpare ? kSpareFreeArrivals : kStageFreeArrivals);
                for (auto& full : cta.output_full) full[i].init(kOutputFullArrivals);
            }
            for (int i = 0; i < kUnitSlots; ++i) {
                cta.unit_full[i].init(1);
                cta.unit_free[i].init(kUnitFreeArrivals);
            }
            cta.claim_due.init(1);
        }
        build();
    }

    long run() {
        for (Agent& agent : agents_) agent.slowness = random_() % 4 == 0 ? 0.02 : 1;
        for (long count = 0;; ++count) {
            std::vector<Agent*> ready;
            bool done = true;
            for (Agent& agent : agents_) {
                if (agent.steps.empty()) continue;
                done = false;
                const Step& step = agent.steps.front();
                if (step.barrier == nullptr || step.barrier->passed(step.parity)) ready.push_back(&agent);
            }
            if (done && transfers_.empty()) return count;
            const size_t choices = ready.size() + transfers_.size();
            if (choices == 0) fail("deadlock");
            const size_t pick = random_() % choices;
            if (pick >= ready.size()) {
                const auto at = transfers_.begin() + static_cast<long>(pick - ready.size());
                const auto transfer = *at;
                transfers_.erase(at);
                transfer();
                continue;
            }
            Agent& agent = *ready[pick];
            if (ready.size() > 1 && std::generate_canonical<double, 16>(random_) > agent.slowness) continue;
            const Step step = agent.steps.front();
            agent.steps.pop_front();
            if (step.barrier != nullptr && step.barrier->phase != step.phase + 1)
                fail("a wait passed on another phase");
            if (step.action) step.action();
        }
    }

private:
    // Phases are counted per barrier and program, so that each wait knows which one it means.
    void wait(Agent& agent, const Barrier& barrier, unsigned parity, int phase, std::function<void()> then) {
        agent.steps.push_back({&barrier, parity, phase, std::move(then)});
    }
    void act(Agent& agent, std::function<void()> action) { agent.steps.push_back({nullptr, 0, 0, std::move(action)}); }

    // Reading the next unit, as every role does.
    void take_unit(Agent& agent, int cta, UnitCursor& cursor, int number) {
        const int index = cursor.index;
        Cta& here = ctas_[cta];
        wait(agent, here.unit_full[index], cursor.parity, number / kUnitSlots, [this, &here, index, number] {
            if (here.slot[index] != number) fail("a unit slot holds another unit");
            ctas_[0].unit_free[index].arrive(1);
        });
        cursor.advance();
    }

    void build_scheduler() {
        Agent& agent = agents_.emplace_back();
        UnitCursor cursor;
        for (int number = 0; number <= static_cast<int>(work_.tasks.size()); ++number) {
            const int index = cursor.index, lap = number / kUnitSlots;
            auto publish = [this, index, number] {
                for (Cta& cta : ctas_) {
                    cta.unit_full[index].expect(32);
                    transfers_.push_back([&cta, index, number] {
                        cta.slot[index] = number;
                        cta.unit_full[index].complete(32);
                    });
                }
            };
            if (number > 0) wait(agent, ctas_[0].claim_due, (number - 1) & 1, number - 1, {});
            // The first lap waits for the phase before the first, which counts as complete.
            if (lap == 0) {
                act(agent, publish);
            } else {
                wait(agent, ctas_[0].unit_free[index], cursor.parity ^ 1, lap - 1, publish);
            }
            cursor.advance();
        }
    }

    // A place of one CTA is free for the `lap`-th use: nobody reads it any more.
    void when_free(Agent& agent, int cta, int index, unsigned parity, int lap, std::function<void()> then) {
        if (lap == 0) {
            act(agent, std::move(then));
        } else {
            wait(agent, ctas_[cta].stage_free[index], parity ^ 1, lap - 1, std::move(then));
        }
    }

    // A transfer lands; the first of a stage's contents finds it handed back by all math warps (or for them).
    void fill(int cta, int index, long content) {
        Memory& memory = ctas_[cta].memory[index];
        if (memory.content == content) return;
        if (memory.readers != 0) fail("a stage was overwritten while it was read");
        memory = {content, kMathWarps};
    }

    void build_loader(int cta) {
        Agent& agent = agents_.emplace_back();
        Position position;
        UnitCursor cursor;
        long walk = 0, spare_uses = 0;
        for (size_t number = 0; number < work_.tasks.size(); ++number) {
            const Task& task = work_.tasks[number];
            take_unit(agent, cta, cursor, static_cast<int>(number));
            const int claim_at = cta == 0 ? claim_step(task.k_blocks) : -1;
            const auto announce = [this] { ctas_[0].claim_due.arrive(1); };
            if (claim_at == 0) act(agent, announce);
            for (int k = 0; k < task.k_blocks; ++k, ++walk) {
                const int index = position.ring.index;
                when_free(agent, cta, index, position.ring.parity, static_cast<int>(walk / kStages),
                          [this, cta, index, walk] {
                              ctas_[cta].stage_full[index].expect(48);
                              transfers_.push_back([this, cta, index, walk] {  // its own operand
                                  fill(cta, index, walk);
                                  ctas_[cta].stage_full[index].complete(32);
                              });
                              for (int to = 0; to < kClusterSize; ++to) {  // half of the shared one, multicast
                                  transfers_.push_back([this, to, index, walk] {
                                      fill(to, index, walk);
                                      ctas_[to].stage_full[index].complete(8);
                                  });
                              }
                          });
                position.ring.advance();
                if (k + 1 == claim_at) act(agent, announce);
            }
            const int outputs = output_stages(task.gemm, task.n_extent, task.unit, task.k_blocks);
            for (int stage = 0; stage < outputs; ++stage) {
                const OutputPlace place = next_output(position, task.gemm, stage);
                const bool spare = place.index == kSpare;
                const long content = spare ? 1000000 + spare_uses : walk;
                const int lap = static_cast<int>(spare ? spare_uses : walk / kStages);
                (spare ? spare_uses : walk) += 1;
                when_free(agent, cta, place.index, place.parity, lap, [this, cta, place, content] {
                    ctas_[cta].stage_full[place.index].expect(48);
                    transfers_.push_back([this, cta, place, content] {
                        fill(cta, place.index, content);
                        ctas_[cta].stage_full[place.index].complete(48);
                    });
                });
            }
        }
        take_unit(agent, cta, cursor, static_cast<int>(work_.tasks.size()));
    }

    void hand_back(int cta, int index, int count) {
        ctas_[cta].memory[index].readers -= count;
        if (index == kSpare) {
            ctas_[cta].stage_free[index].arrive(count);
        } else {
            for (Cta& to : ctas_) to.stage_free[index].arrive(count);
        }
    }

    void check(int cta, int index, long content) {
        if (ctas_[cta].memory[index].content != content) fail("a stage holds something else than was meant");
    }

    void build_math(int cta, int warpgroup) {
        Agent& agent = agents_.emplace_back();
        Position position;
        UnitCursor cursor;
        long walk = 0, spare_uses = 0;
        for (size_t number = 0; number < work_.tasks.size(); ++number) {
            const Task& task = work_.tasks[number];
            take_unit(agent, cta, cursor, static_cast<int>(number));
            const bool works = task.works[cta][warpgroup];
            int previous = -1;
            for (int k = 0; k < task.k_blocks; ++k, ++walk) {
                const int index = position.ring.index;
                wait(agent, ctas_[cta].stage_full[index], position.ring.parity, static_cast<int>(walk / kStages),
                     [this, cta, index, walk] { check(cta, index, walk); });
                // A working warp hands a stage back when the step after it has been issued.
                if (!works) previous = index;
                if (previous >= 0) act(agent, [this, cta, previous] { hand_back(cta, previous, 1); });
                previous = works ? index : -1;
                position.ring.advance();
            }
            if (previous >= 0) act(agent, [this, cta, previous] { hand_back(cta, previous, 1); });
            const int outputs = output_stages(task.gemm, task.n_extent, task.unit, task.k_blocks);
            for (int stage = 0; stage < outputs; ++stage) {
                const OutputPlace place = next_output(position, task.gemm, stage);
                const bool spare = place.index == kSpare, sends = works && stage < task.chunks[cta];
                const long content = spare ? 1000000 + spare_uses : walk;
                const int lap = static_cast<int>(spare ? spare_uses : walk / kStages);
                (spare ? spare_uses : walk) += 1;
                wait(agent, ctas_[cta].stage_full[place.index], place.parity, lap,
                     [this, cta, place, content, sends, warpgroup] {
                         check(cta, place.index, content);
                         if (sends) {
                             ctas_[cta].output_full[warpgroup][place.index].arrive(1);
                         } else {
                             hand_back(cta, place.index, 1);
                         }
                     });
            }
        }
        take_unit(agent, cta, cursor, static_cast<int>(work_.tasks.size()));
    }

    void build_storer(int cta) {
        Agent& agent = agents_.emplace_back();
        Position position;
        UnitCursor cursor;
        unsigned laps[kMathWarpgroups] = {};
        int uses[kMathWarpgroups][kStages + 1] = {};
        long walk = 0, spare_uses = 0;
        for (size_t number = 0; number < work_.tasks.size(); ++number) {
            const Task& task = work_.tasks[number];
            take_unit(agent, cta, cursor, static_cast<int>(number));
            position.ring.skip(task.k_blocks);
            walk += task.k_blocks;
            const int outputs = output_stages(task.gemm, task.n_extent, task.unit, task.k_blocks);
            const auto back = [&](OutputPlace place, int working) {
                act(agent, [this, cta, place, working] { hand_back(cta, place.index, working * kWarpgroupWarps); });
            };
            OutputPlace on_the_way{-1, 0};
            int handed = 0;
            for (int turn = 0; turn < outputs; ++turn) {
                const int stage = sent_stage(task.gemm, turn, outputs);
                OutputPlace place = next_output(position, task.gemm, stage);
                const bool spare = place.index == kSpare;
                const long content = spare ? 1000000 + spare_uses : walk;
                (spare ? spare_uses : walk) += 1;
                if (stage >= task.chunks[cta]) continue;
                int working = 0;
                for (int w = 0; w < kMathWarpgroups; ++w) {
                    if (!task.works[cta][w]) continue;
                    ++working;
                    wait(agent, ctas_[cta].output_full[w][place.index], laps[w] >> place.index & 1,
                         uses[w][place.index]++, [this, cta, place, content] { check(cta, place.index, content); });
                    laps[w] ^= 1u << place.index;
                }
                if (working == 0) continue;
                // In step, or when the next stage is on its way: as store_unit().
                if (!task.in_step) std::swap(place, on_the_way);
                if (place.index >= 0) back(place, working);
                handed = working;
            }
            if (on_the_way.index >= 0) back(on_the_way, handed);
        }
        take_unit(agent, cta, cursor, static_cast<int>(work_.tasks.size()));
    }

    void build() {
        build_scheduler();
        for (int cta = 0; cta < kClusterSize; ++cta) {
            build_loader(cta);
            for (int warp = 0; warp < kMathWarps; ++warp) build_math(cta, warp / kWarpgroupWarps);
            build_storer(cta);
        }
    }

    const Case& work_;
    std::mt19937& random_;
    Cta ctas_[kClusterSize];
    std::deque<Agent> agents_;
    std::vector<std::function<void()>> transfers_;
};

// A product of an expert, as the schedule would hand it out; then another.
Case random_case(std::mt19937& random, int units) {
    Case work;
    while (static_cast<int>(work.tasks.size()) < units) {
        const Gemm gemm = static_cast<Gemm>(random() % 6);
        const bool wgrad = is_wgrad(gemm);
        const int n_extent = 128 * (1 + static_cast<int>(random() % 6));
        const int n_tiles = ceil_div(n_extent, tile_columns(gemm));
        const int m_rows = wgrad ? 256 : 1 + static_cast<int>(random() % 700);
        const int k_blocks = wgrad ? static_cast<int>(random() % 7) : 1 + static_cast<int>(random() % (2 * kClaimLead));
        for (int i = 0; i < num_units(m_rows, n_tiles); ++i) {
            if (random() % 3 == 0) continue;  // another cluster has it
            Task task{gemm, n_extent, unit_at(m_rows, n_tiles, i), k_blocks, random() % 2 == 0, {}, {}};
            for (int cta = 0; cta < kClusterSize; ++cta) {
                for (int w = 0; w < kMathWarpgroups; ++w) {
                    task.works[cta][w] = has_work(gemm, task.unit, cta, w, m_rows, n_extent);
                }
                task.chunks[cta] = gemm == Gemm::kDgrad2 ? dswiglu_chunks(n_extent, n_tile_of(task.unit, cta))
                                                         : output_stages(gemm, n_extent, task.unit, k_blocks);
            }
            work.tasks.push_back(task);
        }
    }
    return work;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return 2;
    std::mt19937 random(static_cast<unsigned>(std::atoi(argv[1])));
    const Case work = random_case(random, std::atoi(argv[2]));
    std::printf("ok %ld\n", Cluster(work, random).run());
}
