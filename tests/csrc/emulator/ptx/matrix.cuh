#pragma once
#include "ptx/barrier.cuh"

namespace megamoe::ptx {
template <class T>
T& shared_at(uint64_t address) {
    return *reinterpret_cast<T*>(address);
}
// Lane i gives the address of row i % 8 of block i / 8; this lane's registers are of row lane / 4.
inline void load_matrix_x4(uint32_t address, uint32_t (&v)[4]) {
    const uint64_t* rows = emulator::exchange(address);
    const unsigned lane = emulator::place().thread.x % 32;
    for (unsigned i = 0; i < 4; ++i) v[i] = shared_at<uint32_t>(rows[i * 8 + lane / 4] + lane % 4 * 4);
}
inline void store_matrix_x4(uint32_t address, uint32_t v0, uint32_t v1, uint32_t v2, uint32_t v3) {
    const uint64_t* rows = emulator::exchange(address);
    const unsigned lane = emulator::place().thread.x % 32;
    const uint32_t v[4] = {v0, v1, v2, v3};
    for (unsigned i = 0; i < 4; ++i) shared_at<uint32_t>(rows[i * 8 + lane / 4] + lane % 4 * 4) = v[i];
    emulator::wrote_shared();
}
inline uint4 load_shared_v4(uint32_t address) { return shared_at<uint4>(address); }
inline void store_shared_v4(uint32_t address, uint4 v) {
    emulator::wrote_shared();
    shared_at<uint4>(address) = v;
}
inline float2 load_shared_v2(uint32_t address) { return shared_at<float2>(address); }
inline void store_shared_v2(uint32_t address, float v0, float v1) {
    emulator::wrote_shared();
    shared_at<float2>(address) = {v0, v1};
}
}  // namespace megamoe::ptx
