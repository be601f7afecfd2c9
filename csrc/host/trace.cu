#include "host/trace.hpp"

#include "host/checks.hpp"
#include "roles/trace.cuh"

namespace megamoe {

#ifdef MEGAMOE_TRACE
namespace {
int64_t address_now = 0;
}

int64_t trace_size() { return int64_t{sm_count()} * kTraceRows * kTraceMarks; }
void set_trace(int64_t address) { address_now = address; }
TraceBuffer trace_buffer() { return {reinterpret_cast<long long*>(address_now)}; }
#else
int64_t trace_size() { return 0; }
void set_trace(int64_t address) { require(address == 0, "address", address, "0 in a build without MEGAMOE_TRACE=1"); }
TraceBuffer trace_buffer() { return {}; }
#endif

}  // namespace megamoe
