// The trace that the next launches of this process write (roles/trace.cuh).
#pragma once
#include <cstdint>

namespace megamoe {

struct TraceBuffer;

// int64 elements that a trace of one launch needs; 0 in a build without MEGAMOE_TRACE.
int64_t trace_size();

// address: int64 [trace_size()] in device memory, 0: no more traces. Throws std::runtime_error in a build without.
void set_trace(int64_t address);

TraceBuffer trace_buffer();

}  // namespace megamoe
