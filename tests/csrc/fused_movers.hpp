// What movers and math warps of walk_fused.cpp have in common: rows that come in and are staged, and sums of tokens.
#pragma once
#include <algorithm>

#include "fused_world.hpp"

namespace walk {

// Rows from the peers, as pull_rows().
struct Puller {
    int which = 0;
    bool throttled = false;
    int state = 0, first = 0, expert = 0, row = 0;

    bool step(World& world, int r, bool& finished) {
        const Case& work = world.work;
        const Part& part = work.parts[r];
        Rank& rank = world.ranks[r];
        const int rows = part.offset.back();
        if (state == 0) {
            first = rank.pulls[which]++ * work.claim_rows;
            state = first < rows ? (throttled ? 1 : 2) : 5, row = first;
            finished = first > rows;
            return true;
        }
        if (state == 1) {
            while (first >= part.offset[expert + 1]) ++expert;
            if (rank.frontier[which] < least_frontier(expert, work.pull_lead)) return false;
            state = 2;
            return true;
        }
        if (state == 2) {
            for (; row < first + work.claim_rows; ++row) {
                const int from = part.source[row];
                if (from >= 0 && from != r && !rank.ready[from]) return false;
                if (from >= 0 && from != r && which == 1 && !rank.staged_word[from]) return false;
                if (from >= 0 && !world.ranks[from].staged) fail("a row is pulled that is not staged", r, row);
                if (from >= 0 && from != r && which == 1) check_staged(world.ranks[from], r, row);
                if (from >= 0 && world.ranks[from].acked[which][r]) fail("a row is pulled after the last", r, row);
            }
            if (rank.copied[which][first / work.claim_rows]++) fail("a row is pulled twice", r, first);
            rank.rows_here[which][first / kRowTile] += work.claim_rows;
            state = 3;
            return true;
        }
        if (state == 3) {
            rank.arrived[which][first / kRowTile] += work.claim_rows;
            state = 4;
            return true;
        }
        count(world, r, state == 4 ? work.claim_rows : 1);
        finished = state == 5 || (!throttled && first + work.claim_rows >= work.first_rows);
        state = 0;
        return true;
    }

    // All of a peer's tokens: which one the row is, the plan of the walk does not say.
    static void check_staged(const Rank& from, int r, int row) {
        for (char copied : from.late_copied) {
            if (!copied) fail("a row is pulled that is not staged", r, row);
        }
    }

    // As count_pulled(): whoever counts last acknowledges.
    void count(World& world, int r, int rows) {
        Rank& rank = world.ranks[r];
        rank.pulled[which] += rows;
        if (world.work.ranks == 1 || rank.pulled[which] != world.work.parts[r].offset.back() + 1) return;
        for (char copied : rank.copied[which]) {
            if (!copied) fail("a pull is acknowledged before its last row", r, which);
        }
        for (Rank& source : world.ranks) ++source.acked[which][r];
    }
};

// Tokens of the second pull, as stage_claim().
struct Stager {
    int state = 0, first = 0, rows = 0;
    bool open = true;

    // False, once and for all, when no claim is left.
    bool step(World& world, int r) {
        const Case& work = world.work;
        Rank& rank = world.ranks[r];
        const int tokens = work.parts[r].tokens;
        if (state == 0) {
            open = open && work.ranks > 1 && work.num_pulls > 1;
            if (!open) return false;
            first = rank.stagings++ * work.claim_rows;
            open = first < tokens;
            if (!open) return false;
            rows = std::min(work.claim_rows, tokens - first);
        } else if (state == 1) {
            for (int token = first; token < first + rows; ++token) {
                if (rank.late_copied[token]++) fail("a token is staged twice", r, token);
            }
        } else if (state == 2) {
            rank.staged_tokens += rows;
            if (rank.staged_tokens != tokens) state = -1;
        } else {
            world.ranks[state - 3].staged_word[r] = 1;
            if (state - 2 == work.ranks) state = -1;
        }
        ++state;
        return true;
    }
    // In the middle of a claim.
    bool busy() const { return state != 0; }
};

inline bool all_ready(const World& world, int r) {
    for (int peer = 0; peer < world.work.ranks; ++peer) {
        if (peer != r && !world.ranks[r].ready[peer]) return false;
    }
    return true;
}

// Sums of tokens: in sweeps as sum_in_sweeps(), or in turns as sum_in_turns().
struct Summer {
    static constexpr int kTurnTokens = 2;

    explicit Summer(bool sweeps) : sweeps(sweeps) {}
    bool sweeps;
    int state = 0, block = 0, round = 0, turn = 0;
    std::vector<int> mine;

    bool filled(const World& world, int r, int token) const {
        const Case& work = world.work;
        for (int flat = token * work.top_k; flat < (token + 1) * work.top_k; ++flat) {
            const int row = work.parts[r].slot_of[flat];
            if (row >= 0 && !world.ranks[r].flags[work.parts[r].ids[flat] / work.local][row / kRowTile]) return false;
        }
        return true;
    }

    void sum(World& world, int r, int token) {
        const Case& work = world.work;
        for (int flat = token * work.top_k; flat < (token + 1) * work.top_k; ++flat) {
            const int row = work.parts[r].slot_of[flat];
            if (row < 0) continue;
            const int id = work.parts[r].ids[flat], owner = id / work.local, expert = id % work.local;
            const Part& part = work.parts[owner];
            const int all = world.all_shares(part, 1, expert, (row - part.offset[expert]) / kTileM);
            if (world.ranks[owner].shares[1][row / kRowTile] != all)
                fail("a slot is summed that is not filled", r, flat);
        }
        ++world.ranks[r].sums[token];
    }

    // Whether it has taken tokens and not summed them yet.
    bool summing() const { return state == 2; }

    bool all_taken(const Rank& rank) const {
        return std::all_of(rank.taken.begin(), rank.taken.end(), [](char taken) { return taken != 0; });
    }

    bool step(World& world, int r, bool sweep, bool& finished) {
        const int tokens = world.work.parts[r].tokens;
        Rank& rank = world.ranks[r];
        switch (state) {
            case 0:
                if (!all_ready(world, r)) return false;
                block = tokens == 0 ? 0 : world.random.below(ceil_div(tokens, 32));
                state = sweeps ? 1 : 3;
                return true;
            case 1: return look_around(world, r, sweep, finished);
            case 3:  // a turn begins
                turn = rank.turns[round]++;
                state = turn * kTurnTokens >= tokens || all_taken(rank) ? 6 : 4;
                return true;
            case 4:
                for (int token = turn * kTurnTokens; token < std::min(tokens, (turn + 1) * kTurnTokens); ++token) {
                    if (!rank.taken[token]) mine.push_back(token);
                }
                state = 5;
                return true;
            case 5: {
                const auto empty = [&](int token) { return !filled(world, r, token); };
                if (round == 1 && std::any_of(mine.begin(), mine.end(), empty)) return false;
                std::erase_if(mine, empty);
                state = 2;
                return true;
            }
            case 6:
                finished = ++round == 2;
                state = 3;
                return true;
        }
        std::erase_if(mine, [&](int token) { return rank.taken[token]++ != 0; });
        for (int token : mine) sum(world, r, token);
        mine.clear();
        state = sweeps ? 1 : 3;
        return true;
    }

    bool look_around(World& world, int r, bool sweep, bool& finished) {
        const int tokens = world.work.parts[r].tokens, blocks = ceil_div(tokens, 32);
        const Rank& rank = world.ranks[r];
        if (rank.turns[1] * kTurnTokens >= tokens || all_taken(rank)) return finished = true;
        for (int i = 0; i < (sweep ? blocks : 1) && mine.empty(); ++i) {
            block = block + 1 < blocks ? block + 1 : 0;
            const int turn = world.random.below(32);
            for (int lane = 0; lane < 32 && mine.size() < 2; ++lane) {
                const int token = block * 32 + (lane + turn) % 32;
                if (token < tokens && !rank.taken[token] && filled(world, r, token)) mine.push_back(token);
            }
        }
        state = mine.empty() ? 1 : 2;
        return state == 2;
    }
};

}  // namespace walk
