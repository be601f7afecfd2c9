// The SwiGLU clamp as the kernels take it.
#pragma once
#include <cuda_bf16.h>

namespace megamoe {

// The limit twice; infinity is no clamp. The kernels clamp bf16 pairs, which is exact only for a limit that bf16 holds.
// Throws std::runtime_error for any other.
__nv_bfloat162 clamp_pair(float limit);

}  // namespace megamoe
