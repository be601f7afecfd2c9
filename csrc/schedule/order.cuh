// In which order a launch works on its products: expert by expert, product p of expert e in step e + lag[p]. Pure, the
// same code on device, host and in the CPU test.
//
//   forward    fc1, fc2                        backward    dgrad2, dgrad1, wgrad2, wgrad1
//
// A product only needs what products before it in this list made of the same expert, and lags never fall, so every
// dependency points to earlier work: whatever CTAs are resident, those that hold the oldest unfinished unit can finish.
#pragma once
#include "schedule/ring.cuh"

namespace megamoe {

constexpr int kMaxProducts = 4;
constexpr int kWgradWaves = 12;  // waves of wgrad units left for the end of backward

enum ForwardProduct : int { kProductFc1, kProductFc2 };
enum BackwardProduct : int { kProductDgrad2, kProductDgrad1, kProductWgrad2, kProductWgrad1 };

struct Order {
    int products;
    int experts;
    int lag[kMaxProducts];  // ascending from 0, in experts
};

// One product of one expert; `expert` -1: nothing in this place.
struct Segment {
    int product;
    int expert;
};

MEGAMOE_HD constexpr int num_segments(const Order& order) {
    return order.products * (order.experts + order.lag[order.products - 1]);
}

MEGAMOE_HD constexpr Segment segment_at(const Order& order, int index) {
    const int product = index % order.products;
    const int expert = index / order.products - order.lag[product];
    return {product, expert >= 0 && expert < order.experts ? expert : -1};
}

// Lag in experts after which `units` units of the leading product lie between: enough for all clusters to have moved
// on.
MEGAMOE_HD constexpr int lag_for(int units, int units_per_expert, int experts) {
    const int lag = ceil_div(units, units_per_expert > 0 ? units_per_expert : 1);
    return lag < experts ? lag : experts;
}

// fc2 trails fc1 so far that fc1's tiles of its expert are finished when it starts. rows: of an expert, on average.
MEGAMOE_HD constexpr Order forward_order(int experts, int rows, int inter, int clusters) {
    const int units = num_units(rows > 0 ? rows : 1, ceil_div(inter, tile_columns(Gemm::kFc1)));
    return {2, experts, {0, lag_for(clusters, units, experts)}};
}

// dgrad1 trails dgrad2 alike. The weight gradients trail further: what is left of them when the last dgrad1 is done
// covers the sum of dX and the second pull of x.
MEGAMOE_HD constexpr Order backward_order(int experts, int rows, int inter, int hidden, int clusters) {
    const int dgrad2 = num_units(rows > 0 ? rows : 1, ceil_div(inter, kTileN));
    const int wgrads = num_units(hidden, ceil_div(inter, kTileN)) + num_units(2 * inter, ceil_div(hidden, kTileN));
    const int first = lag_for(clusters, dgrad2, experts);
    const int behind = lag_for(kWgradWaves * clusters, wgrads, experts);
    const int last = first + behind < experts ? first + behind : experts;
    return {4, experts, {0, first, last, last}};
}

}  // namespace megamoe
