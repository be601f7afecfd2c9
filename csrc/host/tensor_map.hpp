// Tensor maps (CUtensorMap) as the roles expect them. Host only; the driver's encoder is found at run time, so that the
// library loads on a machine without a driver.
#pragma once
#include <cuda.h>

#include <cstdint>

namespace megamoe {

// How a role reads or writes a matrix: bf16 unless said, in boxes of 128 bytes a row in the 128-byte swizzle.
enum class MapKind : int {
    kActivation = 0,  // 64 rows: left operand, K-major
    kWeight = 1,      // 128 rows: right operand, K-major
    kWeightMN = 2,    // [2][64 k][64 n]: right operand, MN-major
    kOperandMN = 3,   // [1][64 k][64 m]: left operand of a wgrad
    kOutput = 4,      // 64 rows: what a storer sends
    kGradient = 5,    // the same in fp32: 64 rows of 32 columns
};

// Describes the row-major matrix [rows, cols] at `address`. Throws std::runtime_error naming what is wrong.
CUtensorMap make_tensor_map(MapKind kind, const void* address, int64_t rows, int64_t cols);

}  // namespace megamoe
