// The sum role of the fused kernels, among warps that stand in for the others: of each CTA one pushes row tiles as the
// storers do, one is a mover, two are math warps that have no more units.
#include <torch/csrc/stable/library.h>

#include "comm/counters.cuh"
#include "host/checks.hpp"
#include "host/torch_args.hpp"
#include "roles/sum.cuh"

namespace megamoe {
namespace {

struct SumsParams {
    FusedParams fused;
    const uint8_t* pool;
    const float* row_dweights;
};

void push_tile(const SumsParams& params, int tile) {
    const FusedParams& fused = params.fused;
    const Peers& peers = fused.peers;
    for (int row = tile * kRowTile + (threadIdx.x & 31); row < (tile + 1) * kRowTile; row += 32) {
        const RowSource source = decode_source(fused.source_of[row]);
        if (source.rank < 0) continue;
        const int token = source.flat / fused.top_k, k = source.flat % fused.top_k;
        uint8_t* slot = combine_slot(peers, source.rank, token, k);
        for (int at = 0; at < fused.row_bytes; at += 16) {
            ptx::store_v4(slot + at, ptx::load_v4(params.pool + int64_t{row} * fused.row_bytes + at));
            if (at % 256 == 0) emulator::yield();
        }
        slot_dweight(peers, source.rank, source.flat) = params.row_dweights[row];
    }
    __syncwarp();
    if ((threadIdx.x & 31) != 0) return;
    ptx::fence_acq_rel_sys();
    const uint32_t epoch = static_cast<uint32_t>(state_word(peers, kStateOpEpoch));
    for (int r = 0; r < peers.ranks; ++r) ptx::store_release_sys(tile_flag(peers, r, peers.rank, tile), epoch);
}

void push_tiles(const SumsParams& params, int tiles, uint64_t& seen) {
    wait_for_all_peers(params.fused.peers, expected_ready(params.fused), seen);
    while (true) {
        const int claimed = (threadIdx.x & 31) == 0 ? atomicAdd(params.fused.counters.units, 1) : 0;
        const int tile = __shfl_sync(0xffffffffu, claimed, 0);
        if (tile >= tiles) return;
        push_tile(params, tile);
    }
}

__global__ void sums_kernel(const __grid_constant__ SumsParams params) {
    const FusedParams& fused = params.fused;
    const int tiles = *fused.num_rows / kRowTile, warp = threadIdx.x / 32;
    uint64_t seen = 0;
    if (warp == 0) return push_tiles(params, tiles, seen);
    if (warp == 1) {
        sum_in_sweeps<6, 1, 2>(fused, seen);
        return;
    }
    if ((threadIdx.x & 31) == 0) wait_counter(fused.peers, fused.counters.units, tiles, Waiting::kTileMade);
    __syncwarp();
    sum_in_turns<4, 2>(fused, seen);
}

// counters: int32, zeros. The rest as in bindings_comm.cpp: rows.
void sums(Tensor handle, int64_t capacity, Tensor tables, OptionalTensor source_of, Tensor pool, Tensor row_dweights,
          Tensor out, Tensor dweights, Tensor counters, int64_t ctas, int64_t stream) {
    const WorkspaceHandle workspace = handle_of(handle);
    const int64_t tokens = out.size(0), blocks = (tokens + 31) / 32;
    const PlanPointers plan = plan_of(workspace, tokens, capacity, tables, source_of);
    SumsParams params{};
    params.pool = static_cast<const uint8_t*>(rows_of(pool, workspace.hidden, capacity, "pool"));
    params.row_dweights = floats(row_dweights, capacity, "row_dweights");
    FusedParams& fused = params.fused;
    fused.peers = peers_of(workspace);
    fused.op = Op::kCombineBackward;
    fused.plan_control = plan.control;
    fused.source_of = reinterpret_cast<const long long*>(plan.source_of);
    fused.num_rows = plan.expert_offset + workspace.experts / workspace.ranks;
    fused.slot_of = reinterpret_cast<const long long*>(plan.slot_of);
    fused.ids = plan.topk_ids;
    fused.tokens = static_cast<int>(tokens), fused.top_k = static_cast<int>(workspace.top_k);
    fused.experts = static_cast<int>(workspace.experts), fused.row_bytes = static_cast<int>(2 * workspace.hidden);
    fused.tokens_out = static_cast<uint8_t*>(rows_of(out, workspace.hidden, tokens, "out"));
    fused.dweights = floats(dweights, tokens * workspace.top_k, "dweights");
    fused.counters.units = ints(counters, kFusedScalars + blocks, "counters");
    fused.counters.turns = fused.counters.units + 1;
    fused.counters.taken = reinterpret_cast<unsigned*>(fused.counters.units + kFusedScalars);
    sums_kernel<<<static_cast<unsigned>(ctas), 128, 0, reinterpret_cast<cudaStream_t>(stream)>>>(params);
}

}  // namespace
}  // namespace megamoe

STABLE_TORCH_LIBRARY_FRAGMENT(megamoe, m) {
    m.def(
        "sums(Tensor handle, int capacity, Tensor tables, Tensor? source_of, Tensor pool, Tensor row_dweights,"
        " Tensor(a!) out, Tensor(b!) dweights, Tensor(c!) counters, int ctas, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megamoe, CPU, m) { m.impl("sums", TORCH_BOX(&megamoe::sums)); }
