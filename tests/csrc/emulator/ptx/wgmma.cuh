#pragma once

namespace megamoe::ptx {
enum class Major : int { K = 0, MN = 1 };  // no product runs here
}  // namespace megamoe::ptx
