#pragma once
#include "emulator.hpp"

namespace megamoe::ptx {
inline uint32_t smem_address(const void* pointer) {  // the emulator's shared memory lies below 4 GB
    return static_cast<uint32_t>(reinterpret_cast<uint64_t>(pointer));
}
inline uint32_t cluster_rank() { return emulator::place().cluster_rank; }
inline void cluster_sync() { emulator::sync_cluster(); }
inline void mbarrier_init(uint64_t* barrier, uint32_t count) {
    emulator::mbarrier(barrier) = {static_cast<uint16_t>(count), static_cast<uint16_t>(count), 0};
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint64_t* barrier, uint32_t count = 1) {
    emulator::arriving();
    emulator::mbarrier(barrier).change(static_cast<int>(count), 0);
}
inline void mbarrier_arrive_cta(uint64_t* barrier, uint32_t cta) {
    mbarrier_arrive(static_cast<uint64_t*>(emulator::at_cta(barrier, cta)));
}
inline void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
    emulator::mbarrier(barrier).change(1, static_cast<int>(bytes));
}
inline void mbarrier_expect_cta(uint64_t* barrier, uint32_t cta, uint32_t bytes) {
    emulator::handing_out();
    mbarrier_expect(static_cast<uint64_t*>(emulator::at_cta(barrier, cta)), bytes);
}
inline bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
    emulator::yield();
    return (emulator::mbarrier(barrier).state & 1) != static_cast<int>(parity);
}
inline void store_async_cta(int4* slot, int4 value, uint64_t* barrier, uint32_t cta) {
    emulator::yield();
    *static_cast<int4*>(emulator::at_cta(slot, cta)) = value;
    emulator::mbarrier(static_cast<uint64_t*>(emulator::at_cta(barrier, cta))).change(0, -16);
}
}  // namespace megamoe::ptx
