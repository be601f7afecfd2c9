// Operator schemas and tensor checks; nothing else. torch's stable ABI, so that one build serves several torch
// versions.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <optional>

#include "host/grouped_gemm.hpp"
#include "host/tensor_map.hpp"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void expect(const Tensor& tensor, ScalarType type, const char* name) {
    STD_TORCH_CHECK(tensor.scalar_type() == type, "megamoe: wrong dtype of ", name);
    STD_TORCH_CHECK(tensor.is_contiguous(), "megamoe: ", name, " must be contiguous");
}

// Row pools must agree on their rows.
void* pool(const OptionalTensor& tensor, int64_t rows, const char* name) {
    if (!tensor) return nullptr;
    expect(*tensor, ScalarType::BFloat16, name);
    STD_TORCH_CHECK(tensor->dim() == 2 && tensor->size(0) == rows, "megamoe: ", name, " must have shape [", rows,
                    ", columns]");
    return tensor->data_ptr();
}

float* floats(const OptionalTensor& tensor, const char* name) {
    if (!tensor) return nullptr;
    expect(*tensor, ScalarType::Float, name);
    return static_cast<float*>(tensor->data_ptr());
}

int* ints(const Tensor& tensor, int64_t least, const char* name) {
    expect(tensor, ScalarType::Int, name);
    STD_TORCH_CHECK(tensor.numel() >= least, "megamoe: ", name, " needs ", least, " elements, has ", tensor.numel());
    return static_cast<int*>(tensor.data_ptr());
}

// pointers: int64 [L] on the CPU; out: uint8 [L, 128] on the CPU.
void encode_maps(Tensor pointers, int64_t rows, int64_t cols, int64_t kind, Tensor out) {
    expect(pointers, ScalarType::Long, "pointers");
    expect(out, ScalarType::Byte, "out");
    STD_TORCH_CHECK(out.numel() == pointers.numel() * int64_t{sizeof(CUtensorMap)}, "megamoe: out must be [L, 128]");
    const int64_t* address = static_cast<const int64_t*>(pointers.data_ptr());
    uint8_t* bytes = static_cast<uint8_t*>(out.data_ptr());
    for (int64_t i = 0; i < pointers.numel(); ++i) {
        const CUtensorMap map = megamoe::make_tensor_map(static_cast<megamoe::MapKind>(kind),
                                                         reinterpret_cast<const void*>(address[i]), rows, cols);
        std::memcpy(bytes + i * sizeof(CUtensorMap), &map, sizeof(CUtensorMap));
    }
}

void grouped_gemm(int64_t gemm, Tensor a, OptionalTensor b, OptionalTensor h, OptionalTensor out, OptionalTensor act,
                  Tensor expert_maps, OptionalTensor gradients, Tensor expert_rows, Tensor expert_offset,
                  OptionalTensor row_weights, OptionalTensor dp_partials, Tensor claims, int64_t m_extent,
                  int64_t n_extent, int64_t k_extent, double limit, bool accumulate, int64_t num_sms,
                  int64_t deadline_ns, int64_t wait_record, int64_t stream) {
    const int64_t rows = a.size(0);
    const int64_t num_experts = expert_rows.numel();
    STD_TORCH_CHECK(rows % 128 == 0 && rows < int64_t{1} << 31, "megamoe: pool rows must be a multiple of 128, are ",
                    rows);
    STD_TORCH_CHECK(!row_weights || row_weights->numel() >= rows, "megamoe: row_weights needs one weight a row");
    expect(expert_maps, ScalarType::Byte, "expert_maps");
    STD_TORCH_CHECK(expert_maps.numel() == num_experts * int64_t{sizeof(CUtensorMap)},
                    "megamoe: expert_maps must be [L, 128]");
    if (gradients) expect(*gradients, ScalarType::Long, "gradients");
    STD_TORCH_CHECK(!gradients || gradients->numel() == num_experts, "megamoe: gradients must be [L]");
    megamoe::GroupedGemmArgs args{};
    args.gemm = static_cast<int>(gemm);
    args.a = pool(a, rows, "a");
    args.a_cols = a.size(1);
    args.b = pool(b, rows, "b");
    args.b_cols = b ? b->size(1) : 0;
    args.h = pool(h, rows, "h");
    args.out = pool(out, rows, "out");
    args.out_cols = out ? out->size(1) : 0;
    args.act = pool(act, rows, "act");
    args.pool_rows = rows;
    args.expert_maps = expert_maps.data_ptr();
    args.gradients = gradients ? static_cast<void* const*>(gradients->data_ptr()) : nullptr;
    args.expert_rows = ints(expert_rows, 1, "expert_rows");
    args.expert_offset = ints(expert_offset, num_experts, "expert_offset");
    args.num_experts = static_cast<int>(num_experts);
    args.row_weights = floats(row_weights, "row_weights");
    args.dp_partials = floats(dp_partials, "dp_partials");
    args.limit = static_cast<float>(limit);
    args.accumulate = accumulate;
    args.m_extent = static_cast<int>(m_extent);
    args.n_extent = static_cast<int>(n_extent);
    args.k_extent = static_cast<int>(k_extent);
    args.claims = ints(claims, 1, "claims");
    args.num_sms = static_cast<int>(num_sms);
    args.deadline_ns = deadline_ns;
    args.wait_record = reinterpret_cast<void*>(wait_record);
    args.stream = reinterpret_cast<cudaStream_t>(stream);
    megamoe::run_grouped_gemm(args);
}

}  // namespace

STABLE_TORCH_LIBRARY(megamoe, m) {
    m.def("encode_maps(Tensor pointers, int rows, int cols, int kind, Tensor(a!) out) -> ()");
    m.def(
        "grouped_gemm(int gemm, Tensor a, Tensor? b, Tensor? h, Tensor(a!)? out, Tensor(b!)? act, Tensor expert_maps,"
        " Tensor? gradients, Tensor expert_rows, Tensor expert_offset, Tensor? row_weights, Tensor(c!)? dp_partials, "
        "Tensor(d!) claims,"
        " int m_extent, int n_extent, int k_extent, float limit, bool accumulate, int num_sms, int deadline_ns,"
        " int wait_record, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megamoe, CPU, m) { m.impl("encode_maps", TORCH_BOX(&encode_maps)); }

STABLE_TORCH_LIBRARY_IMPL(megamoe, CUDA, m) { m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm)); }
