#pragma once
#include "emulator.hpp"

namespace megamoe::ptx {
inline float exp2_approximate(float x) { return std::exp2(x); }
inline float reciprocal_approximate(float x) { return 1.0f / x; }
}  // namespace megamoe::ptx
