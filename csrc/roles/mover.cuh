// One warp moves rows of a row pool by bulk copies through shared memory. Dispatch (pull) and combine (push) differ
// only in where a row comes from and goes to; see roles/dispatch.cuh and roles/combine.cuh.
#pragma once
#include "comm/peers.cuh"
#include "ptx/bulk.cuh"
#include "ptx/matrix.cuh"
#include "ptx/tma.cuh"

namespace megamoe {

constexpr int kMoverStageBytes = 8192;  // NVLink needs copies of this size to be busy with few SMs
constexpr int kMaxUnitRows = 16;        // 512-byte rows: the smallest, H = 256
// Little: at the end a warp still has up to three claims (two prefetched) at 1/144 of the link's rate. With 64 KB and
// two claims that was 9% of a push of 200 MB.
constexpr int kClaimBytes = 16384;

// How rows are cut into units of at most one stage: short rows travel several at a time, long ones in equal pieces.
struct RowCut {
    int row_bytes;
    int piece_bytes;  // of one row in one unit
    int pieces;       // units per row
    int unit_rows;    // rows per unit, a power of two
    int claim_rows;   // rows claimed at a time, a multiple of unit_rows, at most 32
};

inline RowCut cut_rows(int hidden) {
    RowCut cut{hidden * 2, hidden * 2, 1, 1, 0};
    while (cut.piece_bytes > kMoverStageBytes || cut.piece_bytes * cut.pieces != cut.row_bytes ||
           cut.piece_bytes % 16) {
        ++cut.pieces;
        cut.piece_bytes = cut.row_bytes / cut.pieces;
    }
    while (cut.unit_rows < kMaxUnitRows && 2 * cut.unit_rows * cut.row_bytes <= kMoverStageBytes) cut.unit_rows *= 2;
    cut.claim_rows = cut.unit_rows;
    while (cut.claim_rows < 32 && cut.claim_rows * cut.row_bytes < kClaimBytes) cut.claim_rows *= 2;
    return cut;
}

template <int kStages>
struct alignas(128) MoverShared {
    uint8_t data[kStages][kMoverStageBytes];
    uint8_t* target[kStages][kMaxUnitRows];   // where each row of the unit goes; null: nowhere
    const int* twins[kStages][kMaxUnitRows];  // RowMove::twins of each
    uint64_t full[kStages];
};

// Where a claimed row comes from and goes to. Both null: nothing to do. Only `to`: zeros.
struct RowMove {
    const uint8_t* from;
    uint8_t* to;
    const int* twins;  // [K] rows of a pool (negative: none), all of which get what `to`, one of them, gets; null: none
};

// The pool that twins are rows of, and K.
struct TwinPool {
    uint8_t* rows;
    int top_k;
};

template <int kStages>
class Mover {
public:
    __device__ Mover(MoverShared<kStages>& shared, const RowCut& cut, const Deadline& deadline, TwinPool pool = {})
        : shared_(shared), cut_(cut), deadline_(deadline), pool_(pool), lane_(threadIdx.x & 31) {
        if (lane_ < kStages) ptx::mbarrier_init(&shared_.full[lane_], 1);
        ptx::fence_mbarrier_init();
        __syncwarp();
    }

    // Moves the claimed rows; lane i holds the move of row i. Whole warp.
    __device__ void move(RowMove mine) {
        for (int first = 0; first < cut_.claim_rows; first += cut_.unit_rows) {
            // Lane i < unit_rows gets row first + i.
            const uint64_t from = __shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(mine.from), (first + lane_) & 31);
            const uint64_t to = __shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(mine.to), (first + lane_) & 31);
            const uint64_t twins =
                __shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(mine.twins), (first + lane_) & 31);
            const bool active = lane_ < cut_.unit_rows && to != 0;
            if (!__any_sync(0xffffffffu, active)) continue;
            for (int piece = 0; piece < cut_.pieces; ++piece) {
                const int64_t at = int64_t{piece} * cut_.piece_bytes;
                issue(active ? reinterpret_cast<const uint8_t*>(from) : nullptr,
                      active ? reinterpret_cast<uint8_t*>(to) + at : nullptr,
                      active ? reinterpret_cast<const int*>(twins) : nullptr, at);
            }
        }
    }

    // All rows moved so far have arrived: their writes are performed (wait_group 0, not .read), and ordered before a
    // later release by this thread or one that it meets at a barrier.
    __device__ void finish() {
        while (stored_ < issued_) store();
        ptx::tma_store_wait_all();
        ptx::fence_async();
        __syncwarp();
    }

private:
    static constexpr int kLag = kStages / 2;  // units between a load's issue and its store

    __device__ void issue(const uint8_t* from, uint8_t* to, const int* twins, int64_t at) {
        const int stage = issued_ % kStages;
        // The unit that used this stage was stored kStages - kLag - 1 groups before the newest: read from by now.
        ptx::tma_store_wait_read<kStages - kLag - 1>();
        __syncwarp();  // every lane's stores, since one lane's load overwrites what another one stored from
        const unsigned loads = __ballot_sync(0xffffffffu, from != nullptr);
        if (lane_ == 0) ptx::mbarrier_expect(&shared_.full[stage], __popc(loads) * cut_.piece_bytes);
        unsigned zeros = __ballot_sync(0xffffffffu, from == nullptr && to != nullptr);
        __syncwarp();
        uint8_t* row = shared_.data[stage] + lane_ * cut_.piece_bytes;
        if (from != nullptr) ptx::bulk_load(row, from + at, cut_.piece_bytes, &shared_.full[stage]);
        if (zeros != 0) fill_zeros(stage, zeros);
        if (lane_ < cut_.unit_rows) shared_.target[stage][lane_] = to, shared_.twins[stage][lane_] = twins;
        ++issued_;
        if (issued_ - stored_ > kLag) store();
    }

    __device__ void fill_zeros(int stage, unsigned rows) {
        for (; rows != 0; rows &= rows - 1) {
            const auto row = ptx::smem_address(shared_.data[stage]) + (__ffs(rows) - 1) * cut_.piece_bytes;
            for (int i = lane_ * 16; i < cut_.piece_bytes; i += 512) ptx::store_shared_v4(row + i, uint4{0, 0, 0, 0});
        }
        // Zeros written through the generic proxy, stored by the async proxy: fence by every writer, then a barrier.
        ptx::fence_async_shared();
        __syncwarp();
    }

    __device__ void store() {
        const int stage = stored_ % kStages;
        wait(&shared_.full[stage], (stored_ / kStages) & 1, deadline_, Waiting::kRowLanded);
        if (lane_ < cut_.unit_rows) {
            uint8_t* to = shared_.target[stage][lane_];
            if (to != nullptr) ptx::bulk_store(to, shared_.data[stage] + lane_ * cut_.piece_bytes, cut_.piece_bytes);
        }
        __syncwarp();  // the lanes below read what others wrote in issue
        for (int i = lane_; i < cut_.unit_rows * pool_.top_k; i += 32)
            store_twin(stage, i / pool_.top_k, i % pool_.top_k);
        ptx::tma_store_commit();
        ++stored_;
    }

    // Row `row` of the unit once more, to where its k-th twin lies; by one lane.
    __device__ void store_twin(int stage, int row, int k) {
        const int* twins = shared_.twins[stage][row];
        const int twin = twins == nullptr ? -1 : twins[k];
        if (twin < 0) return;
        uint8_t* first = shared_.target[stage][row];
        const int64_t at = (first - pool_.rows) % cut_.row_bytes;
        uint8_t* to = pool_.rows + int64_t{twin} * cut_.row_bytes + at;
        if (to != first) ptx::bulk_store(to, shared_.data[stage] + row * cut_.piece_bytes, cut_.piece_bytes);
    }

    MoverShared<kStages>& shared_;
    const RowCut& cut_;
    const Deadline& deadline_;
    const TwinPool pool_;
    const int lane_;
    int issued_ = 0;
    int stored_ = 0;
};

// Claims of `rows` rows at a time from one queue; the next one is fetched while the present one is worked on.
class Claims {
public:
    __device__ Claims(int* queue, int rows) : queue_(queue), rows_(rows) { next_ = fetch(); }

    // First row of the next claim, the same in every lane.
    __device__ int64_t take() {
        const int64_t first = int64_t{__shfl_sync(0xffffffffu, next_, 0)} * rows_;
        next_ = fetch();
        return first;
    }

private:
    __device__ int fetch() { return (threadIdx.x & 31) == 0 ? atomicAdd(queue_, 1) : 0; }

    int* queue_;
    int rows_;
    int next_;
};

}  // namespace megamoe
