// Math role: a warpgroup multiplies its 64 rows of every tile and drops the results into output stages. The two
// warpgroups of a CTA never wait for each other.
#pragma once
#include "roles/dswiglu.cuh"

namespace megamoe {

// Hands all stages of a unit back unread: this warpgroup has no row in the tile.
template <Gemm kGemm>
__device__ __forceinline__ void skip(SharedStorage& shared, const GemmParams& params, int k_blocks, int outputs,
                                     Position& position) {
    for (int k_block = 0; k_block < k_blocks; ++k_block) {
        const StageCursor& ring = position.ring;
        wait(&shared.stage_full[ring.index], ring.parity, params.deadline, Waiting::kStageFull);
        release_stage(shared, ring.index);
        position.ring.advance();
    }
    for (int stage = 0; stage < outputs; ++stage) {
        const OutputPlace output = position.next_output<kGemm>(stage);
        wait(&shared.stage_full[output.index], output.parity, params.deadline, Waiting::kStageFull);
        release_output(shared, output, 1);
    }
}

// Where the operands of a warpgroup lie in the ring's first stage.
struct Operands {
    uint32_t a, b;
};

// Issues slices kFrom to kTo of a stage, a group of instructions.
template <Gemm kGemm, int kFrom, int kTo>
__device__ __forceinline__ void issue_slices(const Operands& operands, int stage, float (&d)[128], bool accumulate) {
    constexpr ptx::Major kA = GemmTraits<kGemm>::kMajorA, kB = GemmTraits<kGemm>::kMajorB;
    const uint32_t at = ptx::uniform(stage) * kStageBytes;
    const uint64_t a = ptx::descriptor_behind(ptx::smem_descriptor<kA>(operands.a), at);
    const uint64_t b = ptx::descriptor_behind(ptx::smem_descriptor<kB>(operands.b), at);
    ptx::pin_accumulators(d);
    ptx::wgmma_fence();
#pragma unroll
    for (int slice = kFrom; slice < kTo; ++slice) {
        ptx::wgmma_m64n256k16<kA, kB>(d, ptx::descriptor_behind(a, slice * ptx::kSliceBytes<kA>),
                                      ptx::descriptor_behind(b, slice * ptx::kSliceBytes<kB>),
                                      accumulate || slice > kFrom);
    }
    ptx::wgmma_commit();
    ptx::pin_accumulators(d);
}

// Issues the reduction loop, of at least one step. Its last step is still running on return: finish_multiply waits for
// it. Returns the stage of that step.
template <Gemm kGemm>
__device__ __forceinline__ int multiply(SharedStorage& shared, const GemmParams& params, int warpgroup,
                                        const UnitSlot& slot, StageCursor& cursor, float (&d)[128], Trace& trace) {
    constexpr int kSlices = kBlockK / kSliceK;
    const int whole = GemmTraits<kGemm>::kIsWgrad ? slot.rows / kBlockK : slot.k_blocks;
    const uint32_t ring = ptx::smem_address(shared.ring[0]);
    const Operands operands{ptx::uniform(ring + warpgroup * (kBytesA / 2)), ptx::uniform(ring + kBytesA)};
    int previous = -1;
    const auto next_stage = [&] {
        wait(&shared.stage_full[cursor.index], cursor.parity, params.deadline, Waiting::kStageFull);
        if (previous < 0) trace.mark(Mark::kFirstStage);
    };
    const auto advance = [&] {
        // The step before this one is complete: its stage can be refilled.
        ptx::wgmma_wait<1>();
        release_stage(shared, previous);
        previous = cursor.index;
        cursor.advance();
    };
    for (int k_block = 0; k_block < whole; ++k_block) {
        next_stage();
        issue_slices<kGemm, 0, kSlices>(operands, cursor.index, d, k_block > 0);
        advance();
    }
    const int rest = GemmTraits<kGemm>::kIsWgrad ? slot.rows % kBlockK : 0;
    if (rest == 0) return previous;
    // A group for each slice: as these branches diverge for all the compiler knows, it would let the instructions of a
    // common group run one by one.
    next_stage();
    issue_slices<kGemm, 0, 1>(operands, cursor.index, d, whole > 0);
    const int stage = cursor.index;
    advance();
    if (rest > kSliceK) issue_slices<kGemm, 1, 2>(operands, stage, d, true);
    if (rest > 2 * kSliceK) issue_slices<kGemm, 2, 3>(operands, stage, d, true);
    if (rest > 3 * kSliceK) issue_slices<kGemm, 3, 4>(operands, stage, d, true);
    return stage;
}

__device__ __forceinline__ void finish_multiply(SharedStorage& shared, int last_stage, float (&d)[128]) {
    ptx::wgmma_wait<0>();
    ptx::pin_accumulators(d);
    release_stage(shared, last_stage);
}

__device__ __forceinline__ WarpPlace warp_place(int warpgroup) {
    return {warpgroup, warpgroup * kWarpgroupM + static_cast<int>((threadIdx.x / 32) & 3) * kWarpRows};
}

// `d`: the accumulators, one set for all products of a launch. A set for each would be alive all the time: the first
// wgmma of a tile names its accumulators as inputs, even where it overwrites them.
template <Gemm kGemm>
__device__ __forceinline__ void math_unit(SharedStorage& shared, const GemmParams& params, const UnitSlot& slot,
                                          WarpPlace place, int rank, Position& position, float (&d)[128],
                                          Trace& trace) {
    constexpr bool kUsesWeights = kGemm == Gemm::kFc1 || kGemm == Gemm::kDgrad2;
    const int warp_row = place.row - place.warpgroup * kWarpgroupM;
    const Share share = share_of<kGemm>(params, slot, rank, place.warpgroup);
    const int outputs = output_stages(kGemm, params.n_extent, unit_of(slot), slot.k_blocks);
    if (!share.works) return skip<kGemm>(shared, params, slot.k_blocks, outputs, position);
    if (GemmTraits<kGemm>::kIsWgrad && slot.k_blocks == 0) {
        using Element = std::conditional_t<kGemm == Gemm::kWgrad, float, __nv_bfloat16>;
        return zero_gradient(params, share, warp_row, static_cast<Element*>(params.gradients[slot.expert]));
    }
    const int last_stage = multiply<kGemm>(shared, params, place.warpgroup, slot, position.ring, d, trace);
    // Asked for while the last step runs.
    const float2 p = kUsesWeights ? row_weights(params, share, warp_row) : float2{0.0f, 0.0f};
    finish_multiply(shared, last_stage, d);
    trace.mark(Mark::kMultiplied);
    if constexpr (kGemm == Gemm::kFc1) {
        swiglu_epilogue(shared, params, place, p, d, position);
    } else if constexpr (kGemm == Gemm::kDgrad2) {
        dswiglu_epilogue(shared, params, share, place, outputs, p, d, position, trace);
    } else if constexpr (kGemm == Gemm::kWgrad) {
        wgrad_epilogue(shared, params, place, d, position, trace);
    } else {
        store_epilogue<kGemm>(shared, params, place, d, position);
    }
    trace.mark(Mark::kDone);
}

// Of the first math warp; the others' record nothing.
__device__ __forceinline__ TraceBuffer math_trace([[maybe_unused]] const TraceBuffer& buffer) {
#ifdef MEGAMOE_TRACE
    if (threadIdx.x / 32 == 4) return buffer;
#endif
    return {};
}

__device__ __forceinline__ void begin_unit(Trace& trace, const UnitSlot& slot) {
    trace.begin_unit();
    trace.unit(slot.product, slot.expert);
    trace.mark(Mark::kTaken);
}

template <Gemm kGemm>
__device__ void math_role(SharedStorage& shared, const GemmParams& params, int warpgroup, int rank) {
    const WarpPlace place = warp_place(warpgroup);
    Position position;
    UnitCursor units;
    float d[128];
    Trace trace(math_trace(params.trace));
    trace.tie(CtaMark::kClock, CtaMark::kGlobal);
    while (true) {
        const UnitSlot slot = next_unit(shared, units, params.deadline);
        if (slot.expert < 0) break;
        begin_unit(trace, slot);
        math_unit<kGemm>(shared, params, slot, place, rank, position, d, trace);
    }
    trace.tie(CtaMark::kClockEnd, CtaMark::kGlobalEnd);
}

}  // namespace megamoe
