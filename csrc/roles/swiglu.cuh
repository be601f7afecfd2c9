// Clamped SwiGLU and its derivative, used by every kernel so that a recomputation is bit-identical.
//   g' = min(g, c), u' = clamp(u, -c, c), a = p * silu(g') * u'          (DESIGN section 2; clamp of DeepSeek-V4)
// NaN passes through the clamp; each operation is rounded once (no contraction by the compiler).
#pragma once
#include <cuda_bf16.h>

namespace megamoe {

struct SwiGLUGrad {
    float dg;
    float du;
    float a;
    float dp;  // this element's share of <da_bar, silu(g')u'>
};

// Comparisons with NaN are false, so NaN stays.
__device__ __forceinline__ float clamp_above(float x, float limit) { return x > limit ? limit : x; }
__device__ __forceinline__ float clamp_both(float x, float limit) {
    return x > limit ? limit : (x < -limit ? -limit : x);
}

__device__ __forceinline__ float sigmoid(float x) {
    // 1 / (1 + 2^(-x log2 e)); exp2 overflow gives 1/inf = 0, the right limit.
    float e, r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(__fmul_rn(x, -1.4426950408889634f)));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(__fadd_rn(1.0f, e)));
    return r;
}

// silu(g') u' without the routing weight: what dp multiplies.
__device__ __forceinline__ float swiglu_unweighted(float g, float u, float limit) {
    const float gc = clamp_above(g, limit);
    const float uc = clamp_both(u, limit);
    return __fmul_rn(__fmul_rn(gc, sigmoid(gc)), uc);
}

__device__ __forceinline__ float swiglu(float g, float u, float p, float limit) {
    return __fmul_rn(p, swiglu_unweighted(g, u, limit));
}

// da_bar is the gradient that reaches a before p is multiplied in.
__device__ __forceinline__ SwiGLUGrad swiglu_grad(float g, float u, float p, float da_bar, float limit) {
    const float gc = clamp_above(g, limit);
    const float uc = clamp_both(u, limit);
    const float sig = sigmoid(gc);
    const float silu = __fmul_rn(gc, sig);
    const float s = __fmul_rn(silu, uc);
    const float da = __fmul_rn(p, da_bar);
    // silu'(g) = sig + silu (1 - sig)
    const float dsilu = __fmaf_rn(silu, __fsub_rn(1.0f, sig), sig);
    SwiGLUGrad out;
    out.a = __fmul_rn(p, s);
    out.dp = __fmul_rn(da_bar, s);
    out.dg = g > limit ? 0.0f : __fmul_rn(__fmul_rn(da, uc), dsilu);
    out.du = fabsf(u) > limit ? 0.0f : __fmul_rn(da, silu);
    return out;
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

}  // namespace megamoe
