#include "kernels/load.cuh"
#include "kernels/plan.cuh"

namespace megamoe {
namespace {

constexpr int kWarps = kPlanThreads / 32;
constexpr int kPrefixBatch = 16;  // loads in flight per thread of the sum over CTAs
constexpr int kSourceParts = 4;   // CTAs per local expert in plan_sources

__device__ __forceinline__ long long load_id(const PlanParams& params, int slot) {
    return params.wide_ids ? static_cast<const long long*>(params.ids)[slot]
                           : static_cast<const int*>(params.ids)[slot];
}

__device__ __forceinline__ bool is_expert(const PlanParams& params, long long id) {
    return id >= 0 && id < params.experts;
}

// An id for an error message; int64 ones beyond int32 are shown as its ends (INT_MIN itself: kTooManyExperts).
__device__ __forceinline__ int shown_id(long long id) {
    return static_cast<int>(id < INT_MIN ? -INT_MAX : id > INT_MAX ? INT_MAX : id);
}

// block_counts[b][e] becomes the sum over the CTAs before b; the totals go to every peer. By the last CTA.
__device__ void sum_blocks_and_send(const PlanParams& params, uint32_t epoch) {
    const Peers& peers = params.peers;
    for (int e = threadIdx.x; e < params.experts; e += kPlanThreads) {
        int total = 0;
        for (int first = 0; first < params.blocks; first += kPrefixBatch) {
            int counts[kPrefixBatch];
#pragma unroll
            for (int i = 0; i < kPrefixBatch; ++i) {
                const int64_t at = int64_t{first + i} * params.experts + e;
                counts[i] = first + i < params.blocks ? ptx::load_int(params.block_counts + at) : 0;
            }
#pragma unroll
            for (int i = 0; i < kPrefixBatch; ++i) {
                if (first + i < params.blocks) params.block_counts[int64_t{first + i} * params.experts + e] = total;
                total += counts[i];
            }
        }
        for (int r = 0; r < peers.ranks; ++r) counts_row(peers, r, epoch, peers.rank)[e] = total;
    }
    if (threadIdx.x < peers.ranks) {
        const int bad = ptx::load_int(state_int(peers, kStateBadSlots));
        int* header = counts_row(peers, threadIdx.x, epoch, peers.rank) + params.experts;
        header[kHeaderBadSlot] = bad == 0 ? -1 : INT_MAX - bad;
        header[kHeaderBadId] = bad == 0 ? 0 : shown_id(load_id(params, INT_MAX - bad));
        header[kHeaderTokens] = params.slots;
        header[kHeaderCapacity] = params.capacity;
    }
    // Counts -> counted: all writers; barrier; one thread per peer fence.acq_rel.sys, st.release.sys.
    __syncthreads();
    if (threadIdx.x < peers.ranks) signal(peers, threadIdx.x, peers.layout.counted, peers.rank, epoch_word(epoch));
}

__global__ void __launch_bounds__(kPlanThreads) plan_count_kernel(const __grid_constant__ PlanParams params) {
    extern __shared__ int histogram[];  // [E]
    __shared__ uint32_t epoch;
    for (int e = threadIdx.x; e < params.experts; e += kPlanThreads) histogram[e] = 0;
    __syncthreads();
    const int begin = blockIdx.x * params.chunk;
    const int end = min(begin + params.chunk, params.slots);
    for (int slot = begin + threadIdx.x; slot < end; slot += kPlanThreads) {
        const long long id = load_id(params, slot);
        // Integer sums and maxima: the order of these atomics leaves no trace.
        if (is_expert(params, id)) {
            atomicAdd(&histogram[id], 1);
        } else if (id != -1) {
            atomicMax(state_int(params.peers, kStateBadSlots), INT_MAX - slot);
        }
    }
    __syncthreads();
    int* mine = params.block_counts + int64_t{blockIdx.x} * params.experts;
    for (int e = threadIdx.x; e < params.experts; e += kPlanThreads) mine[e] = histogram[e];
    if (!last_cta(state_int(params.peers, kStateCountTicket), gridDim.x)) return;
    if (threadIdx.x == 0) {
        uint64_t& counter = state_word(params.peers, kStatePlanEpoch);
        epoch = static_cast<uint32_t>(++counter);
        params.control[kPlanEpoch] = static_cast<int>(epoch);
        params.control[kPlanId] = static_cast<int>(epoch & 0xffffff);
    }
    __syncthreads();
    sum_blocks_and_send(params, epoch);
    __syncthreads();
    if (threadIdx.x == 0) *state_int(params.peers, kStateCountTicket) = *state_int(params.peers, kStateBadSlots) = 0;
}

// Exclusive prefix sums over the CTA of two numbers at once, kept in the halves of a 64-bit word.
__device__ uint64_t scan_exclusive(uint64_t value, uint64_t* warp_sums, uint64_t& total) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    uint64_t sum = value;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const uint64_t other = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += other;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    uint64_t before = 0;
    total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        if (w < warp) before += warp_sums[w];
        total += warp_sums[w];
    }
    __syncthreads();
    return before + sum - value;
}

struct PlaceShared {
    uint64_t warp_sums[kWarps];
    int code;
};

// What plan_place keeps per expert in dynamic shared memory.
struct ExpertTables {
    uint64_t* before;   // [E + 1] padded rows of the experts before (low half), kept slots of this rank before (high)
    int* row;           // [E] row of the next slot of this CTA
    int* list;          // [E] its place in this rank's list, minus row
    uint16_t* of_warp;  // [kWarps, E] slots of each warp, then of the warps before
};

__device__ __forceinline__ ExpertTables tables(uint64_t* memory, int experts) {
    ExpertTables t;
    t.before = memory;
    t.row = reinterpret_cast<int*>(memory + experts + 1);
    t.list = t.row + experts;
    t.of_warp = reinterpret_cast<uint16_t*>(t.list + experts);
    return t;
}

__host__ __device__ constexpr int place_bytes(int experts) {
    return 8 * (experts + 1) + 8 * experts + 2 * kWarps * experts;
}

__device__ __forceinline__ int padded_rows(int rows, int tile) { return (rows + tile - 1) / tile * tile; }

// Row offsets of every expert at its owner, from the counts of all ranks. Every CTA computes them for itself.
__device__ void offsets(const PlanParams& params, uint32_t epoch, const ExpertTables& t, PlaceShared& shared) {
    const Peers& peers = params.peers;
    uint64_t carry = 0;
    for (int first = 0; first < params.experts; first += kPlanThreads) {
        const int e = first + threadIdx.x;
        uint64_t value = 0;
        if (e < params.experts) {
            int rows = 0, earlier = 0, mine = 0;
            for (int r = 0; r < peers.ranks; ++r) {
                const int count = ptx::load_int(counts_row(peers, peers.rank, epoch, r) + e);
                if (r == peers.rank) earlier = rows, mine = count;
                rows += count;
            }
            t.row[e] = earlier;
            value = static_cast<uint64_t>(padded_rows(rows, params.row_tile)) | static_cast<uint64_t>(mine) << 32;
        }
        uint64_t total;
        const uint64_t before = scan_exclusive(value, shared.warp_sums, total);
        if (e < params.experts) t.before[e] = carry + before;
        carry += total;
    }
    if (threadIdx.x == 0) t.before[params.experts] = carry;
    __syncthreads();
}

__device__ __forceinline__ int low(uint64_t pair) { return static_cast<int>(pair & 0xffffffffu); }
__device__ __forceinline__ int high(uint64_t pair) { return static_cast<int>(pair >> 32); }

// The same verdict at every rank: each knows all counts, bad ids and capacities.
__device__ void judge(const PlanParams& params, uint32_t epoch, const ExpertTables& t) {
    const Peers& peers = params.peers;
    const int local = params.experts / peers.ranks;
    PlanStatus status{};
    status.position = -1;
    for (int r = peers.ranks - 1; r >= 0; --r) {
        const int* header = counts_row(peers, peers.rank, epoch, r) + params.experts;
        const int rows = low(t.before[(r + 1) * local]) - low(t.before[r * local]);
        if (rows > status.most_rows) status.most_rows = rows;
        if (r == peers.rank) status.rows = rows;
        const int bad = ptx::load_int(header + kHeaderBadSlot), capacity = ptx::load_int(header + kHeaderCapacity);
        const PlanCode code = bad >= 0 ? PlanCode::kBadId : rows > capacity ? PlanCode::kOverflow : PlanCode::kGood;
        // A bad id anywhere outweighs an overflow; among equals the lowest rank speaks.
        if (code == PlanCode::kGood || (status.code == 1 && code == PlanCode::kOverflow)) continue;
        status.code = static_cast<int>(code);
        status.rank = r;
        status.position = bad;
        status.value = bad >= 0 ? ptx::load_int(header + kHeaderBadId) : capacity;
    }
    params.control[kPlanCode] = static_cast<int>(status.code);
    if (params.status == nullptr) return;
    *params.status = status;
    __threadfence_system();  // the host polls `epoch`
    *const_cast<volatile unsigned long long*>(&params.status->epoch) = epoch;
}

__device__ void write_tables(const PlanParams& params, uint32_t epoch, const ExpertTables& t) {
    const Peers& peers = params.peers;
    const int local = params.experts / peers.ranks, mine = peers.rank * local;
    for (int i = threadIdx.x; i < peers.ranks * params.experts; i += kPlanThreads) {
        const int r = i / params.experts, e = i % params.experts;
        params.counts[i] = ptx::load_int(counts_row(peers, peers.rank, epoch, r) + e);
    }
    for (int e = threadIdx.x; e <= local; e += kPlanThreads) {
        params.expert_offset[e] = low(t.before[mine + e]) - low(t.before[mine]);
        if (e == local) continue;
        int rows = 0;
        for (int r = 0; r < peers.ranks; ++r) {
            rows += ptx::load_int(counts_row(peers, peers.rank, epoch, r) + mine + e);
        }
        params.expert_rows[e] = rows;
    }
    if (threadIdx.x == 0) judge(params, epoch, t);
}

// Calls visit(slot, is it one of the CTA's, expert or -1, place among the equal ids of this round, number of equal ids)
// for the warp's slots in ascending order, 32 a round.
template <class Visit>
__device__ __forceinline__ void each_round(const PlanParams& params, Visit&& visit) {
    const int lane = threadIdx.x & 31;
    const int per_warp = params.chunk / kWarps;
    const int begin = blockIdx.x * params.chunk + threadIdx.x / 32 * per_warp;
    const int end = min(begin + per_warp, params.slots);
    for (int first = begin; first < end; first += 32) {
        const int slot = first + lane;
        const long long given = slot < end ? load_id(params, slot) : -1;
        const int id = is_expert(params, given) ? static_cast<int>(given) : -1;
        const unsigned equal = __match_any_sync(0xffffffffu, id);
        visit(slot, slot < end, id, __popc(equal & ((1u << lane) - 1)), __popc(equal));
        __syncwarp();
    }
}

// Of one rank's source_of: the rows behind each expert's last one. A plan that does not fit is filled as far as it
// goes.
__device__ void fill_padding(const PlanParams& params, uint32_t epoch, const ExpertTables& t) {
    const Peers& peers = params.peers;
    for (int e = blockIdx.x; e < params.experts; e += gridDim.x) {
        const int end = min(low(t.before[e + 1]), params.capacity);
        const int rows = ptx::load_int(counts_row(peers, peers.rank, epoch, 0) + e);
        for (int i = low(t.before[e]) + rows + threadIdx.x; i < end; i += kPlanThreads) params.source_of[i] = -1;
    }
}

__global__ void __launch_bounds__(kPlanThreads) plan_place_kernel(const __grid_constant__ PlanParams params) {
    extern __shared__ uint64_t memory[];
    __shared__ PlaceShared shared;
    const Peers& peers = params.peers;
    const ExpertTables t = tables(memory, params.experts);
    const uint32_t epoch = static_cast<uint32_t>(params.control[kPlanEpoch]);
    if (threadIdx.x < peers.ranks) {
        wait_word(peers, words(peers, peers.rank, peers.layout.counted) + threadIdx.x, epoch, Waiting::kCounts,
                  threadIdx.x);
    }
    for (int i = threadIdx.x; i < kWarps * params.experts; i += kPlanThreads) t.of_warp[i] = 0;
    __syncthreads();  // the waiting threads' acquires reach the whole CTA

    uint16_t* warp_counts = t.of_warp + threadIdx.x / 32 * params.experts;
    each_round(params, [&](int, bool, int id, int order, int equals) {
        if (id >= 0 && order == 0) warp_counts[id] += equals;
    });
    offsets(params, epoch, t, shared);
    if (blockIdx.x == 0) write_tables(params, epoch, t);

    const int local = params.experts / peers.ranks;
    for (int e = threadIdx.x; e < params.experts; e += kPlanThreads) {
        const int owner_first = low(t.before[e / local * local]);
        const int before_cta = ptx::load_int(params.block_counts + int64_t{blockIdx.x} * params.experts + e);
        const int first = t.row[e] + low(t.before[e]) - owner_first;  // of this rank's slots for e, at e's owner
        t.row[e] = first + before_cta;
        t.list[e] = high(t.before[e]) - first;
        int sum = 0;
        for (int w = 0; w < kWarps; ++w) {
            const int count = t.of_warp[w * params.experts + e];
            t.of_warp[w * params.experts + e] = static_cast<uint16_t>(sum);
            sum += count;
        }
    }
    __syncthreads();

    int* list = row_sources(peers, peers.rank, epoch);
    const bool alone = peers.ranks == 1 && params.source_of != nullptr;  // then plan_sources is not launched
    each_round(params, [&](int slot, bool inside, int id, int order, int equals) {
        const int before = id >= 0 ? warp_counts[id] : 0;
        __syncwarp();
        if (id >= 0 && order == 0) warp_counts[id] = static_cast<uint16_t>(before + equals);
        if (!inside) return;
        const int row = id >= 0 ? t.row[id] + before + order : -1;
        params.slot_of[slot] = row;
        params.ids_out[slot] = id;
        if (id >= 0) list[t.list[id] + row] = slot;
        if (alone && id >= 0 && row < params.capacity) params.source_of[row] = slot;
    });
    if (alone) fill_padding(params, epoch, t);
    // List -> listed: all CTAs' writers; ticket (atom.acq_rel.gpu); then the last CTA fence.acq_rel.sys,
    // st.release.sys.
    if (!last_cta(state_int(peers, kStatePlaceTicket), gridDim.x)) return;
    if (threadIdx.x == 0) *state_int(peers, kStatePlaceTicket) = 0;
    if (threadIdx.x < peers.ranks) signal(peers, threadIdx.x, peers.layout.listed, peers.rank, epoch_word(epoch));
}

// Waits for plan_sources by one small CTA. Its own 4 L CTAs, waiting, filled every SM: eight virtual ranks on one GPU
// hung, the last one's plan_place found no place.
__global__ void wait_listed_kernel(const __grid_constant__ PlanParams params) {
    const Peers& peers = params.peers;
    if (threadIdx.x >= peers.ranks) return;
    const uint32_t epoch = static_cast<uint32_t>(params.control[kPlanEpoch]);
    wait_word(peers, words(peers, peers.rank, peers.layout.listed) + threadIdx.x, epoch, Waiting::kRowSources,
              threadIdx.x);
}

// CTA (e, part) fills its share of local expert e's rows: the lists of rank 0, 1, ..., then the padding.
__global__ void __launch_bounds__(kPlanThreads) plan_sources_kernel(const __grid_constant__ PlanParams params) {
    __shared__ int list_begin[kMaxRanks], list_rows[kMaxRanks];
    const Peers& peers = params.peers;
    if (params.control[kPlanCode] != static_cast<int>(PlanCode::kGood)) return;  // would not fit: nothing is written
    const uint32_t epoch = static_cast<uint32_t>(params.control[kPlanEpoch]);
    const int local = params.experts / peers.ranks;
    const int expert = peers.rank * local + blockIdx.x;
    for (int r = threadIdx.x / 32; r < peers.ranks; r += kWarps) {
        int sum = 0;
        for (int e = threadIdx.x & 31; e < expert; e += 32) sum += params.counts[r * params.experts + e];
        sum = __reduce_add_sync(0xffffffffu, sum);
        list_begin[r] = sum;
        list_rows[r] = params.counts[r * params.experts + expert];
    }
    __syncthreads();
    int row = params.expert_offset[blockIdx.x];
    const int start = blockIdx.y * kPlanThreads + threadIdx.x, step = kSourceParts * kPlanThreads;
    for (int r = 0; r < peers.ranks; ++r) {
        const int* list = row_sources(peers, r, epoch) + list_begin[r];
        const long long rank_bits = static_cast<long long>(r) << 40;
        for (int i = start; i < list_rows[r]; i += step)
            params.source_of[row + i] = rank_bits | ptx::load_int(list + i);
        row += list_rows[r];
    }
    const int end = params.expert_offset[blockIdx.x + 1];
    for (int i = row + start; i < end; i += step) params.source_of[i] = -1;
}

}  // namespace

cudaError_t launch_plan_count(const PlanParams& params, cudaStream_t stream) {
    plan_count_kernel<<<params.blocks, kPlanThreads, params.experts * sizeof(int), stream>>>(params);
    return cudaGetLastError();
}

cudaError_t launch_plan_place(const PlanParams& params, cudaStream_t stream) {
    plan_place_kernel<<<params.blocks, kPlanThreads, place_bytes(params.experts), stream>>>(params);
    return cudaGetLastError();
}

cudaError_t launch_plan_sources(const PlanParams& params, cudaStream_t stream) {
    const dim3 grid(params.experts / params.peers.ranks, kSourceParts);
    if (params.peers.ranks > 1) wait_listed_kernel<<<1, kMaxRanks, 0, stream>>>(params);
    plan_sources_kernel<<<grid, kPlanThreads, 0, stream>>>(params);
    return cudaGetLastError();
}

cudaError_t load_plan_kernels() {
    return load_kernels(plan_count_kernel, plan_place_kernel, wait_listed_kernel, plan_sources_kernel);
}

}  // namespace megamoe
