#pragma once
#include "emulator.hpp"

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(uint32_t{value.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {  // to nearest, ties to even
    const uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

template <class Operation>
__nv_bfloat162 emulated_pair(__nv_bfloat162 a, __nv_bfloat162 b, Operation operation) {
    return __floats2bfloat162_rn(operation(__bfloat162float(a.x), __bfloat162float(b.x)),
                                 operation(__bfloat162float(a.y), __bfloat162float(b.y)));
}
inline float emulated_nan(float a, float b, float otherwise) { return a != a ? a : b != b ? b : otherwise; }
inline __nv_bfloat162 __hmin2_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
    return emulated_pair(a, b, [](float x, float y) { return emulated_nan(x, y, x < y ? x : y); });
}
inline __nv_bfloat162 __hmax2_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
    return emulated_pair(a, b, [](float x, float y) { return emulated_nan(x, y, x > y ? x : y); });
}
inline __nv_bfloat162 __hneg2(__nv_bfloat162 a) {
    return {{static_cast<uint16_t>(a.x.bits ^ 0x8000)}, {static_cast<uint16_t>(a.y.bits ^ 0x8000)}};
}
inline __nv_bfloat162 __habs2(__nv_bfloat162 a) {
    return {{static_cast<uint16_t>(a.x.bits & 0x7fff)}, {static_cast<uint16_t>(a.y.bits & 0x7fff)}};
}
inline unsigned __hgt2_mask(__nv_bfloat162 a, __nv_bfloat162 b) {
    return (__bfloat162float(a.x) > __bfloat162float(b.x) ? 0xffffu : 0u) |
           (__bfloat162float(a.y) > __bfloat162float(b.y) ? 0xffff0000u : 0u);
}
