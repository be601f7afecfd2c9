#include "host/grouped_gemm.hpp"

#include <stdexcept>
#include <string>

#include "host/checks.hpp"
#include "host/clamp.hpp"
#include "host/tensor_map.hpp"
#include "host/trace.hpp"
#include "kernels/grouped_gemm.cuh"

namespace megamoe {
namespace {

CUtensorMap map_or_empty(MapKind kind, const void* address, int64_t rows, int64_t cols) {
    return address == nullptr ? CUtensorMap{} : make_tensor_map(kind, address, rows, cols);
}

}  // namespace

void run_grouped_gemm(const GroupedGemmArgs& args) {
    const Gemm gemm = static_cast<Gemm>(args.gemm);
    const bool wgrad = is_wgrad(gemm);
    const int64_t rows = args.pool_rows;
    if (args.num_experts < 1 || args.num_experts > kMaxExperts) {
        throw std::runtime_error("megamoe: " + std::to_string(args.num_experts) + " local experts; allowed are 1 to " +
                                 std::to_string(kMaxExperts));
    }
    require(gemm != Gemm::kWgradBf16 || !args.accumulate, "accumulate", 1,
            "0: weight gradients in bf16 are written, never added to");
    check(cudaMemsetAsync(args.claims, 0, sizeof(int), args.stream), "clearing the work queue");
    // An empty pool has no tensor map, and no work but the zeros of a first wgrad.
    if (rows == 0 && !(wgrad && !args.accumulate)) return;

    GemmParams params{};
    params.gemm = gemm;
    if (rows > 0) {
        params.a = make_tensor_map(wgrad ? MapKind::kOperandMN : MapKind::kActivation, args.a, rows, args.a_cols);
        params.b = wgrad ? make_tensor_map(MapKind::kWeightMN, args.b, rows, args.b_cols)
                         : map_or_empty(MapKind::kWeight, args.h, rows, 2 * int64_t{args.n_extent});
        params.out = map_or_empty(MapKind::kOutput, args.out, rows, args.out_cols);
        params.act = map_or_empty(MapKind::kOutput, args.act, rows, args.n_extent);
    }
    params.expert_maps = static_cast<const CUtensorMap*>(args.expert_maps);
    params.gradients = args.gradients;
    params.expert_rows = args.expert_rows;
    params.expert_offset = args.expert_offset;
    params.row_weights = args.row_weights;
    params.dp_partials = args.dp_partials;
    params.wanted = 1;
    params.num_experts = args.num_experts;
    params.m_extent = args.m_extent;
    params.n_extent = args.n_extent;
    params.k_blocks = args.k_extent / kBlockK;
    params.limit = clamp_pair(args.limit);
    params.accumulate = args.accumulate;
    params.trace = trace_buffer();
    params.deadline = {};
    params.deadline.nanoseconds = static_cast<unsigned long long>(args.deadline_ns);
    params.deadline.record = static_cast<WaitRecord*>(args.wait_record);
    check(launch_grouped_gemm(gemm, params, args.claims, args.num_sms > 0 ? args.num_sms : sm_count(), args.stream),
          "launching the grouped GEMM");
}

}  // namespace megamoe
