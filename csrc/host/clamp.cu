#include "host/clamp.hpp"

#include <stdexcept>
#include <string>

namespace megamoe {

__nv_bfloat162 clamp_pair(float limit) {
    const __nv_bfloat16 rounded = __float2bfloat16_rn(limit);
    if (!(limit > 0) || __bfloat162float(rounded) != limit) {
        throw std::runtime_error("megamoe: clamp is " + std::to_string(limit) +
                                 "; allowed: positive numbers that bf16 represents exactly, such as 10");
    }
    return __halves2bfloat162(rounded, rounded);
}

}  // namespace megamoe
