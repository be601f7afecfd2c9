// What walk_fused.cpp works on: random shapes, routings and grids, and the plan that follows from a routing.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "schedule/pulls.cuh"

namespace walk {

using namespace megamoe;

struct Random {
    uint64_t state;
    uint32_t next() {
        state += 0x9e3779b97f4a7c15ull;
        uint64_t z = state;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return static_cast<uint32_t>(z >> 32);
    }
    int below(int n) { return static_cast<int>((uint64_t{next()} * static_cast<uint64_t>(n)) >> 32); }
    int between(int low, int high) { return low + below(high - low + 1); }
    bool chance(int percent) { return below(100) < percent; }
    template <int kCount>
    int one_of(const int (&values)[kCount]) {
        return values[below(kCount)];
    }
};

// What schedule/order.cuh reads of GemmParams.
struct Product {
    Gemm gemm;
    int m_extent;
    int n_extent;
    int accumulate;
    int wanted;
};

// A rank's part of the routing and, as the owner of experts, of the plan.
struct Part {
    int tokens;
    std::vector<int> ids;      // [T, K] expert; -1: dropped
    std::vector<int> slot_of;  // [T, K] row at the expert's rank; -1
    std::vector<int> rows;     // [L]
    std::vector<int> offset;   // [L + 1]
    std::vector<int> source;   // [M] rank that holds the row's token; -1: padding
    int resident;              // clusters that find room at first
    bool waits;                // the others find it only when one leaves
};

struct Case {
    bool backward;
    int ranks, local, top_k, hidden, inter, clusters;
    Product products[kMaxProducts];
    Order order;
    int num_pulls, claim_rows, first_rows, pull_lead;
    std::vector<Part> parts;
};

// An expert for a token of a routing where few, many or no experts are busy.
inline int draw_expert(Random& random, int mode, int experts, int local, int hot) {
    switch (mode) {
        case 0: return random.below(experts);                                               // even
        case 1: return random.below(random.below(experts) + 1);                             // skewed
        case 2: return random.chance(90) ? hot : random.below(experts);                     // one hot expert
        case 3: return hot / local * local + random.below(local);                           // one rank has all
        case 4: return (hot + 5 * random.below((experts + 4) / 5)) % experts;               // most are empty
        default: return random.chance(50) ? experts - 1 : random.below((experts + 1) / 2);  // the last one is full
    }
}

inline void plan(Case& work) {
    for (Part& part : work.parts) {
        part.rows.assign(work.local, 0);
        part.offset.assign(work.local + 1, 0);
        part.slot_of.assign(part.ids.size(), -1);
    }
    for (const Part& part : work.parts) {
        for (int id : part.ids) {
            if (id >= 0) ++work.parts[id / work.local].rows[id % work.local];
        }
    }
    for (Part& part : work.parts) {
        for (int e = 0; e < work.local; ++e) {
            part.offset[e + 1] = part.offset[e] + ceil_div(part.rows[e], kRowTile) * kRowTile;
        }
        part.source.assign(part.offset.back(), -1);
    }
    std::vector<int> placed(work.ranks * work.local, 0);
    for (int r = 0; r < work.ranks; ++r) {
        for (size_t flat = 0; flat < work.parts[r].ids.size(); ++flat) {
            const int id = work.parts[r].ids[flat];
            if (id < 0) continue;
            Part& owner = work.parts[id / work.local];
            const int row = owner.offset[id % work.local] + placed[id]++;
            owner.source[row] = r;
            work.parts[r].slot_of[flat] = row;
        }
    }
}

inline void choose_products(Case& work, Random& random) {
    const int products = work.backward ? 4 : 2;
    const Pass pass = work.backward ? Pass::kBackward : Pass::kForward;
    for (int product = 0; product < products; ++product) {
        const ProductShape shape = product_shape(pass, product, work.inter, work.hidden);
        const bool wgrad = is_wgrad(shape.gemm);
        work.products[product] = {shape.gemm, shape.m_extent, shape.n_extent, wgrad && random.chance(70),
                                  !wgrad || random.chance(80)};
    }
    Product &wgrad2 = work.products[kProductWgrad2], &wgrad1 = work.products[kProductWgrad1];
    if (work.backward && !wgrad2.accumulate && !wgrad1.accumulate) {  // those in bf16 are never added to
        wgrad2.gemm = wgrad1.gemm = Gemm::kWgradBf16;
    }
    work.num_pulls = work.backward && work.products[kProductWgrad1].wanted ? 2 : 1;
}

// The choices of csrc/host/fused.cu, for `even` rows of an expert.
inline void choose_schedule(Case& work, int even) {
    const Product& first = work.products[0];
    work.order =
        work.backward ? backward_order(work.local, even, work.inter, work.clusters) : forward_order(work.local);
    work.claim_rows = claim_rows(2 * work.hidden);
    work.first_rows = first_rows(first.gemm, first.n_extent, work.clusters);
    work.pull_lead = pull_lead(even, 2 * work.hidden);
}

inline Case random_case(Random& random) {
    Case work{};
    work.backward = random.chance(60);
    work.ranks = random.one_of({1, 2, 2, 4});
    work.clusters = random.one_of({1, 1, 2, 3, 7, 66});
    work.local = random.chance(50) ? random.between(1, 8) : random.between(1, 64);
    work.top_k = random.between(1, 8);
    work.hidden = random.one_of({256, 512, 1024, 2048});
    work.inter = random.one_of({128, 256, 384, 512, 640, 1024});
    const int experts = work.ranks * work.local;
    const int most = random.one_of({0, 3, 40, 40, 300, 300, 1500}), drop = random.one_of({0, 0, 0, 30, 100});
    const int mode = random.below(6), hot = random.below(experts);
    for (int r = 0; r < work.ranks; ++r) {
        Part& part = work.parts.emplace_back();
        part.tokens = random.chance(15) ? 0 : random.between(most / 2, most);
        for (int i = 0; i < part.tokens * work.top_k; ++i) {
            part.ids.push_back(random.chance(drop) ? -1 : draw_expert(random, mode, experts, work.local, hot));
        }
        part.resident = random.chance(50) ? work.clusters : random.between(1, work.clusters);
        part.waits = random.chance(50);
    }
    plan(work);
    choose_products(work, random);
    choose_schedule(work, most * work.top_k / work.local);
    if (random.chance(75)) work.pull_lead = random.one_of({0, 1, 3});
    return work;
}

}  // namespace walk
