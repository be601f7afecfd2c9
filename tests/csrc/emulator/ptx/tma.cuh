#pragma once
#include "ptx/barrier.cuh"

namespace megamoe::ptx {
inline void tma_store_commit() { emulator::commit(); }
template <int kPending>
void tma_store_wait_read() {
    emulator::wait_stores(kPending, false);
}
inline void tma_store_wait_all() { emulator::wait_stores(0, true); }
inline void fence_async_shared() { emulator::fence_async_shared(); }
}  // namespace megamoe::ptx
