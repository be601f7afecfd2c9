// Optional trace (a build with MEGAMOE_TRACE=1): when each role of each CTA reached which point of which unit. Without
// it everything here compiles to nothing. megamoe_train/bench/trace.py reads it.
#pragma once
#include "ptx/clock.cuh"

namespace megamoe {

constexpr int kTraceMarks = 16;
constexpr int kTraceRows = 512;  // a CTA: row 0 is its own, the others its units in their order

// Columns of a unit's row. bench/trace.py: MARKS.
enum class Mark : int {
    kUnit,         // not a time: product << 32 | expert
    kClaimed,      // scheduler
    kReady,        // scheduler: all inputs are there
    kLoading,      // loader: first free stage
    kLoaded,       // loader: outputs granted
    kTaken,        // math warp 0
    kFirstStage,   // math warp 0: first operands are there
    kMultiplied,   // math warp 0
    kFirstOutput,  // math warp 0, wgrad and dgrad2: first output stage is there, with what it holds
    kDone,         // math warp 0: all results handed over
    kFirstFull,    // storer: first output stage of both warpgroups
    kSent,         // storer: all read from shared memory
    kSignalled     // storer: announced
};

// Columns of row 0. Times are of the SM's clock; the two pairs tie it to the GPU's. bench/trace.py: CTA_MARKS.
enum class CtaMark : int {
    kClock,
    kGlobal,
    kClockEnd,
    kGlobalEnd,
    kPulled,
    kPulledSecond,
    kSumming,
    kSummed,
    kMathSumming,
    kMoverTokens,  // no time: tokens that this mover summed
    kMathTokens    // and this math warp
};

struct TraceBuffer {
#ifdef MEGAMOE_TRACE
    long long* marks;  // [CTAs, kTraceRows, kTraceMarks]; null: nothing is recorded
#endif
};

// One role's pen.
class Trace {
public:
#ifdef MEGAMOE_TRACE
    __device__ explicit Trace(const TraceBuffer& buffer)
        : marks_(buffer.marks == nullptr ? nullptr : buffer.marks + int64_t{blockIdx.x} * kTraceRows * kTraceMarks) {}
    __device__ void begin_unit() { ++row_; }
    __device__ void unit(int product, int expert) {
        put(row_, static_cast<int>(Mark::kUnit), static_cast<long long>(product) << 32 | expert);
    }
    __device__ void mark(Mark mark) { put(row_, static_cast<int>(mark), clock64()); }
    __device__ void mark(CtaMark mark) { put(0, static_cast<int>(mark), clock64()); }
    __device__ void count(CtaMark mark, int value) { put(0, static_cast<int>(mark), value); }
    __device__ void tie(CtaMark clock, CtaMark global) {
        put(0, static_cast<int>(clock), clock64());
        put(0, static_cast<int>(global), static_cast<long long>(ptx::global_nanoseconds()));
    }

private:
    __device__ void put(int row, int column, long long value) {
        if (marks_ != nullptr && row < kTraceRows && (threadIdx.x & 31) == 0)
            marks_[row * kTraceMarks + column] = value;
    }
    long long* marks_;
    int row_ = 0;
#else
    __device__ explicit Trace(const TraceBuffer&) {}
    __device__ void begin_unit() {}
    __device__ void unit(int, int) {}
    __device__ void mark(Mark) {}
    __device__ void mark(CtaMark) {}
    __device__ void count(CtaMark, int) {}
    __device__ void tie(CtaMark, CtaMark) {}
#endif
};

}  // namespace megamoe
