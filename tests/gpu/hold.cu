// A kernel of somebody else that holds SMs: each CTA takes all shared memory of one, so that nothing else runs there,
// until the host sets *release or `nanoseconds` have passed.
#include <cuda_runtime.h>

__global__ void hold_kernel(volatile int* held, volatile int* release, unsigned long long nanoseconds) {
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    if (threadIdx.x == 0) atomicAdd_system(const_cast<int*>(held), 1);
    do {
        __nanosleep(1000);
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    } while (*release == 0 && now - start < nanoseconds);
}

// cluster_size 2 holds SMs by pairs, so that the free ones are pairs that a cluster of two fits on.
extern "C" int hold(int sms, int cluster_size, void* held, void* release, unsigned long long nanoseconds,
                    void* stream) {
    constexpr int kBytes = 227 * 1024;
    cudaError_t error = cudaFuncSetAttribute(hold_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = cluster_size;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(sms);
    config.blockDim = dim3(32);
    config.dynamicSmemBytes = kBytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cluster;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, hold_kernel, static_cast<volatile int*>(held),
                              static_cast<volatile int*>(release), nanoseconds);
}
