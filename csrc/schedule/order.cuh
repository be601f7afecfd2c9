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

enum ForwardProduct : int { kProductFc1, kProductFc2 };
enum BackwardProduct : int { kProductDgrad2, kProductDgrad1, kProductWgrad2, kProductWgrad1 };

// A product's form and the extents of its result; m_extent of weight gradients only, where rows do not decide.
struct ProductShape {
    Gemm gemm;
    int m_extent, n_extent;
};

enum class Pass : int { kForward, kBackward, kBackwardBf16 };  // the last with weight gradients written in bf16

MEGAMOE_HD constexpr bool is_backward(Pass pass) { return pass != Pass::kForward; }
MEGAMOE_HD constexpr Gemm wgrad_gemm(Pass pass) {
    return pass == Pass::kBackwardBf16 ? Gemm::kWgradBf16 : Gemm::kWgrad;
}

MEGAMOE_HD constexpr ProductShape product_shape(Pass pass, int product, int inter, int hidden) {
    if (!is_backward(pass)) {
        return product == kProductFc1 ? ProductShape{Gemm::kFc1, 0, inter} : ProductShape{Gemm::kFc2, 0, hidden};
    }
    switch (product) {
        case kProductDgrad2: return {Gemm::kDgrad2, 0, inter};
        case kProductDgrad1: return {Gemm::kDgrad1, 0, hidden};
        case kProductWgrad2: return {wgrad_gemm(pass), hidden, inter};
        default: return {wgrad_gemm(pass), 2 * inter, hidden};
    }
}

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

// All of fc1, then all of fc2: rows arrive during the one, results leave and are summed during the other. (One expert
// behind, both at once, is 2 to 4% slower with two ranks.)
MEGAMOE_HD constexpr Order forward_order(int experts) { return {2, experts, {0, experts}}; }

// dgrad1 trails dgrad2 so far that dgrad2's tiles of its expert are finished when it starts; the weight gradients begin
// when dgrad2 is through. Earlier they would keep memory busy, for which dgrad2's epilogue waits; where dgrad1's lag is
// small beside the experts, they cover the sum of dX and the second pull of x. rows: of an expert, on average.
MEGAMOE_HD constexpr Order backward_order(int experts, int rows, int inter, int clusters) {
    const int dgrad2 = num_units(rows > 0 ? rows : 1, ceil_div(inter, kTileN));
    return {4, experts, {0, lag_for(clusters, dgrad2, experts), experts, experts}};
}

// Units of one product of an expert with `rows` rows. Product: GemmParams, or what a CPU test has of it.
template <class Product>
MEGAMOE_HD constexpr int units_of(const Product& product, bool accumulate, int rows) {
    const int n_tiles = ceil_div(product.n_extent, tile_columns(product.gemm));
    // Nothing to add to a gradient without rows; but a first write must write its zeros.
    if (is_wgrad(product.gemm)) return rows == 0 && accumulate ? 0 : num_units(product.m_extent, n_tiles);
    return num_units(rows, n_tiles);
}

// The index-th of them.
template <class Product>
MEGAMOE_HD constexpr Unit unit_of_product(const Product& product, int rows, int index) {
    const int n_tiles = ceil_div(product.n_extent, tile_columns(product.gemm));
    if (is_wgrad(product.gemm)) return wgrad_unit_at(product.m_extent, rows, n_tiles, index);
    return unit_at(rows, n_tiles, index);
}

struct FoundUnit {
    Segment segment;  // expert -1: no more work
    int index;        // of the segment's units
};

// Finds the unit of a claim. The claims of one cluster only grow, so the search goes on from the last segment.
template <class Product>
class UnitFinder {
public:
    MEGAMOE_HD constexpr UnitFinder(const Product* products, const Order& order, const int* rows)
        : products_(products), order_(order), rows_(rows) {
        units_ = units_here();
    }

    MEGAMOE_HD constexpr FoundUnit find(int claim) {
        while (claim - begin_ >= units_) {
            if (++index_ >= num_segments(order_)) return {{0, -1}, 0};
            begin_ += units_;
            units_ = units_here();
        }
        return {segment_at(order_, index_), claim - begin_};
    }

private:
    MEGAMOE_HD constexpr int units_here() const {
        const Segment segment = segment_at(order_, index_);
        if (segment.expert < 0 || !products_[segment.product].wanted) return 0;
        const Product& product = products_[segment.product];
        return units_of(product, product.accumulate, rows_[segment.expert]);
    }

    const Product* products_;
    const Order& order_;
    const int* rows_;  // [L]
    int index_ = 0;
    int begin_ = 0;  // units before this segment
    int units_ = 0;
};

// ---- what a unit needs, and how much makes it complete

// The pull whose rows units of `product` read, and whose frontier they move; -1: none.
MEGAMOE_HD constexpr int pull_of_product(int product) { return product == 0 ? 0 : product == kProductWgrad1 ? 1 : -1; }

struct Inputs {
    int first;  // row tiles of the expert
    int tiles;
    int pull;   // whose rows it reads; -1: none
    bool made;  // reads what fc1 or dgrad2 made of these tiles
};

MEGAMOE_HD constexpr Inputs inputs_of(int product, Unit unit, int rows) {
    const bool all_rows = product >= kProductWgrad2;  // a weight gradient reads all rows of its expert
    return {all_rows ? 0 : unit.m_tile, all_rows ? ceil_div(rows, kTileM) : (unit.n_pair ? 1 : kClusterSize),
            pull_of_product(product), product != 0};
}

// (column tile, warpgroup)s of row tile `m_tile` of an expert, of all products but the weight gradients.
MEGAMOE_HD constexpr int tile_shares(Gemm gemm, int n_extent, int rows, int m_tile) {
    return ceil_div(n_extent, tile_columns(gemm)) * warpgroups_of(rows, m_tile);
}

}  // namespace megamoe
