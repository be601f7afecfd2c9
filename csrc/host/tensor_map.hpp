// Tensor maps (CUtensorMap) as the roles expect them. Host only; the driver's encoder is found at run time, so that the
// library loads on a machine without a driver.
#pragma once
#include <cuda.h>

#include <cstdint>

namespace megamoe {

// Which role reads or writes a matrix, and so in what boxes. All boxes are 128 bytes wide in the 128-byte swizzle.
enum class MapKind : int {
    kActivation = 0,   // bf16, 64 rows: left operand, K-major
    kWeight = 1,       // bf16, 128 rows: right operand, K-major
    kWeightMN = 2,     // bf16, [2][64 k][64 n]: right operand, MN-major
    kOperandMN = 3,    // bf16, [1][64 k][64 m]: left operand of a wgrad
    kEpilogueIn = 4,   // bf16, 128 rows: h for dgrad2
    kEpilogueOut = 5,  // bf16, 16 rows: what one warp stores
    kGradient = 6,     // fp32, 16 rows of 32 columns
};

// Describes the row-major matrix [rows, cols] at `address`. Throws std::runtime_error naming what is wrong.
CUtensorMap make_tensor_map(MapKind kind, const void* address, int64_t rows, int64_t cols);

}  // namespace megamoe
