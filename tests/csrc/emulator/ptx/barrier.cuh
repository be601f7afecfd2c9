#pragma once
#include "emulator.hpp"

namespace megamoe::ptx {
inline uint64_t smem_address(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }
inline void mbarrier_init(uint64_t* barrier, uint32_t count) {
    emulator::mbarrier(barrier) = {static_cast<uint16_t>(count), static_cast<uint16_t>(count), 0};
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint64_t* barrier) { emulator::mbarrier(barrier).change(1, 0); }
inline void mbarrier_arrive_cta(uint64_t* barrier, int) { mbarrier_arrive(barrier); }
inline void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
    emulator::mbarrier(barrier).change(1, static_cast<int>(bytes));
}
inline bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
    emulator::yield();
    return (emulator::mbarrier(barrier).state & 1) != static_cast<int>(parity);
}
}  // namespace megamoe::ptx
