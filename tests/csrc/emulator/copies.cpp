// Bulk copies and boxes of tensor maps: they happen later, at random moments and in random order.
#include <algorithm>

#include "state.hpp"

namespace emulator {
namespace {

constexpr int kRowBytes = 128;  // of a box in shared memory, in the 128-byte swizzle

// Visits the 16-byte units of a box: visit(in shared memory, in global memory or null where the box leaves the tensor).
template <class Visit>
void each_unit(const Part& part, Visit&& visit) {
    const CUtensorMap& map = part.map;
    const int width = kRowBytes / map.element;
    int64_t row = 0;
    for (unsigned z = 0; z < map.box[2]; ++z) {
        for (unsigned y = 0; y < map.box[1]; ++y, ++row) {
            const uint64_t at[3] = {0, static_cast<uint64_t>(part.at[1]) + y, static_cast<uint64_t>(part.at[2]) + z};
            for (int unit = 0; unit < kRowBytes / 16; ++unit) {
                const uint64_t x = static_cast<uint64_t>(part.at[0]) + static_cast<uint64_t>(unit * width / 8);
                const auto offset = static_cast<uint64_t>(row * kRowBytes + unit * 16);
                const uint64_t address = swizzled(reinterpret_cast<uint64_t>(part.shared) + offset);
                const bool inside = x < map.size[0] && at[1] < map.size[1] && at[2] < map.size[2];
                uint8_t* global = map.base + x * map.element + at[1] * map.pitch[0] + at[2] * map.pitch[1];
                visit(reinterpret_cast<uint8_t*>(address), inside ? global : nullptr);
            }
        }
    }
}

uint32_t bytes_of(const CUtensorMap& map) { return kRowBytes * map.box[1] * map.box[2]; }

void check_box(const Part& part) {
    if (reinterpret_cast<uint64_t>(part.shared) % 128) die("a box in shared memory is not aligned to 128 bytes");
    if (part.map.base == nullptr) die("a tensor map was never encoded");
    for (int i = 0; i < 3; ++i) {
        if (part.at[i] < 0) die("a box begins before its tensor");
    }
}

void check_plain(const Part& part) {
    const auto bits = reinterpret_cast<uint64_t>(part.shared) | reinterpret_cast<uint64_t>(part.global) | part.bytes;
    if (bits % 16) die("a bulk copy is not aligned to 16 bytes");
}

void perform(const Load& load) {
    const auto offset = reinterpret_cast<uint8_t*>(load.part.shared) - cta().shared;
    const auto barrier = reinterpret_cast<uint8_t*>(load.barrier) - cta().shared;
    Cluster& all = cluster();
    for (size_t i = 0; i < all.ctas.size(); ++i) {
        if (!(load.ctas >> i & 1)) continue;
        Part part = load.part;
        part.shared = all.ctas[i].shared + offset;
        if (part.global != nullptr) {
            std::memcpy(part.shared, part.global, part.bytes);
        } else {
            each_unit(part, [](uint8_t* to, const uint8_t* from) {
                from != nullptr ? std::memcpy(to, from, 16) : std::memset(to, 0, 16);
            });
        }
        mbarrier(reinterpret_cast<uint64_t*>(all.ctas[i].shared + barrier)).change(0, -static_cast<int>(part.bytes));
    }
}

void read_store(Store& store) {
    if (store.read) return;
    const auto* from = static_cast<const uint8_t*>(store.part.shared);
    if (store.part.global != nullptr) {
        store.data.assign(from, from + store.part.bytes);
    } else {
        each_unit(store.part,
                  [&](const uint8_t* unit, uint8_t*) { store.data.insert(store.data.end(), unit, unit + 16); });
    }
    store.read = true;
}

void add_floats(uint8_t* to, const uint8_t* from) {
    float sum[4], added[4];
    std::memcpy(sum, to, 16), std::memcpy(added, from, 16);
    for (int i = 0; i < 4; ++i) sum[i] += added[i];
    std::memcpy(to, sum, 16);
}

void write_store(const Store& store) {
    if (store.part.global != nullptr) {
        std::memcpy(store.part.global, store.data.data(), store.data.size());
        return;
    }
    const uint8_t* next = store.data.data();
    each_unit(store.part, [&](const uint8_t*, uint8_t* to) {
        if (to != nullptr) store.add ? add_floats(to, next) : static_cast<void>(std::memcpy(to, next, 16));
        next += 16;
    });
}

void push_load(const Part& part, uint64_t* barrier, unsigned ctas) {
    if (running->acquired) die("a bulk load follows an acquire without fence.proxy.async between them");
    auto& random = cluster().random;
    const uint64_t slow = random() % 4 ? 0 : random() % 3000;
    cta().loads.push_back({part, barrier, ctas, cta().ticks + slow});
}

// What the warp stored plainly has been fenced.
void require_fenced(const char* otherwise) {
    const Fiber* warp = warp_begin();
    if (std::any_of(warp, warp + 32, [](const Fiber& fiber) { return fiber.wrote_shared; })) die(otherwise);
}

void push_store(const Part& part, bool add = false) {
    require_fenced("a bulk store follows plain stores to shared memory without a fence");
    running->stores.push_back({part, {}, running->group, false, add});
}

unsigned own_cta() { return 1u << (&cta() - cluster().ctas.data()); }

Part box(void* shared, const CUtensorMap* map, int x, int y, int z) {
    const Part part{shared, nullptr, bytes_of(*map), *map, {x, y, z}};
    check_box(part);
    return part;
}

}  // namespace

void load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    const Part part{to, const_cast<void*>(from), bytes, {}, {}};
    check_plain(part);
    push_load(part, barrier, own_cta());
}

void store(void* to, const void* from, uint32_t bytes) {
    const Part part{const_cast<void*>(from), to, bytes, {}, {}};
    check_plain(part);
    push_store(part);
}

void load_box(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z, unsigned ctas) {
    push_load(box(to, map, x, y, z), barrier, ctas == 0 ? own_cta() : ctas);
}

void store_box(const CUtensorMap* map, const void* from, int x, int y) {
    push_store(box(const_cast<void*>(from), map, x, y, 0));
}

void add_box(const CUtensorMap* map, const void* from, int x, int y) {
    if (map->element != 4) die("the emulator adds boxes of fp32 only");
    push_store(box(const_cast<void*>(from), map, x, y, 0), true);
}

void commit() { ++running->group; }

void copies_step() {
    Cta& mine = cta();
    auto& random = cluster().random;
    if (!mine.loads.empty() && random() % 2) {
        const size_t index = random() % mine.loads.size();
        if (mine.loads[index].due > mine.ticks) return;
        const Load load = mine.loads[index];
        mine.loads.erase(mine.loads.begin() + static_cast<long>(index));
        return perform(load);
    }
    if (running->stores.empty()) return;
    const size_t index = random() % running->stores.size();
    Store& store = running->stores[index];
    if (store.group == running->group) return;  // not committed yet
    if (!store.read) return read_store(store);
    write_store(store);
    running->stores.erase(running->stores.begin() + static_cast<long>(index));
    running->written = true;
}

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
        write_store(stores[i]);
        stores.erase(stores.begin() + static_cast<long>(i));
        running->written = true;
    }
}

void end_of_thread() {
    for (const Store& store : running->stores) {
        if (!store.read) die("a thread ended while its bulk store was reading shared memory");
        write_store(store);
    }
    running->stores.clear();
    if (!running->products.empty()) die("a thread ended without waiting for its matrix instructions");
}

// ---- the rules of the proxies

void acquired() { running->acquired = true; }
void wrote_shared() { running->wrote_shared = true; }
void fence_async_shared() { running->wrote_shared = false; }
void fence_async() { running->acquired = running->written = running->wrote_shared = false; }

namespace {

void check_released(const Fiber& fiber) {
    if (fiber.written) die("a release follows bulk stores without fence.proxy.async between them");
    if (!fiber.stores.empty()) die("a release follows bulk stores that were not waited for");
}

}  // namespace

// In a kernel of clusters a counter's release is about what the warp stored; others are about plain stores.
void released(bool counter) {
    if (cluster().ctas.size() == 1) {
        for (const Fiber& fiber : cta().fibers) check_released(fiber);
    } else if (counter) {
        for (int i = 0; i < 32; ++i) check_released(warp_begin()[i]);
    }
}

void arriving() { require_fenced("plain stores to shared memory are handed over without fence.proxy.async"); }

void handing_out() {
    if (running->acquired) die("what was acquired is handed on without fence.proxy.async");
}

}  // namespace emulator
