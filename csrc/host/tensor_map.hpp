// Tensor maps (CUtensorMap) as the roles expect them. Host only; the driver's encoder is found at run time, so that the
// library loads on a machine without a driver.
#pragma once
#include <cuda.h>

#include <cstdint>

namespace megamoe {

// How the loader reads a bf16 matrix: in boxes of 64 columns (128 bytes) in the 128-byte swizzle.
enum class MapKind : int {
    kActivation = 0,  // 64 rows: left operand, K-major
    kWeight = 1,      // 128 rows: right operand, K-major
    kWeightMN = 2,    // [2][64 k][64 n]: right operand, MN-major
    kOperandMN = 3,   // [1][64 k][64 m]: left operand of a wgrad
};

// Describes the row-major matrix [rows, cols] at `address`. Throws std::runtime_error naming what is wrong.
CUtensorMap make_tensor_map(MapKind kind, const void* address, int64_t rows, int64_t cols);

}  // namespace megamoe
