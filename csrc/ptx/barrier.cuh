// mbarriers and cluster synchronisation.
#pragma once
#include <cstdint>

namespace megamoe::ptx {

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Address of the same shared variable in CTA `cta` of the cluster.
__device__ __forceinline__ uint32_t map_to_cta(uint32_t address, uint32_t cta) {
    uint32_t mapped;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(cta));
    return mapped;
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(count) : "memory");
}

// Makes the initialised barriers visible to the peers of the cluster and to the async proxy.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier, uint32_t count = 1) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)), "r"(count) : "memory");
}

// On the barrier of CTA `cta` of the cluster. Default semantics on purpose: the explicit form .release.cluster compiles
// to a GPU-wide memory barrier (measured: fc1 at 500 instead of 700 TFLOP/s), and what these arrivals hand over are
// reads that are complete (wgmma waited for, loads consumed), after which only TMA or st.async write.
__device__ __forceinline__ void mbarrier_arrive_cta(uint64_t* barrier, uint32_t cta) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(map_to_cta(smem_address(barrier), cta))
                 : "memory");
}

__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)), "r"(bytes)
                 : "memory");
}

// Released at cluster scope. Who waits for it (mbarrier_try_wait) acquires at CTA scope only; see docs/kernels.md,
// "Who waits for what", for why that is enough.
__device__ __forceinline__ void mbarrier_expect_cta(uint64_t* barrier, uint32_t cta, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(
                     map_to_cta(smem_address(barrier), cta)),
                 "r"(bytes)
                 : "memory");
}

// What the waiter reads next was written by TMA or st.async, whose completion on the barrier makes it visible.
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(smem_address(barrier)), "r"(parity)
        : "memory");
    return done != 0;
}

// Stores 16 bytes into CTA `cta` and completes 16 transaction bytes on the barrier beside them.
__device__ __forceinline__ void store_async_cta(int4* slot, int4 value, uint64_t* barrier, uint32_t cta) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                     map_to_cta(smem_address(slot), cta)),
                 "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(map_to_cta(smem_address(barrier), cta))
                 : "memory");
}

}  // namespace megamoe::ptx
