#include "host/fused.hpp"

#include <stdexcept>
#include <string>

#include "host/checks.hpp"
#include "host/clamp.hpp"
#include "host/tensor_map.hpp"
#include "host/trace.hpp"
#include "kernels/fused.hpp"
#include "kernels/rows.cuh"
#include "layout/scratch.cuh"
#include "roles/fused_params.cuh"

namespace megamoe {
namespace {

Pull pull_of(int buffer, const void* tokens, const float* weights, bool weighted, void* pool) {
    return {buffer, static_cast<const uint8_t*>(tokens), weights, weighted, static_cast<uint8_t*>(pool)};
}

FusedCounters counters_of(const FusedArgs& args) {
    static_assert(kFusedScalars == kCounterScalars && kDpTile == kTileN && kCounterTileRows == kRowTile);
    const int64_t tiles = args.capacity / kRowTile;
    FusedCounters counters{};
    int* next = args.counters;
    counters.units = next;
    counters.pulls = next + 1;
    counters.pulled = next + 3;
    counters.turns = next + 5;
    counters.frontier = next + 7;
    counters.stagings = next + 9;
    counters.staged = next + 10;
    next += kFusedScalars;
    counters.arrived = next, next += 2 * tiles;
    counters.made = next, next += tiles;
    counters.pushed = next, next += tiles;
    counters.taken = reinterpret_cast<unsigned*>(next);
    return counters;
}

// What all products have.
GemmParams product_of(int which, const FusedArgs& args) {
    const int inter = static_cast<int>(args.inter), hidden = static_cast<int>(args.workspace.hidden);
    const ProductShape shape = product_shape(args.pass, which, inter, hidden);
    GemmParams product{};
    product.gemm = shape.gemm;
    product.m_extent = shape.m_extent;
    product.n_extent = shape.n_extent;
    product.expert_rows = args.plan.expert_rows;
    product.expert_offset = args.plan.expert_offset;
    product.num_experts = static_cast<int>(args.workspace.experts / args.workspace.ranks);
    product.limit = clamp_pair(args.limit);
    product.deadline = deadline_of(args.workspace);
    product.row_weights = args.row_weights;
    product.wanted = 1;
    product.trace = trace_buffer();
    return product;
}

CUtensorMap map_of(MapKind kind, const void* pool, const FusedArgs& args, int64_t columns) {
    return make_tensor_map(kind, pool, args.capacity, columns);
}

void forward_products(const FusedArgs& args, GemmParams* products) {
    const int64_t hidden = args.workspace.hidden, inter = args.inter;
    GemmParams& fc1 = products[kProductFc1] = product_of(kProductFc1, args);
    fc1.a = map_of(MapKind::kActivation, args.pool, args, hidden);
    fc1.out = map_of(MapKind::kOutput, args.h, args, 2 * inter);
    fc1.act = map_of(MapKind::kOutput, args.act, args, inter);
    fc1.expert_maps = static_cast<const CUtensorMap*>(args.maps[0]);
    fc1.k_blocks = static_cast<int>(hidden / kBlockK);
    GemmParams& fc2 = products[kProductFc2] = product_of(kProductFc2, args);
    fc2.a = map_of(MapKind::kActivation, args.act, args, inter);
    fc2.expert_maps = static_cast<const CUtensorMap*>(args.maps[1]);
    fc2.k_blocks = static_cast<int>(inter / kBlockK);
}

// `which`: 0 for fc2's gradient, 1 for fc1's.
GemmParams wgrad_of(const FusedArgs& args, int which, const void* left, const void* right) {
    GemmParams wgrad = product_of(kProductWgrad2 + which, args);
    wgrad.wanted = args.gradient_maps[which] != nullptr;
    if (!wgrad.wanted) return wgrad;
    wgrad.a = map_of(MapKind::kOperandMN, left, args, wgrad.m_extent);
    wgrad.b = map_of(MapKind::kWeightMN, right, args, wgrad.n_extent);
    wgrad.expert_maps = static_cast<const CUtensorMap*>(args.gradient_maps[which]);
    wgrad.gradients = args.gradients[which];
    wgrad.accumulate = args.accumulate[which];
    return wgrad;
}

void backward_products(const FusedArgs& args, GemmParams* products) {
    const int64_t hidden = args.workspace.hidden, inter = args.inter;
    GemmParams& dgrad2 = products[kProductDgrad2] = product_of(kProductDgrad2, args);
    dgrad2.a = map_of(MapKind::kActivation, args.pool, args, hidden);
    dgrad2.b = map_of(MapKind::kWeight, args.h, args, 2 * inter);
    dgrad2.out = map_of(MapKind::kOutput, args.h, args, 2 * inter);  // dh: each tile where its h was
    dgrad2.act = map_of(MapKind::kOutput, args.act, args, inter);
    dgrad2.expert_maps = static_cast<const CUtensorMap*>(args.maps[0]);
    dgrad2.dp_partials = args.dp_partials;
    dgrad2.k_blocks = static_cast<int>(hidden / kBlockK);
    GemmParams& dgrad1 = products[kProductDgrad1] = product_of(kProductDgrad1, args);
    dgrad1.a = map_of(MapKind::kActivation, args.h, args, 2 * inter);
    dgrad1.expert_maps = static_cast<const CUtensorMap*>(args.maps[1]);
    dgrad1.k_blocks = static_cast<int>(2 * inter / kBlockK);
    products[kProductWgrad2] = wgrad_of(args, 0, args.pool, args.act);
    products[kProductWgrad1] = wgrad_of(args, 1, args.h, args.second_pool);
}

// A bit per staging buffer that this operation fills: dY in 1, x in 0.
unsigned staged_buffers(const FusedArgs& args) {
    return is_backward(args.pass) ? 2u | (args.second_pool != nullptr ? 1u : 0u) : 1u;
}

void pulls_of(const FusedArgs& args, FusedParams& params) {
    params.staged = staged_buffers(args);
    if (!is_backward(args.pass)) {
        params.pulls[0] = pull_of(0, args.x, args.weights, true, args.pool);
        params.num_pulls = 1;
        return;
    }
    params.pulls[0] = pull_of(1, args.dy, args.weights, true, args.pool);
    params.pulls[1] = pull_of(0, args.x, nullptr, false, args.second_pool);
    params.num_pulls = args.second_pool == nullptr ? 1 : 2;
}

StageParams staging_of(const FusedArgs& args) {
    StageParams stage{};
    stage.peers = peers_of(args.workspace);
    stage.row_bytes = 2 * args.workspace.hidden;
    stage.tokens = static_cast<int>(args.tokens);
    stage.top_k = static_cast<int>(args.workspace.top_k);
    stage.buffers = staged_buffers(args);
    // x of backward's second pull: roles/stage.cuh.
    stage.rows = is_backward(args.pass) ? StagedRows{1, args.dy, args.weights} : StagedRows{0, args.x, args.weights};
    return stage;
}

using Launch = cudaError_t(const FusedParams&, int, cudaStream_t);

Launch* launcher_of(Pass pass) {
    if (pass == Pass::kForward) return launch_forward;
    return pass == Pass::kBackward ? launch_backward : launch_backward_bf16;
}

}  // namespace

void preload_kernels() {
    check(load_plan_kernels(), "loading the plan's kernels");
    check(load_dispatch_kernels(), "loading dispatch's kernels");
    check(load_combine_kernels(), "loading combine's kernels");
    check(load_forward_kernel(), "loading the fused forward");
    check(load_backward_kernel(), "loading the fused backward");
    check(load_backward_bf16_kernel(), "loading the fused backward with gradients in bf16");
}

void stage_fused(const FusedArgs& args) {
    require(args.tokens <= args.workspace.tokens, "T", args.tokens, "at most the workspace's tokens");
    if (args.workspace.ranks > 1) check(launch_stage(staging_of(args), args.stream), "staging rows");
}

void announce_fused(const FusedArgs& args) {
    RowsParams rows{};
    rows.peers = peers_of(args.workspace);
    rows.op = is_backward(args.pass) ? Op::kBackward : Op::kForward;
    rows.plan_control = args.plan.control;
    rows.control = args.counters;
    rows.control_ints = static_cast<int>(counter_ints(args.capacity, args.tokens));
    check(launch_announce(rows, staged_buffers(args), args.stream), "launching announce");
}

void run_fused(const FusedArgs& args) {
    require(args.tokens <= args.workspace.tokens, "T", args.tokens, "at most the workspace's tokens");
    require(args.capacity > 0 && args.capacity % kRowTile == 0, "pool rows", args.capacity, "multiples of 128");
    require((args.second_pool != nullptr) == (args.gradient_maps[1] != nullptr), "second_pool given",
            args.second_pool != nullptr, "together with the gradients of fc1");
    require(args.inter > 0 && args.inter % 128 == 0, "I", args.inter, "multiples of 128");
    require(args.pass != Pass::kBackwardBf16 || (!args.accumulate[0] && !args.accumulate[1]), "accumulate", 1,
            "0: weight gradients in bf16 are written, never added to");
    const int sms = args.num_sms > 0 ? args.num_sms : sm_count(), clusters = sms / kClusterSize;
    require(clusters >= 1, "num_sms", sms, "at least 2");
    const int local = static_cast<int>(args.workspace.experts / args.workspace.ranks);
    require(local <= kMaxExperts, "local experts", local, "1..512");
    // What an even routing gives an expert.
    const int rows = static_cast<int>(args.workspace.tokens * args.workspace.top_k / local);
    const int inter = static_cast<int>(args.inter), hidden = static_cast<int>(args.workspace.hidden);

    FusedParams params{};
    if (is_backward(args.pass)) {
        backward_products(args, params.products);
        params.order = backward_order(local, rows, inter, clusters);
    } else {
        forward_products(args, params.products);
        params.order = forward_order(local);
    }
    pulls_of(args, params);
    params.peers = peers_of(args.workspace);
    params.op = is_backward(args.pass) ? Op::kBackward : Op::kForward;
    params.plan_control = args.plan.control;
    params.source_of = reinterpret_cast<const long long*>(args.plan.source_of);
    params.num_rows = args.plan.expert_offset + local;
    params.slot_of = reinterpret_cast<const long long*>(args.plan.slot_of);
    params.ids = args.plan.topk_ids;
    params.tokens = static_cast<int>(args.tokens);
    params.top_k = static_cast<int>(args.workspace.top_k);
    params.experts = static_cast<int>(args.workspace.experts);
    params.row_bytes = 2 * hidden;
    params.claim_rows = claim_rows(params.row_bytes);
    params.first_rows = first_rows(params.products[0].gemm, params.products[0].n_extent, clusters);
    params.pull_lead = pull_lead(rows, params.row_bytes);
    params.tiles = static_cast<int>(args.capacity / kRowTile);
    params.row_weights = args.row_weights;
    params.tokens_out = static_cast<uint8_t*>(args.tokens_out);
    params.dweights = args.dweights;
    params.counters = counters_of(args);
    check(launcher_of(args.pass)(params, sms, args.stream), "launching the fused kernel");
}

}  // namespace megamoe
