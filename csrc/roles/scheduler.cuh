// Scheduler role: one warp of the cluster's first CTA claims units in their fixed order and hands each to both CTAs.
#pragma once
#include "roles/gemm_params.cuh"
#include "schedule/order.cuh"

namespace megamoe {

// As every role of a cluster reads it. rows: of each expert.
__device__ __forceinline__ UnitSlot slot_for(const GemmParams* products, const FoundUnit& found, const int* rows) {
    const Segment& segment = found.segment;
    if (segment.expert < 0) return {-1, 0, 0, 0, 0, 0, 0, 0};
    const GemmParams& product = products[segment.product];
    const int here = rows[segment.expert], begin = product.expert_offset[segment.expert];
    const Unit unit = unit_of_product(product, here, found.index);
    const int k_blocks = is_wgrad(product.gemm) ? wgrad_blocks(here) : product.k_blocks;
    return {segment.expert, unit.m_tile, unit.n_tile, unit.n_pair, begin, here, k_blocks, segment.product};
}

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
// then need not. The next unit is claimed when the first CTA's loader says that it is due (claim_step).
template <class Ready>
__device__ __forceinline__ void scheduler_role(SharedStorage& shared, const GemmParams* products, const Order& order,
                                               int* claims, Ready&& ready) {
    const int lane = threadIdx.x & 31;
    for (int e = lane; e < order.experts; e += 32) shared.expert_rows[e] = products[0].expert_rows[e];
    __syncwarp();
    UnitFinder finder(products, order, shared.expert_rows);
    UnitCursor cursor;
    Cursor<1> due;
    Trace trace(products[0].trace);
    while (true) {
        const int claim = lane == 0 ? atomicAdd(claims, 1) : 0;
        const FoundUnit found = finder.find(__shfl_sync(0xffffffffu, claim, 0));
        const UnitSlot unit = slot_for(products, found, shared.expert_rows);
        trace.begin_unit();
        trace.mark(Mark::kClaimed);
        if (unit.expert >= 0) ready(unit);
        trace.mark(Mark::kReady);
        __syncwarp();
        if (lane == 0) hand_out(shared, unit, cursor, products[0].deadline);
        cursor.advance();
        if (unit.expert < 0) return;
        wait(&shared.claim_due, due.parity, products[0].deadline, Waiting::kClaimDue);
        due.advance();
    }
}

}  // namespace megamoe
