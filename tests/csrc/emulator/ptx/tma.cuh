#pragma once
#include "cuda.h"
#include "ptx/barrier.cuh"
#include "ptx/policy.cuh"

namespace megamoe::ptx {
inline void tensor_map_acquire(const CUtensorMap*) {}
inline void tma_load_2d(void* dst, const CUtensorMap* map, uint64_t* barrier, int x, int y, uint64_t) {
    emulator::load_box(dst, map, barrier, x, y, 0, 0);
}
inline void tma_load_2d_multicast(void* dst, const CUtensorMap* map, uint64_t* barrier, int x, int y, uint16_t ctas,
                                  uint64_t) {
    emulator::load_box(dst, map, barrier, x, y, 0, ctas);
}
inline void tma_load_3d(void* dst, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z, uint64_t) {
    emulator::load_box(dst, map, barrier, x, y, z, 0);
}
inline void tma_load_3d_multicast(void* dst, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z,
                                  uint16_t ctas, uint64_t) {
    emulator::load_box(dst, map, barrier, x, y, z, ctas);
}
inline void tma_store_2d(const CUtensorMap* map, const void* src, int x, int y) { emulator::store_box(map, src, x, y); }
inline void tma_add_2d(const CUtensorMap* map, const void* src, int x, int y) { emulator::add_box(map, src, x, y); }
inline void tma_store_commit() { emulator::commit(); }
template <int kPending>
void tma_store_wait_read() {
    emulator::wait_stores(kPending, false);
}
inline void tma_store_wait_all() { emulator::wait_stores(0, true); }
inline void fence_async_shared() { emulator::fence_async_shared(); }
}  // namespace megamoe::ptx
