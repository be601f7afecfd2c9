// Operator schemas and tensor checks of the workspace, the plan, dispatch and combine; nothing else.
#include <torch/csrc/stable/library.h>

#include "host/torch_args.hpp"

namespace {

using megamoe::floats;
using megamoe::handle_of;
using megamoe::ints;
using megamoe::longs;
using megamoe::OptionalTensor;
using megamoe::rows_of;
using megamoe::ScalarType;
using megamoe::Tensor;

// shape: int64 [5] R, E, K, H, T; out: int64 [15]. Both on the CPU.
void workspace_layout(Tensor shape, Tensor out) {
    megamoe::write_workspace_layout(longs(shape, 5, "shape"), longs(out, megamoe::kLayoutInts, "out"));
}

// out: int64 [8] on the CPU. slots = T * K.
void plan_layout(int64_t ranks, int64_t experts, int64_t slots, Tensor out) {
    megamoe::write_plan_layout(ranks, experts, slots, longs(out, megamoe::kPlanLayoutInts, "out"));
}

void plan(int64_t phase, Tensor handle, Tensor ids, int64_t row_tile, int64_t capacity, Tensor tables,
          OptionalTensor source_of, int64_t status, int64_t stream) {
    const auto args = megamoe::plan_args(handle_of(handle), ids, row_tile, capacity, tables, source_of, status, stream);
    megamoe::run_plan(static_cast<megamoe::PlanPhase>(phase), args);
}

void rows(int64_t phase, Tensor handle, int64_t op, int64_t buffer, int64_t tokens, int64_t capacity, Tensor tables,
          OptionalTensor source_of, OptionalTensor pool, OptionalTensor tokens_in, OptionalTensor tokens_out,
          OptionalTensor weights, OptionalTensor row_weights, OptionalTensor dweights, Tensor control, int64_t num_sms,
          int64_t stream) {
    megamoe::RowsArgs args{};
    args.workspace = handle_of(handle);
    const int64_t hidden = args.workspace.hidden, slots = tokens * args.workspace.top_k;
    args.op = static_cast<int>(op);
    args.buffer = static_cast<int>(buffer);
    args.tokens = tokens;
    args.plan = megamoe::plan_of(args.workspace, tokens, capacity, tables, source_of);
    args.pool = rows_of(pool, hidden, capacity, "pool");
    args.tokens_in = rows_of(tokens_in, hidden, tokens, "tokens_in");
    args.tokens_out = rows_of(tokens_out, hidden, tokens, "tokens_out");
    args.weights = floats(weights, slots, "weights");
    args.row_weights = floats(row_weights, capacity, "row_weights");
    args.dweights = floats(dweights, slots, "dweights");
    const bool pulls = static_cast<megamoe::RowsPhase>(phase) == megamoe::RowsPhase::kPull && args.workspace.ranks > 1;
    const int64_t per_rank = args.workspace.tokens * args.workspace.top_k;
    args.control = ints(control, 4 + (pulls ? args.workspace.ranks * per_rank : 0), "control");
    args.num_sms = static_cast<int>(num_sms);
    args.stream = reinterpret_cast<cudaStream_t>(stream);
    megamoe::run_rows(static_cast<megamoe::RowsPhase>(phase), args);
}

// map bool, probs fp32 [T, E] -> ids int32, weights fp32 [T, K].
void routing(Tensor map, Tensor probs, Tensor ids, Tensor weights, int64_t stream) {
    STD_TORCH_CHECK(map.dim() == 2 && ids.dim() == 2 && ids.size(0) == map.size(0),
                    "megamoe: map must be [T, E], ids [T, K]");
    megamoe::RoutingArgs args{};
    args.map = megamoe::elements<void>(map, ScalarType::Bool, 0, "map");
    args.probs = megamoe::elements<float>(probs, ScalarType::Float, map.numel(), "probs");
    args.ids = ints(ids, 0, "ids");
    args.weights = megamoe::elements<float>(weights, ScalarType::Float, ids.numel(), "weights");
    args.tokens = map.size(0), args.experts = map.size(1), args.top_k = ids.size(1);
    args.stream = reinterpret_cast<cudaStream_t>(stream);
    megamoe::run_routing(args);
}

void bulk_copy(int64_t source, int64_t target, int64_t bytes, int64_t num_sms, int64_t stream) {
    megamoe::run_copy(source, target, bytes, static_cast<int>(num_sms), reinterpret_cast<cudaStream_t>(stream));
}

void abort_peers(Tensor handle, int64_t stream) {
    megamoe::run_abort(handle_of(handle), reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megamoe, m) {
    m.def("workspace_layout(Tensor shape, Tensor(a!) out) -> ()");
    m.def("plan_layout(int ranks, int experts, int slots, Tensor(a!) out) -> ()");
    m.def(
        "plan(int phase, Tensor handle, Tensor ids, int row_tile, int capacity, Tensor(a!) tables,"
        " Tensor(b!)? source_of, int status, int stream) -> ()");
    m.def(
        "rows(int phase, Tensor handle, int op, int buffer, int tokens, int capacity, Tensor tables, Tensor? source_of,"
        " Tensor(a!)? pool, Tensor? tokens_in, Tensor(b!)? tokens_out, Tensor? weights, Tensor(c!)? row_weights,"
        " Tensor(d!)? dweights, Tensor(e!) control, int num_sms, int stream) -> ()");
    m.def("routing(Tensor map, Tensor probs, Tensor(a!) ids, Tensor(b!) weights, int stream) -> ()");
    m.def("bulk_copy(int source, int target, int bytes, int num_sms, int stream) -> ()");
    m.def("abort_peers(Tensor handle, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megamoe, CompositeExplicitAutograd, m) { m.impl("bulk_copy", TORCH_BOX(&bulk_copy)); }

STABLE_TORCH_LIBRARY_IMPL(megamoe, CPU, m) {
    m.impl("workspace_layout", TORCH_BOX(&workspace_layout));
    m.impl("plan_layout", TORCH_BOX(&plan_layout));
    m.impl("abort_peers", TORCH_BOX(&abort_peers));
}

STABLE_TORCH_LIBRARY_IMPL(megamoe, CUDA, m) {
    m.impl("plan", TORCH_BOX(&plan));
    m.impl("rows", TORCH_BOX(&rows));
    m.impl("routing", TORCH_BOX(&routing));
}
