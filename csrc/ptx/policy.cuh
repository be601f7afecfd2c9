// L2 eviction policies as instructions take them (createpolicy.fractional.L2 with fraction 1).
#pragma once
#include <cstdint>

namespace megamoe::ptx {

constexpr uint64_t kEvictNormal = 0x1000000000000000ull;
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;

}  // namespace megamoe::ptx
