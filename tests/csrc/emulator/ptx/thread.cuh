#pragma once
#include "emulator.hpp"

namespace megamoe::ptx {
template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}
[[noreturn]] inline void exit_thread() { emulator::exit_thread(); }
}  // namespace megamoe::ptx
