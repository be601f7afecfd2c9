// Operator schemas and tensor checks of the fused passes; nothing else.
#include <torch/csrc/stable/library.h>

#include "host/fused.hpp"
#include "host/torch_args.hpp"
#include "host/trace.hpp"
#include "layout/scratch.cuh"

namespace {

using namespace megamoe;

constexpr int64_t kMapBytes = 128;

// Which tensor maps of a layer's weights are where: ops_fused.py, WeightMaps.
enum WeightMaps : int { kFc1, kFc2, kFc1ForDgrad1, kFc2ForDgrad2, kWeightMaps };

int64_t local_experts(const FusedArgs& args) { return args.workspace.experts / args.workspace.ranks; }

uint8_t* bytes_of(const Tensor& tensor, int64_t least, const char* name) {
    return elements<uint8_t>(tensor, ScalarType::Byte, least, name);
}

// out: int64 [9] on the CPU, in the order of ScratchLayout.
void write_scratch_layout(int64_t capacity, int64_t tokens, int64_t hidden, int64_t inter, Tensor out) {
    const ScratchLayout layout = scratch_layout(capacity, tokens, hidden, inter);
    std::memcpy(longs(out, sizeof(layout) / 8, "out"), &layout, sizeof(layout));
}

ScratchLayout layout_of(const FusedArgs& args) {
    return scratch_layout(args.capacity, args.tokens, args.workspace.hidden, args.inter);
}

// What both passes take.
FusedArgs common_args(const Tensor& handle, int64_t capacity, const Tensor& tables, const OptionalTensor& source_of,
                      const Tensor& x, const Tensor& weights, const Tensor& h, const Tensor& tokens_out,
                      const Tensor& scratch, double limit, int64_t num_sms, int64_t stream) {
    FusedArgs args{};
    args.workspace = handle_of(handle);
    const int64_t hidden = args.workspace.hidden;
    args.tokens = x.size(0);
    args.capacity = capacity;
    args.inter = h.size(1) / 2;
    args.plan = plan_of(args.workspace, args.tokens, capacity, tables, source_of);
    args.x = rows_of(x, hidden, args.tokens, "x");
    args.weights = floats(weights, args.tokens * args.workspace.top_k, "weights");
    args.h = rows_of(h, 2 * args.inter, capacity, "h");
    args.tokens_out = rows_of(tokens_out, hidden, args.tokens, "tokens_out");
    const ScratchLayout layout = layout_of(args);
    uint8_t* base = bytes_of(scratch, layout.bytes, "scratch");
    args.pool = base + layout.pool;
    args.act = base + layout.act;
    args.row_weights = reinterpret_cast<float*>(base + layout.row_weights);
    args.counters = reinterpret_cast<int*>(base + layout.counters);
    args.limit = static_cast<float>(limit);
    args.num_sms = static_cast<int>(num_sms);
    args.stream = reinterpret_cast<cudaStream_t>(stream);
    return args;
}

// maps: uint8 [4, L, 128], in the order of WeightMaps.
void set_weights(FusedArgs& args, const Tensor& maps, WeightMaps first, WeightMaps second) {
    const int64_t each = local_experts(args) * kMapBytes;
    const uint8_t* base = bytes_of(maps, kWeightMaps * each, "maps");
    args.maps[0] = base + first * each;
    args.maps[1] = base + second * each;
}

// table: L tensor maps, then L addresses, as ops.GradientTable.
void set_gradients(FusedArgs& args, int which, const OptionalTensor& table, bool accumulate, const char* name) {
    if (!table) return;
    const int64_t local = local_experts(args), maps = local * kMapBytes;
    const uint8_t* base = bytes_of(*table, maps + local * int64_t{sizeof(float*)}, name);
    args.gradient_maps[which] = base;
    args.gradients[which] = reinterpret_cast<float* const*>(base + maps);
    args.accumulate[which] = accumulate;
}

// step 0: stage and announce; 1: the fused launch; 2: both.
void run_step(int64_t step, const FusedArgs& args) {
    if (step != 1) begin_fused(args);
    if (step != 0) run_fused(args);
}

void forward(int64_t step, Tensor handle, int64_t capacity, Tensor tables, OptionalTensor source_of, Tensor x,
             Tensor weights, Tensor maps, Tensor h, Tensor y, Tensor scratch, double limit, int64_t num_sms,
             int64_t stream) {
    FusedArgs args =
        common_args(handle, capacity, tables, source_of, x, weights, h, y, scratch, limit, num_sms, stream);
    set_weights(args, maps, kFc1, kFc2);
    run_step(step, args);
}

void backward(int64_t step, Tensor handle, int64_t capacity, Tensor tables, OptionalTensor source_of, Tensor dy,
              Tensor x, Tensor weights, Tensor h, Tensor maps, OptionalTensor dfc1, OptionalTensor dfc2,
              bool accumulate1, bool accumulate2, Tensor dx, Tensor dweights, Tensor scratch, Tensor more, double limit,
              int64_t num_sms, int64_t stream) {
    FusedArgs args =
        common_args(handle, capacity, tables, source_of, x, weights, h, dx, scratch, limit, num_sms, stream);
    args.backward = true;
    set_weights(args, maps, kFc2ForDgrad2, kFc1ForDgrad1);
    set_gradients(args, 0, dfc2, accumulate2, "dfc2");
    set_gradients(args, 1, dfc1, accumulate1, "dfc1");
    args.dy = rows_of(dy, args.workspace.hidden, args.tokens, "dy");
    args.dweights = floats(dweights, args.tokens * args.workspace.top_k, "dweights");
    const ScratchLayout layout = layout_of(args);
    uint8_t* base = bytes_of(more, dfc1 ? layout.more_bytes : layout.second_pool, "more");
    args.dh = base + layout.dh;
    args.dp_partials = reinterpret_cast<float*>(base + layout.dp_partials);
    args.second_pool = dfc1 ? base + layout.second_pool : nullptr;
    run_step(step, args);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megamoe, m) {
    m.def("scratch_layout(int capacity, int tokens, int hidden, int inter, Tensor(a!) out) -> ()");
    m.def("preload_kernels() -> ()");
    m.def("trace_size() -> int");
    m.def("set_trace(int address) -> ()");
    m.def(
        "fused_forward(int step, Tensor handle, int capacity, Tensor tables, Tensor? source_of, Tensor x,"
        " Tensor weights, Tensor maps, Tensor(a!) h, Tensor(b!) y, Tensor(c!) scratch, float limit, int num_sms,"
        " int stream) -> ()");
    m.def(
        "fused_backward(int step, Tensor handle, int capacity, Tensor tables, Tensor? source_of, Tensor dy, Tensor x,"
        " Tensor weights, Tensor h, Tensor maps, Tensor? dfc1, Tensor? dfc2, bool accumulate1, bool accumulate2,"
        " Tensor(a!) dx, Tensor(b!) dweights, Tensor(c!) scratch, Tensor(d!) more, float limit, int num_sms,"
        " int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megamoe, CompositeExplicitAutograd, m) {
    m.impl("preload_kernels", TORCH_BOX(&megamoe::preload_kernels));
    m.impl("trace_size", TORCH_BOX(&megamoe::trace_size));
    m.impl("set_trace", TORCH_BOX(&megamoe::set_trace));
}

STABLE_TORCH_LIBRARY_IMPL(megamoe, CPU, m) { m.impl("scratch_layout", TORCH_BOX(&write_scratch_layout)); }

STABLE_TORCH_LIBRARY_IMPL(megamoe, CUDA, m) {
    m.impl("fused_forward", TORCH_BOX(&forward));
    m.impl("fused_backward", TORCH_BOX(&backward));
}
