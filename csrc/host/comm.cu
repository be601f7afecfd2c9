#include "host/comm.hpp"

#include <climits>
#include <cstring>
#include <stdexcept>
#include <string>

#include "host/checks.hpp"
#include "kernels/plan.cuh"
#include "kernels/routing.cuh"
#include "kernels/rows.cuh"
#include "layout/plan.cuh"
#include "schedule/grouped.cuh"

namespace megamoe {
namespace {

// Slots per CTA: enough for the warps to have work, few enough CTAs for the sum over them to be short.
int plan_chunk(int64_t slots) {
    const int64_t spread = (slots + kPlanMaxBlocks - 1) / kPlanMaxBlocks;
    const int64_t least = spread > kPlanSlotsPerCta ? spread : kPlanSlotsPerCta;
    return static_cast<int>((least + kPlanThreads - 1) / kPlanThreads * kPlanThreads);
}

int plan_blocks(int64_t slots) {
    const int chunk = plan_chunk(slots);
    return slots == 0 ? 1 : static_cast<int>((slots + chunk - 1) / chunk);
}

PlanLayout layout_for(int64_t ranks, int64_t experts, int64_t slots) {
    static_assert(kTableControlInts == kPlanControlInts);
    return plan_layout(ranks, experts, slots, plan_blocks(slots));
}

// As many SMs again for the rank's own rows, where there are peers and so many SMs.
cudaError_t pull(const RowsParams& params, int num_sms, cudaStream_t stream) {
    const bool more = params.peers.ranks > 1 && num_sms <= sm_count() / 2;
    return launch_pull(params, more ? 2 * num_sms : num_sms, num_sms, stream);
}

PlanLayout layout_for(const WorkspaceHandle& workspace, int64_t tokens) {
    return layout_for(workspace.ranks, workspace.experts, tokens * workspace.top_k);
}

}  // namespace

void write_workspace_layout(const int64_t* shape, int64_t* out) {
    const WorkspaceLayout layout = workspace_layout({shape[0], shape[1], shape[2], shape[3], shape[4]});
    const int64_t* offsets = &layout.state;
    static_assert(offsetof(WorkspaceLayout, shape) == kLayoutInts * 8);
    for (int i = 0; i < kLayoutInts; ++i) out[i] = offsets[i];
}

void write_plan_layout(int64_t ranks, int64_t experts, int64_t slots, int64_t* out) {
    require(ranks >= 1 && experts >= 1, "ranks", ranks, "1 or more, as experts");
    const PlanLayout layout = layout_for(ranks, experts, slots);
    static_assert(sizeof(layout) == kPlanLayoutInts * sizeof(*out));
    std::memcpy(out, &layout, sizeof(layout));
}

int64_t plan_bytes(const WorkspaceHandle& workspace, int64_t tokens) { return layout_for(workspace, tokens).source_of; }

PlanPointers plan_pointers(const WorkspaceHandle& workspace, int64_t tokens, void* tables, int64_t* source_of) {
    const PlanLayout layout = layout_for(workspace, tokens);
    const auto ints = [tables](int64_t offset) { return static_cast<int*>(tables) + offset / 4; };
    const auto longs = [tables](int64_t offset) { return static_cast<int64_t*>(tables) + offset / 8; };
    return {ints(layout.control),      ints(layout.counts),
            ints(layout.expert_rows),  ints(layout.expert_offset),
            ints(layout.block_counts), ints(layout.topk_ids),
            longs(layout.slot_of),     source_of != nullptr ? source_of : longs(layout.source_of)};
}

void run_plan(PlanPhase phase, const PlanArgs& args) {
    const int64_t slots = args.tokens * args.workspace.top_k;
    PlanParams params{};
    params.peers = peers_of(args.workspace);
    require(args.tokens <= args.workspace.tokens, "T", args.tokens, "at most the workspace's tokens");
    params.ids = args.ids;
    params.wide_ids = args.wide_ids;
    params.slots = static_cast<int>(slots);
    params.experts = static_cast<int>(args.workspace.experts);
    params.chunk = plan_chunk(slots);
    params.blocks = plan_blocks(slots);
    require(args.row_tile == 1 || args.row_tile == kRowTile, "row_tile", args.row_tile, "1, 128");
    params.row_tile = args.row_tile;
    params.capacity = static_cast<int>(args.capacity < INT_MAX ? args.capacity : INT_MAX);
    params.block_counts = args.plan.block_counts;
    params.control = args.plan.control;
    params.status = reinterpret_cast<PlanStatus*>(args.status);
    params.slot_of = reinterpret_cast<long long*>(args.plan.slot_of);
    params.ids_out = args.plan.topk_ids;
    params.counts = args.plan.counts;
    params.expert_rows = args.plan.expert_rows;
    params.expert_offset = args.plan.expert_offset;
    params.source_of = reinterpret_cast<long long*>(args.plan.source_of);
    switch (phase) {
        case PlanPhase::kCount: return check(launch_plan_count(params, args.stream), "launching plan_count");
        case PlanPhase::kPlace: return check(launch_plan_place(params, args.stream), "launching plan_place");
        case PlanPhase::kSources: return check(launch_plan_sources(params, args.stream), "launching plan_sources");
        case PlanPhase::kAll:
            require(args.plan.source_of != nullptr, "source_of given", 0, "1, for the whole plan in one call");
            check(launch_plan_count(params, args.stream), "launching plan_count");
            check(launch_plan_place(params, args.stream), "launching plan_place");
            if (params.peers.ranks == 1) return;
            return check(launch_plan_sources(params, args.stream), "launching plan_sources");
    }
    throw std::runtime_error("megamoe: unknown phase of a plan");
}

void run_rows(RowsPhase phase, const RowsArgs& args) {
    RowsParams params{};
    params.peers = peers_of(args.workspace);
    require(args.tokens <= args.workspace.tokens, "T", args.tokens, "at most the workspace's tokens");
    require(args.buffer >= 0 && args.buffer < kStagingBuffers, "buffer", args.buffer, "0, 1");
    params.cut = cut_rows(static_cast<int>(args.workspace.hidden));
    params.op = static_cast<Op>(args.op);
    params.buffer = args.buffer;
    params.top_k = static_cast<int>(args.workspace.top_k);
    params.tokens = static_cast<int>(args.tokens);
    params.experts = static_cast<int>(args.workspace.experts);
    params.plan_control = args.plan.control;
    params.source_of = reinterpret_cast<const long long*>(args.plan.source_of);
    params.row_of = args.control + kRowsControlInts;
    params.num_rows = args.plan.expert_offset + args.workspace.experts / args.workspace.ranks;
    params.slot_of = reinterpret_cast<const long long*>(args.plan.slot_of);
    params.ids = args.plan.topk_ids;
    params.pool = static_cast<uint8_t*>(args.pool);
    params.tokens_in = static_cast<uint8_t*>(args.tokens_in);
    params.tokens_out = static_cast<uint8_t*>(args.tokens_out);
    params.weights = args.weights;
    params.row_weights = args.row_weights;
    params.dweights = args.dweights;
    params.control = args.control;
    params.control_ints = kRowsControlInts;
    const int num_sms = args.num_sms > 0 ? args.num_sms : sm_count();
    switch (phase) {
        case RowsPhase::kStage:
            return check(launch_stage({params.peers,
                                       params.cut.row_bytes,
                                       params.tokens,
                                       params.top_k,
                                       1u << params.buffer,
                                       {params.buffer, params.tokens_in, params.weights}},
                                      args.stream),
                         "launching stage");
        case RowsPhase::kAnnounceStaged:
            return check(launch_announce(params, 1u << params.buffer, args.stream), "launching announce");
        case RowsPhase::kAnnounce: return check(launch_announce(params, 0, args.stream), "launching announce");
        case RowsPhase::kPull: return check(pull(params, num_sms, args.stream), "launching dispatch's pull");
        case RowsPhase::kPush: return check(launch_push(params, num_sms, args.stream), "launching combine's push");
        case RowsPhase::kSum: return check(launch_sum(params, args.stream), "launching combine's sum");
    }
    throw std::runtime_error("megamoe: unknown phase of a dispatch or combine");
}

void run_routing(const RoutingArgs& args) {
    require(args.tokens <= INT_MAX && args.experts >= 1 && args.experts <= INT_MAX, "experts", args.experts, "1..2^31");
    require(args.top_k >= 1 && args.top_k <= args.experts, "top_k", args.top_k, "1..experts");
    const RoutingParams params{static_cast<const unsigned char*>(args.map),
                               args.probs,
                               args.ids,
                               args.weights,
                               static_cast<int>(args.tokens),
                               static_cast<int>(args.experts),
                               static_cast<int>(args.top_k)};
    check(launch_routing(params, args.stream), "launching routing");
}

void run_copy(int64_t source, int64_t target, int64_t bytes, int num_sms, cudaStream_t stream) {
    require(bytes % kMoverStageBytes == 0, "bytes", bytes, "multiples of 8192");
    const Deadline deadline{10'000'000'000ull, nullptr, 0};
    check(launch_copy(reinterpret_cast<const void*>(source), reinterpret_cast<void*>(target), bytes / kMoverStageBytes,
                      num_sms > 0 ? num_sms : sm_count(), deadline, stream),
          "launching copy");
}

void run_abort(const WorkspaceHandle& workspace, cudaStream_t stream) {
    check(launch_abort(peers_of(workspace), stream), "launching abort");
}

}  // namespace megamoe
