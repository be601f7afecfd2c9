#pragma once
#include "ptx/barrier.cuh"

namespace megamoe::ptx {
inline void store_shared_v4(uint64_t address, uint4 v) {
    emulator::wrote_shared();
    *reinterpret_cast<uint4*>(address) = v;
}
}  // namespace megamoe::ptx
