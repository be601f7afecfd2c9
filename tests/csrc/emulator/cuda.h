#pragma once
#include "emulator.hpp"

// What the driver encodes into its 128 bytes; a plain 2-D map has one block.
struct alignas(128) CUtensorMap {
    uint8_t* base;
    uint64_t size[3], pitch[2];  // elements; bytes
    uint32_t box[3], element;
};
static_assert(sizeof(CUtensorMap) == 128);

using CUresult = int;
enum { CUDA_SUCCESS = 0 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT32, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
enum { CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, uint32_t rank, void* address,
                                       const uint64_t* size, const uint64_t* pitch, const uint32_t* box,
                                       const uint32_t*, int, int, int, int) {
    const bool blocks = rank == 3;
    *map = {static_cast<uint8_t*>(address),
            {size[0], size[1], blocks ? size[2] : 1},
            {pitch[0], blocks ? pitch[1] : 0},
            {box[0], box[1], blocks ? box[2] : 1},
            type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4u : 2u};
    return CUDA_SUCCESS;
}
