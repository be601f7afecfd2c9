// Threads, barriers, collectives of a warp, and streams.
#include "state.hpp"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <thread>

namespace emulator {

thread_local Fiber* running;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr int kLongestStall = 1000, kLongestRun = 4000;  // rounds in which all threads of a cluster have their turn
constexpr int kRoundsOfAPoll = 32;                       // at most, from one nanosleep of a waiting thread to its next

std::atomic<int> resident_clusters{2};  // per launch
std::atomic<int> chance{50};            // of a pending copy to make a step when a thread yields, in percent
std::atomic<uint64_t> seed{1};
std::atomic<uint64_t> progress{0};  // changes while any rank is given work or does more than poll

thread_local jmp_buf scheduler;
thread_local uint8_t* stacks;

// What one of them has acquired, all have after they met.
template <class Fibers>
void share_acquired(Fibers first, Fibers end) {
    const bool any = std::any_of(first, end, [](const Fiber& fiber) { return fiber.acquired; });
    for (; any && first != end; ++first) first->acquired = true;
}

void share_acquired(Cta& cta) { share_acquired(cta.fibers.begin(), cta.fibers.end()); }

bool complete(Barrier& barrier) {
    if (barrier.live == 0 || barrier.arrived != barrier.live) return false;
    barrier.arrived = 0, ++barrier.generation;
    return true;
}

void release_barriers() {
    if (complete(cta().barrier)) share_acquired(cta());
    if (!complete(cluster().barrier)) return;
    for (Cta& each : cluster().ctas) share_acquired(each);
}

void meet(Barrier& barrier) {
    const unsigned mine = barrier.generation;
    ++barrier.arrived;
    release_barriers();
    while (barrier.generation == mine) yield();
}

void fiber_main() {
    (*cluster().body)();
    exit_thread();
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

void set_up(Cluster& cluster, const Launch& launch, dim3 first, uint8_t* shared) {
    const unsigned threads = launch.block.x;
    cluster.random.seed(seed.fetch_add(1) * 0x9e3779b97f4a7c15ull);
    cluster.next_stall = cluster.random() % kLongestRun;
    cluster.body = &launch.thread;
    cluster.ctas.resize(launch.cluster);
    cluster.barrier.live = static_cast<int>(launch.cluster * threads);
    for (unsigned c = 0; c < launch.cluster; ++c) {
        Cta& cta = cluster.ctas[c];
        cta.cluster = &cluster;
        cta.shared = shared + c * kSharedWindow;
        std::memset(cta.shared, 0xCD, kSharedBytes);
        cta.fibers.resize(threads);
        cta.warps.resize(threads / 32);
        cta.barrier.live = static_cast<int>(threads);
        const dim3 index(first.x + c, first.y, 0);
        for (unsigned t = 0; t < threads; ++t) {
            cta.fibers[t].place = {dim3(t, 0, 0), index, launch.block, launch.grid, c};
            cta.fibers[t].cta = &cta;
        }
    }
}

// Now and then a warp gets no turn for a long time.
void stall(Cluster& cluster) {
    if (cluster.rounds < cluster.next_stall) return;
    if (cluster.stalled == nullptr) {
        Cta& cta = cluster.ctas[cluster.random() % cluster.ctas.size()];
        cluster.stalled = &cta.warps[cluster.random() % cta.warps.size()];
        cluster.next_stall = cluster.rounds + cluster.random() % kLongestStall;
    } else {
        cluster.stalled = nullptr;
        cluster.next_stall = cluster.rounds + cluster.random() % kLongestRun;
    }
}

// `first`: index of the cluster's first CTA.
void run_cluster(const Launch& launch, dim3 first, uint8_t* shared, std::atomic<bool>& failed) {
    Cluster mine;
    mine.failed = &failed;
    set_up(mine, launch, first, shared);
    const size_t each = launch.block.x, all = launch.cluster * each;
    int since_poll = 0;
    while (mine.barrier.live > 0 && !failed) {
        // Warps in random order; the threads of a warp mostly together, as hardware runs them.
        const size_t begin = mine.random() % all;
        for (size_t i = 0; i < all && !failed; ++i) {
            const size_t at = (begin + i) % all;
            Cta& cta = mine.ctas[at / each];
            if (&cta.warps[at % each / 32] == mine.stalled) continue;
            Fiber& fiber = cta.fibers[at % each];
            if (!fiber.done) resume(fiber, at);
        }
        // A thread polls another rank: leave it the processor.
        if (mine.polled) {
            std::this_thread::sleep_for(std::chrono::microseconds(200));
            since_poll = 0;
        } else if (++since_poll > kRoundsOfAPoll) {
            ++progress;
        }
        mine.polled = false;
        ++mine.rounds;
        stall(mine);
        std::this_thread::yield();
    }
    for (const Cta& cta : mine.ctas) {
        if (!failed && !cta.loads.empty()) die("a CTA ended with bulk loads in flight");
    }
}

// Memory of one resident cluster: stacks, and shared memory whose addresses have 32 bits as on the device.
class Resident {
public:
    explicit Resident(const Launch& launch)
        : stack_bytes_(launch.cluster * launch.block.x * kStackBytes),
          shared_bytes_((launch.cluster + 1) * kSharedWindow) {
        stacks = map(stack_bytes_, 0);
        mapped_ = map(shared_bytes_, MAP_32BIT);
    }
    ~Resident() {
        munmap(stacks, stack_bytes_);
        munmap(mapped_, shared_bytes_);
    }
    uint8_t* shared() const {
        const auto address = reinterpret_cast<uint64_t>(mapped_);
        return reinterpret_cast<uint8_t*>((address + kSharedWindow - 1) / kSharedWindow * kSharedWindow);
    }

private:
    static uint8_t* map(size_t bytes, int flags) {
        void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
        if (found == MAP_FAILED) die("no memory");
        return static_cast<uint8_t*>(found);
    }
    size_t stack_bytes_, shared_bytes_;
    uint8_t* mapped_;
};

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

void die(const char* why) {
    std::fprintf(stderr, "emulator: %s\n", why);
    std::_Exit(3);
}

const Place& place() { return running->place; }

Fiber* warp_begin() { return cta().fibers.data() + running->place.thread.x / 32 * 32; }

void yield() {
    ++cta().ticks;
    if (static_cast<int>(cluster().random() % 100) < chance) copies_step();
    if (static_cast<int>(cluster().random() % 100) < chance) products_step();
    if (!_setjmp(running->state)) _longjmp(scheduler, 1);
}

void nanosleep() {
    cluster().polled = true;
    yield();
}

void trap() {
    *cluster().failed = true;
    while (true) yield();
}

void exit_thread() {
    end_of_thread();
    running->done = true;
    --cta().barrier.live;
    --cluster().barrier.live;
    release_barriers();
    _longjmp(scheduler, 1);
}

void sync_threads() { meet(cta().barrier); }
void sync_cluster() { meet(cluster().barrier); }

uint8_t* dynamic_shared() { return cta().shared; }

void* at_cta(const void* shared, unsigned rank) {
    const auto offset = static_cast<const uint8_t*>(shared) - cta().shared;
    if (offset < 0 || offset >= static_cast<long>(kSharedBytes)) die("not an address in shared memory");
    return cluster().ctas.at(rank).shared + offset;
}

uint64_t collective(Collective what, unsigned mask, uint64_t value, int argument) {
    if (mask != ~0u) die("only collectives of the whole warp are emulated");
    Warp& warp = cta().warps[running->place.thread.x / 32];
    const int lane = static_cast<int>(running->place.thread.x % 32);
    if (warp.arrived == 0) warp.what = what;
    if (warp.what != what) die("the threads of a warp met in different collectives");
    warp.in[lane] = value;
    const unsigned mine = warp.generation;
    if (++warp.arrived == 32) {
        share_acquired(warp_begin(), warp_begin() + 32);
        std::copy(warp.in, warp.in + 32, warp.out);
        warp.arrived = 0;
        ++warp.generation;
    }
    while (warp.generation == mine) yield();
    const uint64_t* all = warp.out;
    uint64_t result = 0;
    switch (what) {
        case Collective::kSync: break;
        case Collective::kExchange: return reinterpret_cast<uint64_t>(all);
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

// What is given to stream 0 is done on return: its caller may free what it works on.
void enqueue(cudaStream_t handle, std::function<void()> item) {
    if (handle == nullptr) return item();
    Stream& stream = stream_of(handle);
    ++progress;
    const std::lock_guard lock(stream.mutex);
    stream.queue.push_back(std::move(item));
    stream.changed.notify_all();
}

void run_grid(const Launch& launch) {
    const auto [grid, block, cluster] = std::tuple(launch.grid, launch.block, launch.cluster);
    if (grid.x * grid.y == 0 || block.x == 0 || block.x % 32 || grid.x % cluster ||
        launch.shared_bytes > kSharedBytes) {
        die("bad launch");
    }
    Stream& stream = stream_of(launch.stream);
    std::vector<dim3> order;
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; x += cluster) order.emplace_back(x, y, 0);
    }
    std::mt19937_64 random(seed.fetch_add(1));
    std::shuffle(order.begin(), order.end(), random);
    std::atomic<size_t> next{0};
    auto resident = [&] {
        const Resident memory(launch);
        for (size_t i = next++; i < order.size() && !stream.failed; i = next++) {
            run_cluster(launch, order[i], memory.shared(), stream.failed);
        }
    };
    std::vector<std::thread> threads;
    for (size_t i = 0; i < std::min<size_t>(order.size(), static_cast<size_t>(resident_clusters)); ++i) {
        threads.emplace_back(resident);
    }
    for (std::thread& one : threads) one.join();
}

}  // namespace emulator

// ---- for Python, through ctypes ----

extern "C" void emulator_configure(int clusters, int percent, uint64_t start) {
    emulator::resident_clusters = clusters;
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
