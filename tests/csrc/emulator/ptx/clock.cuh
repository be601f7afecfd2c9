#pragma once
#include <chrono>

namespace megamoe::ptx {
inline unsigned long long global_nanoseconds() {
    return static_cast<unsigned long long>(std::chrono::steady_clock::now().time_since_epoch().count());
}
}  // namespace megamoe::ptx
