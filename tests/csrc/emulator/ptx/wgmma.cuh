#pragma once
#include "emulator.hpp"
#include "ptx/layout.cuh"

namespace megamoe::ptx {
inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::commit_products(); }
template <int kPending>
void wgmma_wait() {
    emulator::wait_products(kPending);
}
inline uint32_t uniform(uint32_t value) { return value; }
inline void pin_accumulators(float (&)[128]) {}
template <Major kMajorA, Major kMajorB>
void wgmma_m64n256k16(float (&d)[128], uint64_t a, uint64_t b, bool accumulate) {
    emulator::multiply(d, a, kMajorA == Major::MN, b, kMajorB == Major::MN, accumulate);
}
}  // namespace megamoe::ptx
