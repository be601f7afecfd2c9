#pragma once
#include "emulator.hpp"

struct __nv_bfloat162 {
    uint16_t x, y;
};

inline uint16_t emulated_bfloat16(float value) {  // round to nearest, ties to even
    const uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {emulated_bfloat16(x), emulated_bfloat16(y)}; }
