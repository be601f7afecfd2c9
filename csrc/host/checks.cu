#include "host/checks.hpp"

#include <climits>
#include <stdexcept>
#include <string>

#include "kernels/plan.cuh"

namespace megamoe {

void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string("megamoe: ") + what + ": " + cudaGetErrorString(error));
    }
}

void require(bool good, const char* name, int64_t value, const char* allowed) {
    if (!good) {
        throw std::runtime_error(std::string("megamoe: ") + name + " is " + std::to_string(value) +
                                 "; allowed: " + allowed);
    }
}

Deadline deadline_of(const WorkspaceHandle& handle) {
    const WorkspaceLayout layout =
        workspace_layout({handle.ranks, handle.experts, handle.top_k, handle.hidden, handle.tokens});
    return {static_cast<unsigned long long>(handle.deadline_ns),
            reinterpret_cast<WaitRecord*>(handle.wait_record),
            static_cast<int>(handle.rank),
            static_cast<int>(handle.ranks),
            reinterpret_cast<const uint64_t*>(handle.bases),
            layout.abort};
}

Peers peers_of(const WorkspaceHandle& handle) {
    require(handle.ranks >= 1 && handle.ranks <= kMaxRanks, "ranks", handle.ranks, "1..64");
    require(handle.experts >= 1 && handle.experts <= kMaxPlanExperts, "experts", handle.experts, "1..1024");
    require(handle.experts % handle.ranks == 0, "experts", handle.experts, "a multiple of ranks");
    require(handle.top_k >= 1 && handle.top_k <= 16, "top_k", handle.top_k, "1..16");
    require(handle.hidden >= 256 && handle.hidden % 256 == 0, "hidden", handle.hidden, "multiples of 256");
    // Row numbers are 32-bit on the device: all ranks' slots on one owner, each expert padded.
    require(handle.ranks * handle.tokens * handle.top_k + 128 * handle.experts <= INT_MAX, "tokens", handle.tokens,
            "ranks * tokens * top_k + 128 * experts below 2^31");
    require(handle.tokens * handle.top_k / kPlanMaxBlocks < 65000, "tokens", handle.tokens,
            "tokens * top_k below 8 million");
    Peers peers{};
    peers.layout = workspace_layout({handle.ranks, handle.experts, handle.top_k, handle.hidden, handle.tokens});
    peers.bases = reinterpret_cast<const uint64_t*>(handle.bases);
    peers.rank = static_cast<int>(handle.rank);
    peers.ranks = static_cast<int>(handle.ranks);
    peers.flag_tiles = static_cast<int>(flag_tiles(peers.layout.shape));
    peers.deadline = deadline_of(handle);
    return peers;
}

int sm_count() {
    int device = 0, count = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
    return count;
}

}  // namespace megamoe
