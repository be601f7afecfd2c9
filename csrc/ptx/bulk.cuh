// Bulk copies between global (own or a peer's) and shared memory, without a tensor map. Sizes and addresses: x 16
// bytes.
#pragma once
#include "ptx/barrier.cuh"

namespace megamoe::ptx {

// Completes `bytes` transaction bytes on the barrier.
__device__ __forceinline__ void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     smem_address(dst)),
                 "l"(src), "r"(bytes), "r"(smem_address(barrier))
                 : "memory");
}

// Joins the calling thread's current bulk group.
__device__ __forceinline__ void bulk_store(void* dst, const void* src, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(smem_address(src)),
                 "r"(bytes)
                 : "memory");
}

// Orders generic and async accesses of this thread, to any memory, in both directions.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

}  // namespace megamoe::ptx
