// All that travels in a fused forward, without its products: rows are pulled, each is multiplied by its weight in the
// place of both products, pushed, and summed. Of each CTA one warp stands in for scheduler, products and storer, one is
// a mover, two are math warps.
#include <torch/csrc/stable/library.h>

#include "comm/counters.cuh"
#include "host/checks.hpp"
#include "host/torch_args.hpp"
#include "roles/pull.cuh"
#include "roles/sum.cuh"

namespace megamoe {
namespace {

constexpr int kFirstRows = 100;  // that math warps help to pull

// 16 bytes of a row times its weight.
uint4 weighted(uint4 row, float weight) {
    float values[8];
    add_bf16(values, row, true);
    for (float& value : values) value *= weight;
    return round_bf16(values);
}

void push_tile(const FusedParams& params, int tile) {
    const Peers& peers = params.peers;
    for (int row = tile * kRowTile + (threadIdx.x & 31); row < (tile + 1) * kRowTile; row += 32) {
        const RowSource source = decode_source(params.source_of[row]);
        if (source.rank < 0) continue;
        const int token = source.flat / params.top_k, k = source.flat % params.top_k;
        const uint8_t* from = params.pulls[0].pool + int64_t{row} * params.row_bytes;
        const float weight = params.row_weights[row];
        for (int at = 0; at < params.row_bytes; at += 16) {
            ptx::store_v4(combine_slot(peers, source.rank, token, k) + at, weighted(ptx::load_v4(from + at), weight));
            if (at % 256 == 0) emulator::yield();
        }
        slot_dweight(peers, source.rank, source.flat) = weight;
    }
    __syncwarp();
    if ((threadIdx.x & 31) != 0) return;
    ptx::fence_acq_rel_sys();
    const uint32_t epoch = static_cast<uint32_t>(state_word(peers, kStateOpEpoch));
    for (int r = 0; r < peers.ranks; ++r) ptx::store_release_sys(tile_flag(peers, r, peers.rank, tile), epoch);
}

void work(const FusedParams& params, int tiles, uint64_t& seen) {
    const int lane = threadIdx.x & 31, *offset = params.products[0].expert_offset;
    int expert = 0;
    while (true) {
        const int claimed = lane == 0 ? atomicAdd(params.counters.units, 1) : 0;
        const int tile = __shfl_sync(0xffffffffu, claimed, 0);
        if (tile >= tiles) return;
        while (tile * kRowTile >= offset[expert + 1]) ++expert;
        if (lane == 0) {
            atomicMax(params.counters.frontier, expert);
            wait_counter(params.peers, params.counters.arrived + tile, kRowTile, Waiting::kRowsArrived);
        }
        __syncwarp();
        wait_for_all_peers(params.peers, expected_ready(params), seen);
        push_tile(params, tile);
    }
}

__global__ void travel_kernel(const __grid_constant__ FusedParams params) {
    const int warp = threadIdx.x / 32;
    uint64_t seen = 0;
    if (warp == 0) return work(params, params.tiles, seen);
    if (warp == 1) {
        pull_rows<4>(params, 0, kAllRows, seen);
        sum_in_sweeps<6, 1, 2>(params, seen);
        return;
    }
    pull_rows<8>(params, 0, kFirstRows, seen);
    if ((threadIdx.x & 31) == 0) {
        wait_counter(params.peers, params.counters.units, params.tiles, Waiting::kTileMade);
    }
    __syncwarp();
    sum_in_turns<4, 2>(params, seen);
}

// x bf16 [T, H], weights fp32 [T, K] as staged; pool, row_weights [capacity]; out [T, H], dweights [T, K]; counters:
// int32, zeros.
void travel(Tensor handle, int64_t capacity, Tensor tables, OptionalTensor source_of, Tensor x, Tensor weights,
            Tensor pool, Tensor row_weights, Tensor out, Tensor dweights, Tensor counters, int64_t rows, int64_t ctas,
            int64_t stream) {
    const WorkspaceHandle workspace = handle_of(handle);
    const int64_t tokens = out.size(0), slots = tokens * workspace.top_k;
    const PlanPointers plan = plan_of(workspace, tokens, capacity, tables, source_of);
    FusedParams params{};
    params.peers = peers_of(workspace);
    params.op = Op::kForward, params.staged = 1;
    params.plan_control = plan.control;
    params.source_of = reinterpret_cast<const long long*>(plan.source_of);
    params.num_rows = plan.expert_offset + workspace.experts / workspace.ranks;
    params.products[0].expert_offset = plan.expert_offset;
    params.slot_of = reinterpret_cast<const long long*>(plan.slot_of);
    params.ids = plan.topk_ids;
    params.tokens = static_cast<int>(tokens), params.top_k = static_cast<int>(workspace.top_k);
    params.experts = static_cast<int>(workspace.experts), params.row_bytes = static_cast<int>(2 * workspace.hidden);
    params.claim_rows = claim_rows(params.row_bytes), params.pull_lead = 1;
    params.tiles = static_cast<int>(rows / kRowTile);
    params.row_weights = const_cast<float*>(floats(row_weights, capacity, "row_weights"));
    const auto* from = static_cast<const uint8_t*>(rows_of(x, workspace.hidden, tokens, "x"));
    auto* to = static_cast<uint8_t*>(rows_of(pool, workspace.hidden, capacity, "pool"));
    params.pulls[0] = {0, from, floats(weights, slots, "weights"), true, to};
    params.num_pulls = 1;
    params.tokens_out = static_cast<uint8_t*>(rows_of(out, workspace.hidden, tokens, "out"));
    params.dweights = floats(dweights, slots, "dweights");
    int* next = ints(counters, kFusedScalars + params.tiles + (tokens + 31) / 32, "counters");
    params.counters.units = next, params.counters.pulls = next + 1, params.counters.pulled = next + 3;
    params.counters.turns = next + 5, params.counters.frontier = next + 7;
    params.counters.arrived = next + kFusedScalars;
    params.counters.taken = reinterpret_cast<unsigned*>(params.counters.arrived + params.tiles);
    travel_kernel<<<static_cast<unsigned>(ctas), 128, 0, reinterpret_cast<cudaStream_t>(stream)>>>(params);
}

}  // namespace
}  // namespace megamoe

STABLE_TORCH_LIBRARY_FRAGMENT(megamoe, m) {
    m.def(
        "travel(Tensor handle, int capacity, Tensor tables, Tensor? source_of, Tensor x, Tensor weights,"
        " Tensor(a!) pool, Tensor(b!) row_weights, Tensor(c!) out, Tensor(d!) dweights, Tensor(e!) counters, int rows,"
        " int ctas, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megamoe, CPU, m) { m.impl("travel", TORCH_BOX(&megamoe::travel)); }
