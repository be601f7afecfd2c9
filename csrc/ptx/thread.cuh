// What a thread does about itself: its registers, its end.
#pragma once

namespace megamoe::ptx {

// By all warps of a warpgroup; the others of the CTA get what one gives up.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

[[noreturn]] __device__ __forceinline__ void exit_thread() {
    asm volatile("exit;");
    __builtin_unreachable();
}

}  // namespace megamoe::ptx
