// Scheduler role: one warp of the cluster's first CTA claims units in their fixed order and hands each to both CTAs.
#pragma once
#include "roles/gemm_params.cuh"
#include "schedule/order.cuh"

namespace megamoe {

// Units of one product of an expert with `rows` rows.
__device__ __forceinline__ int units_of(const GemmParams& params, int rows) {
    const int n_tiles = ceil_div(params.n_extent, tile_columns(params.gemm));
    // Nothing to add to a gradient without rows; but a first write must write its zeros.
    if (params.gemm == Gemm::kWgrad) return rows == 0 && params.accumulate ? 0 : num_units(params.m_extent, n_tiles);
    return num_units(rows, n_tiles);
}

// The index-th of them.
__device__ __forceinline__ UnitSlot unit_of_expert(const GemmParams& params, Segment segment, int rows, int index) {
    const bool is_wgrad = params.gemm == Gemm::kWgrad;
    const int n_tiles = ceil_div(params.n_extent, tile_columns(params.gemm));
    const Unit unit = unit_at(is_wgrad ? params.m_extent : rows, n_tiles, index);
    const int k_blocks = is_wgrad ? wgrad_blocks(rows) : params.k_blocks;
    return {segment.expert, unit.m_tile, unit.n_tile,    unit.n_pair, params.expert_offset[segment.expert],
            rows,           k_blocks,    segment.product};
}

// Finds the unit of a claim. The claims of one cluster only grow, so the search goes on from the last segment.
class UnitFinder {
public:
    __device__ UnitFinder(const GemmParams* products, const Order& order, const int* rows)
        : products_(products), order_(order), rows_(rows) {
        units_ = units_here();
    }

    __device__ UnitSlot find(int claim) {
        while (claim - begin_ >= units_) {
            if (++index_ >= num_segments(order_)) return {-1, 0, 0, 0, 0, 0, 0, 0};
            begin_ += units_;
            units_ = units_here();
        }
        const Segment segment = segment_at(order_, index_);
        return unit_of_expert(products_[segment.product], segment, rows_[segment.expert], claim - begin_);
    }

private:
    __device__ int units_here() const {
        const Segment segment = segment_at(order_, index_);
        if (segment.expert < 0 || !products_[segment.product].wanted) return 0;
        return units_of(products_[segment.product], rows_[segment.expert]);
    }

    const GemmParams* products_;
    const Order& order_;
    const int* rows_;  // [L] in shared memory
    int index_ = 0;
    int begin_ = 0;  // units before this segment
    int units_;
};

// Hands a unit to both CTAs of the cluster.
__device__ __forceinline__ void hand_out(SharedStorage& shared, const UnitSlot& unit, const UnitCursor& cursor,
                                         const Deadline& deadline) {
    wait(&shared.unit_free[cursor.index], cursor.parity ^ 1, deadline, Waiting::kUnitSlotFree);
    const int4* words = reinterpret_cast<const int4*>(&unit);
    int4* slot = reinterpret_cast<int4*>(&shared.units[cursor.index]);
    uint64_t* full = &shared.unit_full[cursor.index];
    for (uint32_t cta = 0; cta < kClusterSize; ++cta) {
        ptx::mbarrier_expect_cta(full, cta, sizeof(UnitSlot));
        ptx::store_async_cta(slot, words[0], full, cta);
        ptx::store_async_cta(slot + 1, words[1], full, cta);
    }
}

// `products`: the launch's, as `order` counts them; `claims`: units handed out, zero before the launch. `ready(unit)`,
// by the whole warp, returns when everything that the unit reads is there: waited for here, ahead of the loaders, which
// then need not.
template <class Ready>
__device__ __forceinline__ void scheduler_role(SharedStorage& shared, const GemmParams* products, const Order& order,
                                               int* claims, Ready&& ready) {
    const int lane = threadIdx.x & 31;
    for (int e = lane; e < order.experts; e += 32) shared.expert_rows[e] = products[0].expert_rows[e];
    __syncwarp();
    UnitFinder finder(products, order, shared.expert_rows);
    UnitCursor cursor;
    while (true) {
        const int claim = lane == 0 ? atomicAdd(claims, 1) : 0;
        const UnitSlot unit = finder.find(__shfl_sync(0xffffffffu, claim, 0));
        if (unit.expert >= 0) ready(unit);
        __syncwarp();
        if (lane == 0) hand_out(shared, unit, cursor, products[0].deadline);
        cursor.advance();
        if (unit.expert < 0) return;
    }
}

}  // namespace megamoe
