#pragma once
#include <type_traits>

#include "emulator.hpp"

namespace megamoe::ptx {
inline uint64_t load_acquire_sys(const uint64_t* address) {
    emulator::yield();
    emulator::acquired();
    return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}
inline uint64_t load_relaxed_sys(const uint64_t* address) { return __atomic_load_n(address, __ATOMIC_RELAXED); }
template <class T>
void store_release_sys(T* address, std::type_identity_t<T> value) {
    emulator::yield();
    emulator::released();
    __atomic_store_n(address, value, __ATOMIC_RELEASE);
}
inline uint32_t load_relaxed_sys(const uint32_t* address) {
    emulator::yield();
    return __atomic_load_n(address, __ATOMIC_RELAXED);
}
inline int load_acquire_gpu(const int* address) {
    emulator::yield();
    emulator::acquired();
    return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}
inline int load_relaxed_gpu(const int* address) {
    emulator::yield();
    return __atomic_load_n(address, __ATOMIC_RELAXED);
}
inline void add_release_gpu(int* address, int value) {
    emulator::yield();
    emulator::released(true);
    __atomic_fetch_add(address, value, __ATOMIC_RELEASE);
}
inline void fence_acq_rel_sys() { __atomic_thread_fence(__ATOMIC_ACQ_REL); }
inline int add_acq_rel_gpu(int* address, int value) {
    emulator::yield();
    emulator::released();
    emulator::acquired();
    return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}
inline int load_int(const int* address) { return *address; }
inline float load_float(const float* address) { return *address; }
inline uint4 load_v4(const void* address) { return *static_cast<const uint4*>(address); }
inline uint4 load_v4_once(const void* address) { return load_v4(address); }
inline void store_v4(void* address, uint4 v) { *static_cast<uint4*>(address) = v; }
inline void store_v4_once(void* address, uint4 v) { store_v4(address, v); }
}  // namespace megamoe::ptx
