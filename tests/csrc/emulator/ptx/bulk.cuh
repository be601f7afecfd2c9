#pragma once
#include "ptx/barrier.cuh"

namespace megamoe::ptx {
inline void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* barrier) {
    emulator::load(dst, src, bytes, barrier);
}
inline void bulk_store(void* dst, const void* src, uint32_t bytes) { emulator::store(dst, src, bytes); }
inline void fence_async() { emulator::fence_async(); }
}  // namespace megamoe::ptx
