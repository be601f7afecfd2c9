// What the emulator knows of running threads; shared by its own sources only.
#pragma once
#include <setjmp.h>

#include <atomic>
#include <functional>
#include <random>
#include <vector>

#include "cuda.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace emulator {

constexpr size_t kSharedBytes = 227 * 1024;
constexpr size_t kSharedWindow = 256 * 1024;  // apart, so that 18 bits of an address tell where in it

// What a copy brings or takes: bytes, or a box of a tensor map.
struct Part {
    void* shared;
    void* global;  // null: of the map
    uint32_t bytes;
    CUtensorMap map;
    int at[3];
};

struct Store {
    Part part;
    std::vector<uint8_t> data;
    int group;
    bool read;
    bool add;  // a box of fp32 is added to what is there
};

struct Load {
    Part part;
    uint64_t* barrier;
    unsigned ctas;  // of the cluster, a bit each
    uint64_t due;   // some take much longer than others
};

// A matrix instruction of one thread: its share of D.
struct Product {
    float* d;
    uint64_t a, b;
    bool a_mn, b_mn, accumulate;
    int group;
};

struct Cta;

struct Fiber {
    Place place;
    Cta* cta;
    jmp_buf state;
    bool started = false, done = false;
    int group = 0;  // bulk group being filled
    std::vector<Store> stores;
    int product_group = 0;
    std::vector<Product> products;
    // What a fence of the async proxy has still to order; see the rules in emulator.hpp.
    bool acquired = false, written = false, wrote_shared = false;
};

struct Barrier {
    int live = 0, arrived = 0;
    unsigned generation = 0;
};

struct Warp {
    int arrived = 0;
    unsigned generation = 0;
    Collective what{};
    uint64_t in[32], out[32];
};

struct Cluster;

struct Cta {
    Cluster* cluster;
    uint8_t* shared;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<Load> loads;
    uint64_t ticks = 0;
    Barrier barrier;
};

struct Cluster {
    std::vector<Cta> ctas;
    Barrier barrier;
    std::mt19937_64 random;
    uint64_t rounds = 0, next_stall = 0;
    const Warp* stalled = nullptr;
    bool polled = false;
    const std::function<void()>* body = nullptr;
    std::atomic<bool>* failed = nullptr;
};

extern thread_local Fiber* running;
inline Cta& cta() { return *running->cta; }
inline Cluster& cluster() { return *running->cta->cluster; }

// Of the threads of the running one's warp.
Fiber* warp_begin();

// Where the 128-byte swizzle puts an address of shared memory.
inline uint64_t swizzled(uint64_t address) { return address ^ (address >> 7 & 7) << 4; }

// When a thread yields: perhaps a pending copy or product makes a step.
void copies_step();
void products_step();
void end_of_thread();  // what it has stored is performed

}  // namespace emulator
