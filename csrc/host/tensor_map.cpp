#include "host/tensor_map.hpp"

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace megamoe {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled encoder() {
    static const EncodeTiled found = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result{};
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
        if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) {
            throw std::runtime_error("megamoe: the CUDA driver has no cuTensorMapEncodeTiled; it is too old or absent");
        }
        return reinterpret_cast<EncodeTiled>(function);
    }();
    return found;
}

struct Box {
    uint32_t rows;
    uint32_t blocks;  // 0: a plain 2-D box
};

Box box_of(MapKind kind) {
    switch (kind) {
        case MapKind::kActivation: return {64, 0};
        case MapKind::kWeight: return {128, 0};
        case MapKind::kWeightMN: return {64, 2};
        case MapKind::kOperandMN: return {64, 1};
        case MapKind::kOutput: return {64, 0};
        case MapKind::kGradient: return {64, 0};
    }
    throw std::runtime_error("megamoe: unknown tensor map kind " + std::to_string(static_cast<int>(kind)));
}

}  // namespace

CUtensorMap make_tensor_map(MapKind kind, const void* address, int64_t rows, int64_t cols) {
    const bool is_float = kind == MapKind::kGradient;
    const uint32_t element = is_float ? 4 : 2;
    const uint32_t width = 128 / element;
    const Box box = box_of(kind);
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
        throw std::runtime_error("megamoe: a matrix must start at a multiple of 16 bytes; this one is at address " +
                                 std::to_string(reinterpret_cast<uintptr_t>(address)));
    }
    if (rows <= 0 || cols <= 0 || cols % width != 0) {
        throw std::runtime_error("megamoe: a matrix of " + std::to_string(rows) + " x " + std::to_string(cols) +
                                 " cannot be described: columns must be a positive multiple of " +
                                 std::to_string(width));
    }
    const uint64_t pitch = static_cast<uint64_t>(cols) * element;
    // 3-D: the columns split into blocks of one 128-byte row each, so that one box fills whole [k][64] blocks.
    const uint64_t dims_2d[2] = {static_cast<uint64_t>(cols), static_cast<uint64_t>(rows)};
    const uint64_t dims_3d[3] = {width, static_cast<uint64_t>(rows), static_cast<uint64_t>(cols) / width};
    const uint64_t strides[2] = {pitch, 128};
    const uint32_t extent[3] = {width, box.rows, box.blocks};
    const uint32_t steps[3] = {1, 1, 1};
    CUtensorMap map{};
    const CUresult result =
        encoder()(&map, is_float ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                  box.blocks ? 3 : 2, const_cast<void*>(address), box.blocks ? dims_3d : dims_2d, strides, extent,
                  steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        throw std::runtime_error("megamoe: cuTensorMapEncodeTiled failed with CUresult " + std::to_string(result) +
                                 " for a matrix of " + std::to_string(rows) + " x " + std::to_string(cols));
    }
    return map;
}

}  // namespace megamoe
