// Operator schemas and tensor checks of the fused passes; nothing else.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "host/fused.hpp"
#include "host/torch_args.hpp"
#include "host/trace.hpp"
#include "layout/scratch.cuh"
#include "schedule/order.cuh"

namespace {

using namespace megamoe;

constexpr int64_t kMapBytes = 128;

// Which tensor maps of a layer's weights are where: ops_fused.py, WeightMaps.
enum WeightMaps : int { kFc1, kFc2, kFc1ForDgrad1, kFc2ForDgrad2, kWeightMaps };

int64_t local_experts(const FusedArgs& args) { return args.workspace.experts / args.workspace.ranks; }

uint8_t* bytes_of(const Tensor& tensor, int64_t least, const char* name) {
    return elements<uint8_t>(tensor, ScalarType::Byte, least, name);
}

// out: int64 [8] on the CPU, in the order of ScratchLayout.
void write_scratch_layout(int64_t capacity, int64_t tokens, int64_t hidden, int64_t inter, Tensor out) {
    const ScratchLayout layout = scratch_layout(capacity, tokens, hidden, inter);
    std::memcpy(longs(out, sizeof(layout) / 8, "out"), &layout, sizeof(layout));
}

// Waves of units: one for each of `clusters` clusters; every expert has `rows` rows.
int64_t waves_of(const Order& order, Pass pass, int inter, int hidden, int rows, int clusters) {
    int64_t units = 0;
    for (int product = 0; product < order.products; ++product) {
        units += int64_t{order.experts} * units_of(product_shape(pass, product, inter, hidden), true, rows);
    }
    return (units + clusters - 1) / clusters;
}

// out: int64 [5] on the CPU, in the order of ops_fused.Schedule.
void write_schedule(int64_t local, int64_t rows, int64_t inter, int64_t hidden, int64_t clusters, Tensor out) {
    const int experts = static_cast<int>(local), each = static_cast<int>(rows), sides = static_cast<int>(clusters);
    const int i = static_cast<int>(inter), h = static_cast<int>(hidden);
    const Order forward = forward_order(experts), backward = backward_order(experts, each, i, sides);
    const int64_t answers[] = {forward.lag[kProductFc2], backward.lag[kProductDgrad1], backward.lag[kProductWgrad2],
                               waves_of(forward, Pass::kForward, i, h, each, sides),
                               waves_of(backward, Pass::kBackward, i, h, each, sides)};
    std::memcpy(longs(out, 5, "out"), answers, sizeof(answers));
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
    const uint8_t* base = bytes_of(*table, maps + local * int64_t{sizeof(void*)}, name);
    args.gradient_maps[which] = base;
    args.gradients[which] = reinterpret_cast<void* const*>(base + maps);
    args.accumulate[which] = accumulate;
}

// Which parts of a pass to launch: staging and announcement, the fused kernel, both, or all but the staging.
enum Step : int64_t { kBegin = 0, kLaunch = 1, kBoth = 2, kStaged = 3 };

void run_step(int64_t step, const FusedArgs& args) {
    if (step == kBegin || step == kBoth) stage_fused(args);
    if (step != kLaunch) announce_fused(args);
    if (step != kBegin) run_fused(args);
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
              bool accumulate1, bool accumulate2, bool in_bf16, Tensor dx, Tensor dweights, Tensor scratch, Tensor more,
              double limit, int64_t num_sms, int64_t stream) {
    FusedArgs args =
        common_args(handle, capacity, tables, source_of, x, weights, h, dx, scratch, limit, num_sms, stream);
    args.pass = in_bf16 ? Pass::kBackwardBf16 : Pass::kBackward;
    set_weights(args, maps, kFc2ForDgrad2, kFc1ForDgrad1);
    set_gradients(args, 0, dfc2, accumulate2, "dfc2");
    set_gradients(args, 1, dfc1, accumulate1, "dfc1");
    args.dy = rows_of(dy, args.workspace.hidden, args.tokens, "dy");
    args.dweights = floats(dweights, args.tokens * args.workspace.top_k, "dweights");
    const ScratchLayout layout = layout_of(args);
    uint8_t* base = bytes_of(more, dfc1 ? layout.more_bytes : layout.second_pool, "more");
    args.dp_partials = reinterpret_cast<float*>(base + layout.dp_partials);
    args.second_pool = dfc1 ? base + layout.second_pool : nullptr;
    run_step(step, args);
}

// ---- a whole pass in one call: the host has little time between a router and its experts ----

// What a plain call brings; whatever else a call may bring is left to the operators above.
struct Plain {
    const Tensor& like;  // x: its device
    bool good = true;

    void expect(const Tensor& tensor, ScalarType type, std::initializer_list<int64_t> size) {
        good = good && tensor.scalar_type() == type && tensor.dim() == static_cast<int64_t>(size.size()) &&
               tensor.is_contiguous() && tensor.get_device_index() == like.get_device_index() &&
               tensor.is_cuda() == like.is_cuda() && reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
        int64_t at = 0;
        for (const int64_t wanted : size) good = good && tensor.size(at++) == wanted;
    }

    // One stack [L, rows, columns] or L matrices, at the addresses that tensor maps were made for.
    void expect_experts(const std::vector<Tensor>& experts, ScalarType type, int64_t local, int64_t rows,
                        int64_t columns, const int64_t* addresses) {
        if (experts.size() == 1 && experts[0].dim() == 3) {
            expect(experts[0], type, {local, rows, columns});
            const int64_t base = reinterpret_cast<int64_t>(experts[0].data_ptr());
            const int64_t bytes = rows * columns * (type == ScalarType::Float ? 4 : 2);
            for (int64_t i = 0; i < local; ++i) good = good && addresses[i] == base + i * bytes;
            return;
        }
        good = good && static_cast<int64_t>(experts.size()) == local;
        for (size_t i = 0; good && i < experts.size(); ++i) {
            expect(experts[i], type, {rows, columns});
            good = good && reinterpret_cast<int64_t>(experts[i].data_ptr()) == addresses[i];
        }
    }

    // places: int64 on the CPU, what tensor maps were made for: L, 2I, H, then the L addresses of fc1, then those of
    // fc2.
    void expect_layer(const std::vector<Tensor>& fc1, const std::vector<Tensor>& fc2, ScalarType type, int64_t local,
                      int64_t hidden, int64_t inter, const Tensor& places) {
        const int64_t* of = longs(places, 3, "places");
        good = good && of[0] == local && of[1] == 2 * inter && of[2] == hidden && places.numel() == 3 + 2 * local;
        if (!good) return;
        const int64_t* at = of + 3;
        expect_experts(fc1, type, local, 2 * inter, hidden, at);
        expect_experts(fc2, type, local, hidden, inter, at + local);
    }
};

// Forward of a plain call, and its plan where `planned`, its tables, is not given: y, h, the plan's tables. The tables
// alone, and nothing announced, where memory for the results is short; nothing at all where the call is not plain.
std::vector<Tensor> plain_forward(Tensor handle, Tensor x, Tensor ids, Tensor weights, std::vector<Tensor> fc1,
                                  std::vector<Tensor> fc2, Tensor places, Tensor maps, int64_t inter,
                                  OptionalTensor planned, int64_t capacity, int64_t status, double limit,
                                  int64_t stream) {
    const WorkspaceHandle workspace = handle_of(handle);
    const int64_t tokens = x.dim() == 2 ? x.size(0) : 0, hidden = workspace.hidden;
    if (tokens == 0 || tokens > workspace.tokens) return {};
    const bool wide = ids.scalar_type() == ScalarType::Long;
    Plain plain{x};
    plain.expect(x, ScalarType::BFloat16, {tokens, hidden});
    plain.expect(ids, wide ? ScalarType::Long : ScalarType::Int, {tokens, workspace.top_k});
    plain.expect(weights, ScalarType::Float, {tokens, workspace.top_k});
    const int64_t local = workspace.experts / workspace.ranks;
    plain.expect_layer(fc1, fc2, ScalarType::BFloat16, local, hidden, inter, places);
    if (!plain.good) return {};
    // First of all: it keeps the GPU busy while the rest is prepared.
    FusedArgs rows{};
    rows.workspace = workspace;
    rows.tokens = tokens;
    rows.x = x.data_ptr();
    rows.weights = static_cast<const float*>(weights.data_ptr());
    rows.stream = reinterpret_cast<cudaStream_t>(stream);
    stage_fused(rows);

    std::optional<Tensor> tables = planned, y, h, scratch;
    if (!planned) {  // before the other allocations: peers wait for this rank's counts
        const int64_t ints = (plan_bytes(workspace, tokens) + 8 * capacity) / 4;
        try {
            tables = new_tensor(x, {ints}, ScalarType::Int);
        } catch (const std::exception&) { return {}; }
        run_plan(PlanPhase::kAll, plan_args(workspace, ids, kCounterTileRows, capacity, *tables, {}, status, stream));
    }
    try {
        scratch = new_tensor(x, {scratch_layout(capacity, tokens, hidden, inter).bytes}, ScalarType::Byte);
        y = new_tensor(x, {tokens, hidden}, ScalarType::BFloat16);
        h = new_tensor(x, {capacity, 2 * inter}, ScalarType::BFloat16);
    } catch (const std::exception&) { return {*tables}; }
    forward(kStaged, handle, capacity, *tables, {}, x, weights, maps, *h, *y, *scratch, limit, 0, stream);
    return {*y, *h, *tables};
}

// Backward of a plain call, into gradients that are added to: dx, dweights. Else nothing, as plain_forward.
// gradient_places, table1, table2: where the gradients' tensor maps expect them; the maps.
std::vector<Tensor> plain_backward(Tensor handle, int64_t capacity, Tensor tables, Tensor dy, Tensor x, Tensor weights,
                                   Tensor h, Tensor maps, std::vector<Tensor> fc1, std::vector<Tensor> fc2,
                                   Tensor places, std::vector<Tensor> dfc1, std::vector<Tensor> dfc2,
                                   Tensor gradient_places, Tensor table1, Tensor table2, double limit, int64_t stream) {
    const WorkspaceHandle workspace = handle_of(handle);
    const int64_t tokens = x.size(0), hidden = workspace.hidden, inter = h.size(1) / 2;
    const int64_t local = workspace.experts / workspace.ranks;
    Plain plain{x};
    plain.expect(x, ScalarType::BFloat16, {tokens, hidden});
    plain.expect(dy, ScalarType::BFloat16, {tokens, hidden});
    plain.expect(h, ScalarType::BFloat16, {capacity, 2 * inter});
    plain.expect(weights, ScalarType::Float, {tokens, workspace.top_k});
    plain.expect_layer(fc1, fc2, ScalarType::BFloat16, local, hidden, inter, places);
    plain.expect_layer(dfc1, dfc2, ScalarType::Float, local, hidden, inter, gradient_places);
    if (!plain.good) return {};

    const ScratchLayout layout = scratch_layout(capacity, tokens, hidden, inter);
    std::optional<Tensor> dx, dweights, scratch, more;
    try {
        scratch = new_tensor(x, {layout.bytes}, ScalarType::Byte);
        dx = new_tensor(x, {tokens, hidden}, ScalarType::BFloat16);
        dweights = new_tensor(x, {tokens, workspace.top_k}, ScalarType::Float);
        more = new_tensor(x, {layout.more_bytes}, ScalarType::Byte);
    } catch (const std::exception&) { return {}; }
    backward(kBoth, handle, capacity, tables, {}, dy, x, weights, h, maps, table1, table2, true, true, false, *dx,
             *dweights, *scratch, *more, limit, 0, stream);
    return {*dx, *dweights};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megamoe, m) {
    m.def("scratch_layout(int capacity, int tokens, int hidden, int inter, Tensor(a!) out) -> ()");
    m.def("schedule(int local, int rows, int inter, int hidden, int clusters, Tensor(a!) out) -> ()");
    m.def("preload_kernels() -> ()");
    m.def("trace_size() -> int");
    m.def("set_trace(int address) -> ()");
    m.def(
        "fused_forward(int step, Tensor handle, int capacity, Tensor tables, Tensor? source_of, Tensor x,"
        " Tensor weights, Tensor maps, Tensor(a!) h, Tensor(b!) y, Tensor(c!) scratch, float limit, int num_sms,"
        " int stream) -> ()");
    m.def(
        "fused_backward(int step, Tensor handle, int capacity, Tensor tables, Tensor? source_of, Tensor dy, Tensor x,"
        " Tensor weights, Tensor(e!) h, Tensor maps, Tensor? dfc1, Tensor? dfc2, bool accumulate1, bool accumulate2,"
        " bool in_bf16, Tensor(a!) dx, Tensor(b!) dweights, Tensor(c!) scratch, Tensor(d!) more, float limit,"
        " int num_sms, int stream) -> ()");
    m.def(
        "plain_forward(Tensor handle, Tensor x, Tensor ids, Tensor weights, Tensor[] fc1, Tensor[] fc2,"
        " Tensor places, Tensor maps, int inter, Tensor? planned, int capacity, int status, float limit, int stream)"
        " -> Tensor[]");
    m.def(
        "plain_backward(Tensor handle, int capacity, Tensor tables, Tensor dy, Tensor x, Tensor weights, Tensor(c!) h,"
        " Tensor maps, Tensor[] fc1, Tensor[] fc2, Tensor places, Tensor(a!)[] dfc1, Tensor(b!)[] dfc2,"
        " Tensor gradient_places, Tensor table1, Tensor table2, float limit, int stream) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(megamoe, CompositeExplicitAutograd, m) {
    m.impl("preload_kernels", TORCH_BOX(&megamoe::preload_kernels));
    m.impl("trace_size", TORCH_BOX(&megamoe::trace_size));
    m.impl("set_trace", TORCH_BOX(&megamoe::set_trace));
}

STABLE_TORCH_LIBRARY_IMPL(megamoe, CPU, m) {
    m.impl("scratch_layout", TORCH_BOX(&write_scratch_layout));
    m.impl("schedule", TORCH_BOX(&write_schedule));
}

// Results are recorded by nobody but autograd.py.
STABLE_TORCH_LIBRARY_IMPL(megamoe, Autograd, m) {
    m.impl("plain_forward", TORCH_BOX(&plain_forward));
    m.impl("plain_backward", TORCH_BOX(&plain_backward));
}

STABLE_TORCH_LIBRARY_IMPL(megamoe, CUDA, m) {
    m.impl("fused_forward", TORCH_BOX(&forward));
    m.impl("fused_backward", TORCH_BOX(&backward));
    m.impl("plain_forward", TORCH_BOX(&plain_forward));
    m.impl("plain_backward", TORCH_BOX(&plain_backward));
}
