#include "emulator.hpp"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace emulator {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kSharedBytes = 227 * 1024;
constexpr int kRoundsOfAPoll = 32;  // at most, from one nanosleep of a waiting thread to its next

std::atomic<int> resident_ctas{2};  // per launch
std::atomic<int> chance{50};        // of a pending copy to make a step when a thread yields, in percent
std::atomic<uint64_t> seed{1};
std::atomic<uint64_t> progress{0};  // changes while any rank is given work or does more than poll

[[noreturn]] void die(const char* why) {
    std::fprintf(stderr, "emulator: %s\n", why);
    std::_Exit(3);
}

struct Store {
    uint8_t* to;
    const uint8_t* from;
    std::vector<uint8_t> data;
    uint32_t bytes;
    int group;
    bool read;
};

struct Load {
    void* to;
    const void* from;
    uint32_t bytes;
    uint64_t* barrier;
    uint64_t due;  // some take much longer than others
};

struct Fiber {
    Place place;
    jmp_buf state;
    bool started = false, done = false;
    int group = 0;  // bulk group being filled
    std::vector<Store> stores;
    // What a fence of the async proxy has still to order; see the rules in emulator.hpp.
    bool acquired = false, written = false, wrote_shared = false;
};

struct Warp {
    int arrived = 0;
    unsigned generation = 0;
    Collective what{};
    uint64_t in[32], out[32];
    int argument[32];
};

struct Cta {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<Load> loads;
    uint64_t ticks = 0;
    bool polled = false;
    int live = 0, arrived = 0;
    unsigned generation = 0;
    std::mt19937_64 random;
    const std::function<void()>* body = nullptr;
    std::atomic<bool>* failed = nullptr;
};

thread_local Cta* cta;
thread_local Fiber* running;
thread_local jmp_buf scheduler;
thread_local uint8_t* stacks;
thread_local uint8_t* shared;

void finish_load(size_t index) {
    const Load load = cta->loads[index];
    cta->loads.erase(cta->loads.begin() + static_cast<long>(index));
    std::memcpy(load.to, load.from, load.bytes);
    mbarrier(load.barrier).change(0, -static_cast<int>(load.bytes));
}

void read_store(Store& store) {
    if (store.read) return;
    store.data.assign(store.from, store.from + store.bytes);
    store.read = true;
}

void copies_step() {
    ++cta->ticks;
    if (static_cast<int>(cta->random() % 100) >= chance) return;
    if (!cta->loads.empty() && cta->random() % 2) {
        const size_t index = cta->random() % cta->loads.size();
        if (cta->loads[index].due <= cta->ticks) finish_load(index);
        return;
    }
    if (running->stores.empty()) return;
    const size_t index = cta->random() % running->stores.size();
    Store& store = running->stores[index];
    if (store.group == running->group) return;  // not committed yet
    if (!store.read) return read_store(store);
    std::memcpy(store.to, store.data.data(), store.bytes);
    running->stores.erase(running->stores.begin() + static_cast<long>(index));
    running->written = true;
}

// What one of them has acquired, all have after they met.
void share_acquired(size_t first, size_t end) {
    const auto begin = cta->fibers.begin();
    const bool any = std::any_of(begin + static_cast<long>(first), begin + static_cast<long>(end),
                                 [](const Fiber& fiber) { return fiber.acquired; });
    for (size_t i = first; any && i < end; ++i) cta->fibers[i].acquired = true;
}

void release_barrier() {
    if (cta->live == 0 || cta->arrived != cta->live) return;
    cta->arrived = 0, ++cta->generation;
    share_acquired(0, cta->fibers.size());
}

void fiber_main() {
    (*cta->body)();
    for (const Store& store : running->stores) {
        if (!store.read) die("a thread ended while its bulk store was reading shared memory");
        std::memcpy(store.to, store.data.data(), store.bytes);
    }
    running->stores.clear();
    running->done = true;
    --cta->live;
    release_barrier();
    _longjmp(scheduler, 1);
}

void resume(Fiber& fiber, size_t index) {
    running = &fiber;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.state, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + index * kStackBytes;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    setcontext(&context);
}

void run_cta(dim3 grid, dim3 block, dim3 index, const std::function<void()>& body, std::atomic<bool>& failed) {
    Cta mine;
    cta = &mine;
    mine.fibers.resize(block.x);
    mine.warps.resize((block.x + 31) / 32);
    mine.live = static_cast<int>(block.x);
    mine.random.seed(seed.fetch_add(1) * 0x9e3779b97f4a7c15ull);
    mine.body = &body;
    mine.failed = &failed;
    for (unsigned t = 0; t < block.x; ++t) mine.fibers[t].place = {dim3(t, 0, 0), index, block, grid};
    std::memset(shared, 0xCD, kSharedBytes);
    int since_poll = 0;
    while (mine.live > 0 && !failed) {
        // Warps in random order; the threads of a warp mostly together, as hardware runs them.
        const size_t first = mine.random() % mine.fibers.size();
        for (size_t i = 0; i < mine.fibers.size() && !failed; ++i) {
            const size_t at = (first + i) % mine.fibers.size();
            if (!mine.fibers[at].done) resume(mine.fibers[at], at);
        }
        // A thread polls another rank: leave it the processor.
        if (mine.polled) {
            std::this_thread::sleep_for(std::chrono::microseconds(200));
            since_poll = 0;
        } else if (++since_poll > kRoundsOfAPoll) {
            ++progress;
        }
        mine.polled = false;
        std::this_thread::yield();
    }
    if (!failed && !mine.loads.empty()) die("a CTA ended with bulk loads in flight");
}

struct Stream {
    std::deque<std::function<void()>> queue;
    std::mutex mutex;
    std::condition_variable changed;
    bool busy = false;
    std::atomic<bool> failed{false};
    std::thread worker;
};

std::mutex streams_mutex;
std::map<cudaStream_t, Stream*> streams;  // never freed: a worker may wait in it for ever

void work(Stream* stream) {
    std::unique_lock lock(stream->mutex);
    while (true) {
        stream->changed.wait(lock, [&] { return !stream->queue.empty(); });
        auto next = std::move(stream->queue.front());
        stream->queue.pop_front();
        stream->busy = true;
        lock.unlock();
        if (!stream->failed) next();
        lock.lock();
        stream->busy = false;
        stream->changed.notify_all();
    }
}

Stream& stream_of(cudaStream_t handle) {
    const std::lock_guard lock(streams_mutex);
    Stream*& stream = streams[handle];
    if (stream == nullptr) {
        stream = new Stream;
        stream->worker = std::thread(work, stream);
        stream->worker.detach();
    }
    return *stream;
}

}  // namespace

const Place& place() { return running->place; }

void yield() {
    copies_step();
    if (!_setjmp(running->state)) _longjmp(scheduler, 1);
}

void nanosleep() {
    cta->polled = true;
    yield();
}

void trap() {
    *cta->failed = true;
    while (true) yield();
}

void sync_threads() {
    const unsigned mine = cta->generation;
    ++cta->arrived;
    release_barrier();
    while (cta->generation == mine) yield();
}

uint8_t* dynamic_shared() { return shared; }

uint64_t collective(Collective what, unsigned mask, uint64_t value, int argument) {
    if (mask != ~0u) die("only collectives of the whole warp are emulated");
    Warp& warp = cta->warps[running->place.thread.x / 32];
    const int lane = static_cast<int>(running->place.thread.x % 32);
    if (warp.arrived == 0) warp.what = what;
    if (warp.what != what) die("the threads of a warp met in different collectives");
    warp.in[lane] = value;
    warp.argument[lane] = argument;
    const unsigned mine = warp.generation;
    if (++warp.arrived == 32) {
        const size_t first = running->place.thread.x / 32 * 32;
        share_acquired(first, first + 32);
        std::copy(warp.in, warp.in + 32, warp.out);
        warp.arrived = 0;
        ++warp.generation;
    }
    while (warp.generation == mine) yield();
    const uint64_t* all = warp.out;
    uint64_t result = 0;
    switch (what) {
        case Collective::kSync: break;
        case Collective::kShuffle: return all[argument & 31];
        case Collective::kShuffleUp: return lane >= argument ? all[lane - argument] : value;
        case Collective::kBallot:
            for (int i = 0; i < 32; ++i) result |= (all[i] ? 1ull : 0ull) << i;
            break;
        case Collective::kAny: return std::any_of(all, all + 32, [](uint64_t v) { return v != 0; });
        case Collective::kMatch:
            for (int i = 0; i < 32; ++i) result |= (all[i] == value ? 1ull : 0ull) << i;
            break;
        case Collective::kAdd:
            for (int i = 0; i < 32; ++i) result += all[i];
            break;
        case Collective::kOr:
            for (int i = 0; i < 32; ++i) result |= all[i];
            break;
    }
    return result;
}

void load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    if (bytes % 16 || reinterpret_cast<uint64_t>(to) % 16 || reinterpret_cast<uint64_t>(from) % 16) {
        die("a bulk load is not aligned to 16 bytes");
    }
    if (running->acquired) die("a bulk load follows an acquire without fence.proxy.async between them");
    const uint64_t slow = cta->random() % 4 ? 0 : cta->random() % 3000;
    cta->loads.push_back({to, from, bytes, barrier, cta->ticks + slow});
}

void store(void* to, const void* from, uint32_t bytes) {
    if (bytes % 16 || reinterpret_cast<uint64_t>(to) % 16 || reinterpret_cast<uint64_t>(from) % 16) {
        die("a bulk store is not aligned to 16 bytes");
    }
    const size_t first = running->place.thread.x / 32 * 32;
    for (size_t i = first; i < first + 32; ++i) {
        if (cta->fibers[i].wrote_shared) die("a bulk store follows plain stores to shared memory without a fence");
    }
    running->stores.push_back(
        {static_cast<uint8_t*>(to), static_cast<const uint8_t*>(from), {}, bytes, running->group, false});
}

void commit() { ++running->group; }

void wait_stores(int pending, bool written) {
    yield();
    auto& stores = running->stores;
    for (size_t i = 0; i < stores.size();) {
        if (stores[i].group >= running->group - pending) {
            ++i;
            continue;
        }
        read_store(stores[i]);
        if (!written) {
            ++i;
            continue;
        }
        std::memcpy(stores[i].to, stores[i].data.data(), stores[i].bytes);
        stores.erase(stores.begin() + static_cast<long>(i));
        running->written = true;
    }
}

void acquired() { running->acquired = true; }
void wrote_shared() { running->wrote_shared = true; }
void fence_async_shared() { running->wrote_shared = false; }
void fence_async() { running->acquired = running->written = running->wrote_shared = false; }

void released() {
    for (const Fiber& fiber : cta->fibers) {
        if (fiber.written) die("a release follows bulk stores without fence.proxy.async between them");
        if (!fiber.stores.empty()) die("a release follows bulk stores that were not waited for");
    }
}

void enqueue(cudaStream_t handle, std::function<void()> item) {
    Stream& stream = stream_of(handle);
    ++progress;
    const std::lock_guard lock(stream.mutex);
    stream.queue.push_back(std::move(item));
    stream.changed.notify_all();
}

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t handle, std::function<void()> thread) {
    if (grid.x * grid.y == 0 || block.x == 0 || block.x % 32 || shared_bytes > kSharedBytes) die("bad launch");
    Stream& stream = stream_of(handle);
    std::vector<dim3> order;
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) order.emplace_back(x, y, 0);
    }
    std::mt19937_64 random(seed.fetch_add(1));
    std::shuffle(order.begin(), order.end(), random);
    std::atomic<size_t> next{0};
    auto resident = [&] {
        stacks = static_cast<uint8_t*>(
            mmap(nullptr, block.x * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        shared = static_cast<uint8_t*>(std::aligned_alloc(1024, kSharedBytes));
        for (size_t i = next++; i < order.size() && !stream.failed; i = next++) {
            run_cta(grid, block, order[i], thread, stream.failed);
        }
        std::free(shared);
        munmap(stacks, block.x * kStackBytes);
    };
    std::vector<std::thread> threads;
    for (size_t i = 0; i < std::min<size_t>(order.size(), static_cast<size_t>(resident_ctas)); ++i) {
        threads.emplace_back(resident);
    }
    for (std::thread& one : threads) one.join();
}

}  // namespace emulator

// ---- for Python, through ctypes ----

extern "C" void emulator_configure(int ctas, int percent, uint64_t start) {
    emulator::resident_ctas = ctas;
    emulator::chance = percent;
    emulator::seed = start;
}

// The stream goes on once nobody else got anywhere for so long: all that can run ahead of it has, however slow the
// machine is.
extern "C" void emulator_hold(uint64_t stream, int quiet_ms) {
    emulator::enqueue(reinterpret_cast<cudaStream_t>(stream), [=] {
        uint64_t before;
        do {
            before = emulator::progress;
            std::this_thread::sleep_for(std::chrono::milliseconds(quiet_ms));
        } while (emulator::progress != before);
    });
}

// Waits until every stream is idle; returns how many have failed (a kernel trapped).
extern "C" int emulator_synchronize() {
    std::vector<emulator::Stream*> all;
    {
        const std::lock_guard lock(emulator::streams_mutex);
        for (auto& [handle, stream] : emulator::streams) all.push_back(stream);
    }
    int failed = 0;
    for (emulator::Stream* stream : all) {
        std::unique_lock lock(stream->mutex);
        stream->changed.wait(lock, [&] { return stream->queue.empty() && !stream->busy; });
        failed += stream->failed;
    }
    return failed;
}
