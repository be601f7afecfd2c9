// Clamped SwiGLU and its derivative on pairs of bf16, used by every kernel so that a recomputation is bit-identical.
//   g' = min(g, c), u' = clamp(u, -c, c), a = p * silu(g') * u'          (DESIGN section 2; clamp of DeepSeek-V4)
// The clamp works on the packed pair, which is exact because c itself is a bf16 number (the host checks) and costs half
// the instructions. NaN passes through it. Each fp32 operation is written with its rounding: nothing is contracted.
#pragma once
#include <cuda_bf16.h>

#include "ptx/approximate.cuh"

namespace megamoe {

using Pair = __nv_bfloat162;

__device__ __forceinline__ Pair as_pair(uint32_t bits) { return *reinterpret_cast<const Pair*>(&bits); }
__device__ __forceinline__ uint32_t as_bits(Pair pair) { return *reinterpret_cast<const uint32_t*>(&pair); }
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    return as_bits(__floats2bfloat162_rn(low, high));
}
__device__ __forceinline__ float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ uint32_t clamp_gate(uint32_t g, Pair limit) {
    return as_bits(__hmin2_nan(as_pair(g), limit));
}
__device__ __forceinline__ uint32_t clamp_up(uint32_t u, Pair limit) {
    return as_bits(__hmax2_nan(__hmin2_nan(as_pair(u), limit), __hneg2(limit)));
}

// 1 / (1 + 2^(-x log2 e)); an overflow of 2^ gives 1/inf = 0, the right limit.
__device__ __forceinline__ float sigmoid(float x) {
    return ptx::reciprocal_approximate(__fadd_rn(1.0f, ptx::exp2_approximate(__fmul_rn(x, -1.4426950408889634f))));
}

// silu(g') u' of one element: what a and dp share.
__device__ __forceinline__ float gated(float g, float u) { return __fmul_rn(__fmul_rn(g, sigmoid(g)), u); }

// a of two neighbouring columns of one row.
__device__ __forceinline__ uint32_t swiglu(uint32_t g, uint32_t u, float p, Pair limit) {
    const uint32_t gc = clamp_gate(g, limit), uc = clamp_up(u, limit);
    return pack_bf16(__fmul_rn(p, gated(bf16_low(gc), bf16_low(uc))),
                     __fmul_rn(p, gated(bf16_high(gc), bf16_high(uc))));
}

struct ElementGrad {
    float dg, du, a;
};

// g and u already clamped; da_bar reaches a before p is multiplied in. Adds <da_bar, silu(g')u'> to dp.
__device__ __forceinline__ ElementGrad element_grad(float g, float u, float p, float da_bar, float& dp) {
    const float sig = sigmoid(g);
    const float silu = __fmul_rn(g, sig);
    const float s = __fmul_rn(silu, u);
    const float da = __fmul_rn(p, da_bar);
    // silu'(g) = sig + silu (1 - sig)
    const float dsilu = __fmaf_rn(silu, __fsub_rn(1.0f, sig), sig);
    dp = __fmaf_rn(da_bar, s, dp);
    return {__fmul_rn(__fmul_rn(da, u), dsilu), __fmul_rn(da, silu), __fmul_rn(p, s)};
}

struct PairGrad {
    uint32_t dg, du, a;
};

__device__ __forceinline__ PairGrad swiglu_grad(uint32_t g, uint32_t u, float p, const float* da_bar, Pair limit,
                                                float& dp) {
    const uint32_t gc = clamp_gate(g, limit), uc = clamp_up(u, limit);
    const ElementGrad low = element_grad(bf16_low(gc), bf16_low(uc), p, da_bar[0], dp);
    const ElementGrad high = element_grad(bf16_high(gc), bf16_high(uc), p, da_bar[1], dp);
    // Beyond the clamp nothing flows back.
    const uint32_t g_cut = __hgt2_mask(as_pair(g), limit), u_cut = __hgt2_mask(__habs2(as_pair(u)), limit);
    return {pack_bf16(low.dg, high.dg) & ~g_cut, pack_bf16(low.du, high.du) & ~u_cut, pack_bf16(low.a, high.a)};
}

}  // namespace megamoe
