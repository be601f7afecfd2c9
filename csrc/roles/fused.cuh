// The roles of a fused launch: each takes units of several products and meets the others through counters.
#pragma once
#include "kernels/load.cuh"
#include "roles/loader.cuh"
#include "roles/math.cuh"
#include "roles/pull.cuh"
#include "roles/scatter.cuh"
#include "roles/scheduler.cuh"
#include "roles/stage.cuh"
#include "roles/sum.cuh"

namespace megamoe {

constexpr int kMoverDepth = 4;  // 16-byte loads in flight per lane of a mover
constexpr int kMathDepth = 8;   // and of a math warp that helps
constexpr int kMoverSlots = 6;  // combine slots in flight per lane of a mover
constexpr int kMathSlots = 6;   // of a math warp, and the 512-byte steps of each: latency, not bandwidth, held it
constexpr int kMathSteps = 4;

template <Gemm kGemm>
struct GemmTag {
    static constexpr Gemm kValue = kGemm;
};

// Calls visit(GemmTag, the product's parameters) for the unit's product: the same code for both weight gradients. Fixed
// indices where there can be: a pointer to the parameters costs the epilogues registers.
template <Pass kPass, class Visit>
__device__ __forceinline__ void with_gemm(const FusedParams& params, int product, Visit&& visit) {
    if constexpr (is_backward(kPass)) {
        if (product == kProductDgrad2) return visit(GemmTag<Gemm::kDgrad2>{}, params.products[kProductDgrad2]);
        if (product == kProductDgrad1) return visit(GemmTag<Gemm::kDgrad1>{}, params.products[kProductDgrad1]);
        return visit(GemmTag<wgrad_gemm(kPass)>{}, params.products[product]);
    } else {
        if (product == kProductFc1) return visit(GemmTag<Gemm::kFc1>{}, params.products[kProductFc1]);
        return visit(GemmTag<Gemm::kFc2>{}, params.products[kProductFc2]);
    }
}

// ---- scheduler and loader

// Waits until everything that the unit reads is there. Whole warp. Counter -> TMA load: ld.acquire.gpu by a lane,
// fence.proxy.async by the same; barrier; the scheduler's mbarrier arrive (release.cluster); the loader's wait; load.
// The fence stands here, ahead of the loads: in the loaders it cost 3,600 cycles between two units.
template <Pass kPass>
__device__ __forceinline__ void wait_for_inputs(const FusedParams& params, const UnitSlot& slot) {
    constexpr Gemm kMaker = is_backward(kPass) ? Gemm::kDgrad2 : Gemm::kFc1;
    const FusedCounters& counters = params.counters;
    const Inputs inputs = inputs_of(slot.product, unit_of(slot), slot.rows);
    for (int tile = inputs.first + static_cast<int>(threadIdx.x & 31); tile < inputs.first + inputs.tiles; tile += 32) {
        const int at = slot.row_begin / kRowTile + tile;
        if (!inputs.made) {
            wait_counter(params.peers, counters.arrived + at, kRowTile, Waiting::kRowsArrived);
            continue;
        }
        const int shares = tile_shares(kMaker, params.products[0].n_extent, slot.rows, tile);
        wait_counter(params.peers, counters.made + at, shares, Waiting::kTileMade);
        if (inputs.pull == 1) {
            wait_counter(params.peers, counters.arrived + params.tiles + at, kRowTile, Waiting::kRowsArrived);
        }
    }
    ptx::fence_async();
}

// Tells the movers how far the units that need their rows have come.
__device__ __forceinline__ void advance_frontier(const FusedParams& params, const UnitSlot& slot) {
    const int pull = pull_of_product(slot.product);
    if ((threadIdx.x & 31) == 0 && pull >= 0) atomicMax(params.counters.frontier + pull, slot.expert);
}

template <Pass kPass>
__device__ __forceinline__ void fused_scheduler(SharedStorage& shared, const FusedParams& params) {
    scheduler_role(shared, params.products, params.order, params.counters.units, [&](const UnitSlot& slot) {
        advance_frontier(params, slot);
        wait_for_inputs<kPass>(params, slot);
    });
}

template <Pass kPass>
__device__ __forceinline__ void fused_loader(SharedStorage& shared, const FusedParams& params, int rank) {
    Position position;
    UnitCursor units;
    Trace trace(params.products[0].trace);
    while (true) {
        const UnitSlot slot = next_unit(shared, units, params.peers.deadline);
        if (slot.expert < 0) break;
        trace.begin_unit();
        if ((threadIdx.x & 31) != 0) continue;
        with_gemm<kPass>(params, slot.product, [&](auto gemm, const GemmParams& product) {
            load_unit<gemm.kValue>(shared, product, slot, rank, position, trace);
        });
    }
}

// ---- storer

// A finished unit of fc1 or dgrad2. TMA stores -> made: wait_group 0; fence.proxy.async; red.release.gpu. What the math
// warps stored themselves (dp) came to this warp over output_full.
__device__ __forceinline__ void count_made(const FusedParams& params, const UnitSlot& slot, int rank, int warpgroups) {
    if ((threadIdx.x & 31) == 0 && warpgroups > 0) {
        ptx::tma_store_wait_all();
        ptx::fence_async();
        const int tile = slot.row_begin / kRowTile + m_tile_of(unit_of(slot), rank);
        add_counter(params.counters.made + tile, warpgroups);
    }
    __syncwarp();
}

template <Pass kPass>
__device__ __forceinline__ void fused_storer(SharedStorage& shared, const FusedParams& params, int rank) {
    Position position;
    UnitCursor units;
    Laps laps;
    uint64_t seen = 0;
    Trace trace(params.products[0].trace);
    while (true) {
        const UnitSlot slot = next_unit(shared, units, params.peers.deadline);
        if (slot.expert < 0) break;
        trace.begin_unit();
        with_gemm<kPass>(params, slot.product, [&](auto gemm, const GemmParams& product) {
            constexpr Gemm kGemm = gemm.kValue;
            if constexpr (kGemm == Gemm::kFc2 || kGemm == Gemm::kDgrad1) {
                wait_for_all_peers(params.peers, expected_ready(params), seen);
                scatter_unit<kGemm>(shared, params, product, slot, rank, position, laps, trace);
            } else {
                const int working = store_unit_tma<kGemm>(shared, product, slot, rank, position, laps, trace);
                if constexpr (!is_wgrad(kGemm)) count_made(params, slot, rank, working);
            }
            trace.mark(Mark::kSignalled);
        });
    }
    finish_stores();
}

// ---- mover and math warps

// Sums of a mover, one block of tokens at a time. With K experts at random a token is complete when most of them are
// done; until then (`begun`) sweeps would find little and load L2.
class MoverSums {
public:
    __device__ __forceinline__ explicit MoverSums(const FusedParams& params)
        : params_(params), sweep_(begin_sweep(params)) {}

    // While the warp waits for something else. Whole warp.
    __device__ __forceinline__ void meanwhile() {
        const int tiles = *params_.num_rows / kRowTile;
        if (tiles == 0 || params_.tokens == 0) return;
        const int* pushed = params_.counters.pushed + first_swept(tiles);
        const int begun = (threadIdx.x & 31) == 0 ? ptx::load_relaxed_gpu(pushed) : 0;
        if (__shfl_sync(0xffffffffu, begun, 0) == 0) return;
        const uint32_t epoch = static_cast<uint32_t>(state_word(params_.peers, kStateOpEpoch));
        if (!sweep_block<kMoverSlots, 1, 2>(params_, sweep_, epoch) && sweep_.idle >= kIdleBlocks) __nanosleep(1000);
    }

    // What is left. Returns how many tokens this warp has summed in all.
    __device__ __forceinline__ int finish(uint64_t& seen, Trace& trace) {
        const int tiles = *params_.num_rows / kRowTile;
        if (tiles > 0 && (threadIdx.x & 31) == 0) {
            wait_counter<2000>(params_.peers, params_.counters.pushed + first_swept(tiles), 1, Waiting::kTileMade);
        }
        __syncwarp();
        trace.mark(CtaMark::kSumming);
        sum_in_sweeps<kMoverSlots, 1, 2>(params_, sweep_, seen);
        return sweep_.summed;
    }

private:
    const FusedParams& params_;
    Sweep sweep_;
};

// Rows first; what is left of the warp's time goes to the sums.
template <Pass kPass>
__device__ __forceinline__ void fused_mover(const FusedParams& params) {
    uint64_t seen = 0;
    Trace trace(params.products[0].trace);
    MoverSums sums(params);
    MoverStaging staging(params);
    for (int which = 0; which < params.num_pulls; ++which) {
        if constexpr (is_backward(kPass)) {
            while (which == 1 && staging.step<kMoverDepth>()) {}  // peers pull it next
        }
        pull_rows<kMoverDepth>(params, which, kAllRows, seen, [&] {
            if constexpr (is_backward(kPass)) {
                if (!staging.step<kMoverDepth>()) sums.meanwhile();
            }
        });
        trace.mark(which == 0 ? CtaMark::kPulled : CtaMark::kPulledSecond);
    }
    trace.count(CtaMark::kMoverTokens, sums.finish(seen, trace));
    trace.mark(CtaMark::kSummed);
}

// A CTA must stay until its peer has sent it the last arrival and multicast.
__device__ __forceinline__ void leave() {
    __syncwarp();
    ptx::cluster_sync();
}

// The end of a math warp. Not inlined: beside the products the sums would cost their epilogues registers (measured:
// 3,300 cycles a tile of fc1 in spills). It does not return, since ptxas takes setmaxnreg from a kernel that calls
// others.
[[noreturn]] static __device__ __noinline__ void sum_and_leave(const FusedParams& params, Trace trace) {
    trace.mark(CtaMark::kMathSumming);
    uint64_t seen = 0;
    trace.count(CtaMark::kMathTokens, sum_in_turns<kMathSlots, kMathSteps>(params, seen));
    trace.tie(CtaMark::kClockEnd, CtaMark::kGlobalEnd);
    leave();
    ptx::exit_thread();
}

template <Pass kPass>
__device__ __forceinline__ void fused_math(SharedStorage& shared, const FusedParams& params, int warpgroup, int rank) {
    const WarpPlace place = warp_place(warpgroup);
    uint64_t seen = 0;
    pull_rows<kMathDepth>(params, 0, params.first_rows, seen, [] {});
    Position position;
    UnitCursor units;
    float d[128] = {};
    Trace trace(math_trace(params.products[0].trace));
    trace.tie(CtaMark::kClock, CtaMark::kGlobal);
    while (true) {
        const UnitSlot slot = next_unit(shared, units, params.peers.deadline);
        if (slot.expert < 0) break;
        begin_unit(trace, slot);
        with_gemm<kPass>(params, slot.product, [&](auto gemm, const GemmParams& product) {
            math_unit<gemm.kValue>(shared, product, slot, place, rank, position, d, trace);
        });
    }
    // Behind a condition: where math warps cannot come to the kernel's end, ptxas gives their products no more than the
    // launch's 168 registers, and the epilogues of dgrad2 and fc1 spill.
    if (params.tokens > 0) sum_and_leave(params, trace);
    trace.tie(CtaMark::kClockEnd, CtaMark::kGlobalEnd);
}

// Nothing to do: an overflow or a bad id, judged alike on every rank. The staged rows are given back unread.
__device__ __forceinline__ void give_up_pulls(const FusedParams& params) {
    const Peers& peers = params.peers;
    if (blockIdx.x != 0 || threadIdx.x >= peers.ranks || peers.ranks == 1) return;
    const uint32_t epoch = static_cast<uint32_t>(state_word(peers, kStateOpEpoch));
    for (int i = 0; i < params.num_pulls; ++i) {
        signal(peers, threadIdx.x, peers.layout.pulled, params.pulls[i].buffer * peers.ranks + peers.rank,
               epoch_word(epoch));
    }
}

template <Pass kPass>
__global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    fused_kernel(const __grid_constant__ FusedParams params) {
    extern __shared__ __align__(1024) uint8_t memory[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(memory);
    if (params.plan_control[kPlanCode] != static_cast<int>(PlanCode::kGood)) return give_up_pulls(params);
    if (threadIdx.x == 0) init_barriers(shared);
    if (warp_index() == 0) {
        for (int i = 0; i < params.order.products; ++i) {
            if (params.products[i].wanted) acquire_maps(params.products[i]);
        }
    }
    __syncwarp();
    ptx::cluster_sync();

    const int rank = static_cast<int>(ptx::cluster_rank());
    if (warpgroup_index() == 0) {
        ptx::give_registers<kProducerRegisters>();
        if (warp_index() == 0) fused_loader<kPass>(shared, params, rank);
        if (warp_index() == 1 && rank == 0) fused_scheduler<kPass>(shared, params);
        if (warp_index() == 2) fused_storer<kPass>(shared, params, rank);
        if (is_mover(warp_index(), rank)) fused_mover<kPass>(params);
    } else {
        ptx::take_registers<kMathRegisters>();
        fused_math<kPass>(shared, params, warpgroup_index() - 1, rank);
    }
    leave();
}

// On each device before the first launch there.
template <Pass kPass>
cudaError_t load_fused_kernel() {
    const cudaError_t error = load_kernels(fused_kernel<kPass>);
    if (error != cudaSuccess) return error;
    constexpr auto kSharedBytes = cudaFuncAttributeMaxDynamicSharedMemorySize;
    return cudaFuncSetAttribute(fused_kernel<kPass>, kSharedBytes, sizeof(SharedStorage));
}

template <Pass kPass>
cudaError_t launch_fused_kernel(const FusedParams& params, int num_sms, cudaStream_t stream) {
    const int ctas = num_sms / kClusterSize * kClusterSize;
    fused_kernel<kPass><<<ctas, kThreads, sizeof(SharedStorage), stream>>>(params);
    return cudaGetLastError();
}

}  // namespace megamoe
