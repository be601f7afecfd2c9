// Runs CUDA kernels of csrc/ on the CPU, for tests: the source is the kernels' own (see build.py), this replaces what
// the compiler and ptx/ give it. A CUDA thread is a fiber, a resident cluster an operating-system thread, a stream a
// worker.
//
// Asynchronous copies really happen later: at random moments, in random order, a store reads shared memory first and
// writes its target some time after. So do matrix instructions, which read shared memory then. So a missing wait shows
// as wrong data. Memory order weaker than the host's is not modelled. Fences between the generic and the async proxy
// are, by rules that end the process where they are broken:
//   acquire (by this thread or one it met since)    fence.proxy.async by this thread   bulk load; a unit handed out
//   bulk stores written, by any thread of the CTA   fence.proxy.async by that thread   release by the CTA
//      (in a kernel of clusters: of the warp)                                             (of a counter)
//   plain stores to shared memory, by the warp      fence.proxy.async by the writers   bulk store; an arrival
// and an mbarrier must not get more arrivals than its phase has.
#pragma once
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

// ---- what cuda_runtime.h would define ----
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)  // build.py tells the launch
#define __align__(n)
#define __shared__ static thread_local  // one CTA a thread; kernels of clusters have no such variables

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = struct CUstream_st*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = 6, cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, int, size_t) {
    return cudaSuccess;
}

struct CUtensorMap;

namespace emulator {

struct Place {
    dim3 thread, block, block_size, grid;
    unsigned cluster_rank;
};
const Place& place();
void yield();
void nanosleep();
[[noreturn]] void trap();
[[noreturn]] void exit_thread();
void sync_threads();
void sync_cluster();
uint8_t* dynamic_shared();
void* at_cta(const void* shared, unsigned rank);  // the same place in another CTA of the cluster

enum class Collective { kSync, kShuffle, kShuffleUp, kBallot, kAny, kMatch, kAdd, kOr, kExchange };
uint64_t collective(Collective what, unsigned mask, uint64_t value, int argument = 0);
// What each lane gave; to be read before the warp meets again.
inline const uint64_t* exchange(uint64_t value) {
    return reinterpret_cast<const uint64_t*>(collective(Collective::kExchange, ~0u, value));
}

struct Launch {
    unsigned cluster;  // CTAs
    dim3 grid, block;
    size_t shared_bytes;
    cudaStream_t stream;
    std::function<void()> thread;
};
void enqueue(cudaStream_t stream, std::function<void()> work);
void run_grid(const Launch& launch);

template <class... Parameters, class... Arguments>
void launch(unsigned cluster, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Arguments... arguments) {
    const Launch launch{cluster, grid, block, shared_bytes, stream, [=] { kernel(arguments...); }};
    enqueue(stream, [=] { run_grid(launch); });
}

// Bulk copies of the running CTA.
void load(void* to, const void* from, uint32_t bytes, uint64_t* barrier);
void store(void* to, const void* from, uint32_t bytes);
void commit();
void wait_stores(int pending, bool written);

// Boxes of tensor maps. ctas: of the cluster, a bit each; 0: the running one.
void load_box(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z, unsigned ctas);
void store_box(const CUtensorMap* map, const void* from, int x, int y);
void add_box(const CUtensorMap* map, const void* from, int x, int y);

// wgmma m64n256k16: d, the running thread's share.
void multiply(float* d, uint64_t a, bool a_mn, uint64_t b, bool b_mn, bool accumulate);
void commit_products();
void wait_products(int pending);

// For the rules above.
void acquired();
void released(bool counter = false);
void wrote_shared();
void fence_async();
void fence_async_shared();
void arriving();
void handing_out();
[[noreturn]] void die(const char* why);

struct Mbarrier {
    uint16_t count, pending;
    int32_t state;  // transaction bytes still to come, times two, and the phase bit

    void change(int arrivals, int bytes) {
        if (arrivals > pending) die("an mbarrier got more arrivals than its phase has");
        state += 2 * bytes;
        pending = static_cast<uint16_t>(pending - arrivals);
        if (pending == 0 && state / 2 == 0) pending = count, state ^= 1;
    }
};
static_assert(sizeof(Mbarrier) == 8);
inline Mbarrier& mbarrier(uint64_t* word) { return *reinterpret_cast<Mbarrier*>(word); }

}  // namespace emulator

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
    emulator::enqueue(stream, [=] { std::memset(to, value, bytes); });
    return cudaSuccess;
}

#define threadIdx (emulator::place().thread)
#define blockIdx (emulator::place().block)
#define blockDim (emulator::place().block_size)
#define gridDim (emulator::place().grid)

inline void __syncthreads() { emulator::sync_threads(); }
inline void __syncwarp() { emulator::collective(emulator::Collective::kSync, ~0u, 0); }
template <class T>
T emulated_shuffle(emulator::Collective what, unsigned mask, T value, int argument) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = emulator::collective(what, mask, bits, argument);
    return std::memcpy(&value, &bits, sizeof(T)), value;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
    return emulated_shuffle(emulator::Collective::kShuffle, mask, value, lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int step) {
    return emulated_shuffle(emulator::Collective::kShuffleUp, mask, value, step);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return __shfl_sync(mask, value, static_cast<int>(emulator::place().thread.x % 32) ^ lanes);
}
inline unsigned __ballot_sync(unsigned mask, bool value) {
    return static_cast<unsigned>(emulator::collective(emulator::Collective::kBallot, mask, value));
}
inline bool __any_sync(unsigned mask, bool value) {
    return emulator::collective(emulator::Collective::kAny, mask, value) != 0;
}
inline unsigned __match_any_sync(unsigned mask, int value) {
    return static_cast<unsigned>(
        emulator::collective(emulator::Collective::kMatch, mask, static_cast<uint64_t>(value)));
}
inline int __reduce_add_sync(unsigned mask, int value) {
    return static_cast<int>(emulator::collective(emulator::Collective::kAdd, mask, static_cast<uint64_t>(value)));
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
    return static_cast<unsigned>(emulator::collective(emulator::Collective::kOr, mask, value));
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline void __nanosleep(unsigned) { emulator::nanosleep(); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline long long clock64() { return 0; }
[[noreturn]] inline void __trap() { emulator::trap(); }
inline float __uint_as_float(uint32_t bits) {
    float value;
    return std::memcpy(&value, &bits, 4), value;
}
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    return std::memcpy(&bits, &value, 4), bits;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

inline int atomicAdd(int* address, int value) {
    emulator::yield();
    return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}
inline unsigned atomicOr(unsigned* address, unsigned value) {
    emulator::yield();
    return __atomic_fetch_or(address, value, __ATOMIC_ACQ_REL);
}
inline int atomicMax(int* address, int value) {
    int old = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (old < value &&
           !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {}
    return old;
}
inline int atomicCAS_system(int* address, int expected, int value) {
    __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    return expected;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}
template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}
template <class T>
T min(T a, T b) {
    return a < b ? a : b;
}
