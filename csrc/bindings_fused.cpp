// Operator schemas and tensor checks of the fused passes; nothing else.
#include <torch/csrc/stable/library.h>

#include "host/fused.hpp"
#include "host/torch_args.hpp"
#include "host/trace.hpp"

namespace {

using namespace megamoe;

const void* table(const OptionalTensor& maps, int64_t local, const char* name) {
    return maps ? elements<uint8_t>(*maps, ScalarType::Byte, local * 128, name) : nullptr;
}

float* const* address_table(const OptionalTensor& addresses, int64_t local, const char* name) {
    return addresses ? reinterpret_cast<float* const*>(longs(*addresses, local, name)) : nullptr;
}

// What both passes take.
FusedArgs common_args(const Tensor& handle, const Tensor& plan_control, const Tensor& source_of, const Tensor& slot_of,
                      const Tensor& ids, const Tensor& expert_rows, const Tensor& expert_offset, const Tensor& x,
                      const Tensor& weights, const Tensor& pool, const Tensor& h, const Tensor& act,
                      const Tensor& row_weights, const Tensor& tokens_out, double limit, const Tensor& counters,
                      int64_t num_sms, int64_t stream) {
    FusedArgs args{};
    args.workspace = handle_of(handle);
    const int64_t local = args.workspace.experts / args.workspace.ranks, hidden = args.workspace.hidden;
    args.tokens = x.size(0);
    args.capacity = pool.size(0);
    args.inter = act.size(1);
    const int64_t slots = args.tokens * args.workspace.top_k, capacity = args.capacity;
    args.plan_control = ints(plan_control, 8, "plan_control");
    args.source_of = longs(source_of, capacity, "source_of");
    args.slot_of = longs(slot_of, slots, "slot_of");
    args.ids = ints(ids, slots, "ids");
    args.expert_rows = ints(expert_rows, local, "expert_rows");
    args.expert_offset = ints(expert_offset, local + 1, "expert_offset");
    args.x = rows_of(x, hidden, args.tokens, "x");
    args.weights = floats(weights, slots, "weights");
    args.pool = rows_of(pool, hidden, capacity, "pool");
    args.h = rows_of(h, 2 * args.inter, capacity, "h");
    args.act = rows_of(act, args.inter, capacity, "act");
    args.row_weights = floats(row_weights, capacity, "row_weights");
    args.tokens_out = rows_of(tokens_out, hidden, args.tokens, "tokens_out");
    args.limit = static_cast<float>(limit);
    args.counters = ints(counters, 0, "counters");
    args.counters_size = counters.numel();
    args.num_sms = static_cast<int>(num_sms);
    args.stream = reinterpret_cast<cudaStream_t>(stream);
    return args;
}

// step 0: stage and announce; 1: the fused launch; 2: both.
void run_step(int64_t step, const FusedArgs& args) {
    if (step != 1) begin_fused(args);
    if (step != 0) run_fused(args);
}

void forward(int64_t step, Tensor handle, Tensor plan_control, Tensor source_of, Tensor slot_of, Tensor ids,
             Tensor expert_rows, Tensor expert_offset, Tensor x, Tensor weights, Tensor fc1_maps, Tensor fc2_maps,
             Tensor pool, Tensor h, Tensor act, Tensor row_weights, Tensor y, double limit, Tensor counters,
             int64_t num_sms, int64_t stream) {
    FusedArgs args = common_args(handle, plan_control, source_of, slot_of, ids, expert_rows, expert_offset, x, weights,
                                 pool, h, act, row_weights, y, limit, counters, num_sms, stream);
    const int64_t local = args.workspace.experts / args.workspace.ranks;
    args.maps[0] = table(fc1_maps, local, "fc1_maps");
    args.maps[1] = table(fc2_maps, local, "fc2_maps");
    run_step(step, args);
}

void backward(int64_t step, Tensor handle, Tensor plan_control, Tensor source_of, Tensor slot_of, Tensor ids,
              Tensor expert_rows, Tensor expert_offset, Tensor dy, Tensor x, Tensor weights, Tensor h, Tensor fc1_maps,
              Tensor fc2_maps, OptionalTensor dfc1_maps, OptionalTensor dfc1, OptionalTensor dfc2_maps,
              OptionalTensor dfc2, bool accumulate1, bool accumulate2, Tensor pool, OptionalTensor second_pool,
              Tensor act, Tensor dh, Tensor row_weights, Tensor dp_partials, Tensor dx, Tensor dweights, double limit,
              Tensor counters, int64_t num_sms, int64_t stream) {
    FusedArgs args = common_args(handle, plan_control, source_of, slot_of, ids, expert_rows, expert_offset, x, weights,
                                 pool, h, act, row_weights, dx, limit, counters, num_sms, stream);
    const int64_t local = args.workspace.experts / args.workspace.ranks, hidden = args.workspace.hidden;
    args.backward = true;
    args.maps[0] = table(fc2_maps, local, "fc2_maps");
    args.maps[1] = table(fc1_maps, local, "fc1_maps");
    args.gradient_maps[0] = table(dfc2_maps, local, "dfc2_maps");
    args.gradient_maps[1] = table(dfc1_maps, local, "dfc1_maps");
    args.gradients[0] = address_table(dfc2, local, "dfc2");
    args.gradients[1] = address_table(dfc1, local, "dfc1");
    args.accumulate[0] = accumulate2;
    args.accumulate[1] = accumulate1;
    STD_TORCH_CHECK(!dfc1_maps || second_pool, "megamoe: second_pool is needed for the gradient of fc1");
    args.dy = rows_of(dy, hidden, args.tokens, "dy");
    args.second_pool = rows_of(second_pool, hidden, args.capacity, "second_pool");
    args.dh = rows_of(dh, 2 * args.inter, args.capacity, "dh");
    args.dp_partials = floats(dp_partials, args.capacity * ((args.inter + 255) / 256), "dp_partials");
    args.dweights = floats(dweights, args.tokens * args.workspace.top_k, "dweights");
    run_step(step, args);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megamoe, m) {
    m.def("fused_counters(int capacity, int tokens) -> int");
    m.def("preload_kernels() -> ()");
    m.def("trace_size() -> int");
    m.def("set_trace(int address) -> ()");
    m.def(
        "fused_forward(int step, Tensor handle, Tensor plan_control, Tensor source_of, Tensor slot_of, Tensor ids,"
        " Tensor expert_rows, Tensor expert_offset, Tensor x, Tensor weights, Tensor fc1_maps, Tensor fc2_maps,"
        " Tensor(a!) pool, Tensor(b!) h, Tensor(c!) act, Tensor(d!) row_weights, Tensor(e!) y, float limit,"
        " Tensor(f!) counters, int num_sms, int stream) -> ()");
    m.def(
        "fused_backward(int step, Tensor handle, Tensor plan_control, Tensor source_of, Tensor slot_of, Tensor ids,"
        " Tensor expert_rows, Tensor expert_offset, Tensor dy, Tensor x, Tensor weights, Tensor h, Tensor fc1_maps,"
        " Tensor fc2_maps, Tensor? dfc1_maps, Tensor? dfc1, Tensor? dfc2_maps, Tensor? dfc2, bool accumulate1,"
        " bool accumulate2, Tensor(a!) pool, Tensor(b!)? second_pool, Tensor(c!) act, Tensor(d!) dh,"
        " Tensor(e!) row_weights, Tensor(f!) dp_partials, Tensor(g!) dx, Tensor(h!) dweights, float limit,"
        " Tensor(i!) counters, int num_sms, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megamoe, CompositeExplicitAutograd, m) {
    m.impl("fused_counters", TORCH_BOX(&megamoe::fused_counters));
    m.impl("preload_kernels", TORCH_BOX(&megamoe::preload_kernels));
    m.impl("trace_size", TORCH_BOX(&megamoe::trace_size));
    m.impl("set_trace", TORCH_BOX(&megamoe::set_trace));
}

STABLE_TORCH_LIBRARY_IMPL(megamoe, CUDA, m) {
    m.impl("fused_forward", TORCH_BOX(&forward));
    m.impl("fused_backward", TORCH_BOX(&backward));
}
