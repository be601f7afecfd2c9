// How tiles lie in shared memory: rows of 128 bytes in the 128-byte swizzle. Pure.
#pragma once
#include <cstdint>

namespace megamoe::ptx {

// Which index of an operand is contiguous in memory: the reduction index (K) or the row/column index (MN).
enum class Major : int { K = 0, MN = 1 };

// Shared-memory descriptor of a tile in the 128-byte swizzle (PTX ISA, "Shared Memory Matrix Layout").
// K-major: rows of 64 elements, 8-row groups 1024 bytes apart.
// MN-major: [64 k][64 mn] blocks; 8-k groups 1024 bytes apart, the next 64 mn in the next 8192-byte block.
template <Major kMajor>
__device__ __forceinline__ uint64_t smem_descriptor(uint32_t address) {
    constexpr uint64_t kSwizzle128 = 1ull << 62;
    constexpr uint64_t kStride = 1024 >> 4;
    constexpr uint64_t kLeading = kMajor == Major::MN ? 8192 >> 4 : 1;
    return kSwizzle128 | (kStride << 32) | (kLeading << 16) | ((address & 0x3FFFF) >> 4);
}

// The descriptor of what lies `bytes` behind, a multiple of 16. Its address has 14 bits of the low word, so that 32-bit
// arithmetic will do.
__device__ __forceinline__ uint64_t descriptor_behind(uint64_t descriptor, uint32_t bytes) {
    return (descriptor >> 32 << 32) | (static_cast<uint32_t>(descriptor) + (bytes >> 4));
}

// Bytes between neighbouring k16 slices.
template <Major kMajor>
constexpr uint32_t kSliceBytes = kMajor == Major::K ? 16 * 2 : 16 * 128;

// Byte offset of the 16-byte unit `unit` (0..7) of row `row` in a tile of 128-byte rows with the 128-byte swizzle.
__device__ __forceinline__ uint32_t swizzle_128(uint32_t row, uint32_t unit) {
    return row * 128 + ((unit ^ (row & 7)) << 4);
}

}  // namespace megamoe::ptx
