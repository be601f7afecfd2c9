// Tensor arguments as the launches take them; each check names the argument.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <climits>
#include <cstring>
#include <optional>

#include "host/comm.hpp"

namespace megamoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Uninitialised, on the device of `like`. torch::stable::new_empty looks its operator up by name and boxes the call:
// where caches are cold, as before the first launch of a pass, that took 67 us (docs/performance.md).
template <size_t kDims>
Tensor new_tensor(const Tensor& like, const int64_t (&size)[kDims], ScalarType type) {
    int64_t strides[kDims];
    int64_t stride = 1;
    for (size_t i = kDims; i-- > 0; stride *= size[i]) strides[i] = stride;
    int32_t device_type = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
    const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    AtenTensorHandle made = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(kDims, size, strides, code, device_type, like.get_device_index(), &made));
    return Tensor(made);
}

template <class T>
T* elements(const Tensor& tensor, ScalarType type, int64_t least, const char* name) {
    STD_TORCH_CHECK(tensor.scalar_type() == type, "megamoe: wrong dtype of ", name);
    STD_TORCH_CHECK(tensor.is_contiguous(), "megamoe: ", name, " must be contiguous");
    STD_TORCH_CHECK(tensor.numel() >= least, "megamoe: ", name, " needs ", least, " elements, has ", tensor.numel());
    return static_cast<T*>(tensor.data_ptr());
}

inline int* ints(const Tensor& tensor, int64_t least, const char* name) {
    return elements<int>(tensor, ScalarType::Int, least, name);
}

inline int64_t* longs(const Tensor& tensor, int64_t least, const char* name) {
    return elements<int64_t>(tensor, ScalarType::Long, least, name);
}

inline float* floats(const OptionalTensor& tensor, int64_t least, const char* name) {
    return tensor ? elements<float>(*tensor, ScalarType::Float, least, name) : nullptr;
}

// bf16 rows of `width` elements, 16-byte aligned as bulk copies and vector loads need.
inline void* rows_of(const OptionalTensor& tensor, int64_t width, int64_t least, const char* name) {
    if (!tensor) return nullptr;
    void* data = elements<uint16_t>(*tensor, ScalarType::BFloat16, least * width, name);
    STD_TORCH_CHECK(tensor->dim() == 2 && tensor->size(1) == width, "megamoe: ", name, " must have rows of ", width,
                    " elements");
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, "megamoe: ", name, " must be 16-byte aligned");
    return data;
}

inline WorkspaceHandle handle_of(const Tensor& handle) {
    WorkspaceHandle result;
    std::memcpy(&result, longs(handle, kHandleInts, "handle"), sizeof(result));
    return result;
}

// A plan's tables [bytes / 4] int32. source_of: where it has memory of its own; else the tables hold it too, once the
// capacity is known.
inline PlanPointers plan_of(const WorkspaceHandle& workspace, int64_t tokens, int64_t capacity, const Tensor& tables,
                            const OptionalTensor& source_of) {
    const bool inside = !source_of && capacity < INT_MAX;
    const int64_t bytes = plan_bytes(workspace, tokens) + (inside ? 8 * capacity : 0);
    int64_t* own = source_of ? longs(*source_of, capacity, "source_of") : nullptr;
    PlanPointers plan = plan_pointers(workspace, tokens, ints(tables, bytes / 4, "tables"), own);
    if (!inside) plan.source_of = own;
    return plan;
}

// ids: [T, K] int32 or int64. status: address of the verdict.
inline PlanArgs plan_args(const WorkspaceHandle& workspace, const Tensor& ids, int64_t row_tile, int64_t capacity,
                          const Tensor& tables, const OptionalTensor& source_of, int64_t status, int64_t stream) {
    PlanArgs args{};
    args.workspace = workspace;
    args.wide_ids = ids.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(args.wide_ids || ids.scalar_type() == ScalarType::Int, "megamoe: ids must be int32 or int64");
    STD_TORCH_CHECK(ids.is_contiguous() && ids.dim() == 2 && ids.size(1) == workspace.top_k,
                    "megamoe: ids must be a contiguous [T, ", workspace.top_k, "]");
    args.ids = ids.data_ptr();
    args.tokens = ids.size(0);
    args.row_tile = static_cast<int>(row_tile);
    args.capacity = capacity;
    // Without an overflow M <= capacity, and capacity is what source_of holds.
    args.plan = plan_of(workspace, args.tokens, capacity, tables, source_of);
    args.status = status;
    args.stream = reinterpret_cast<cudaStream_t>(stream);
    return args;
}

}  // namespace megamoe
