// Checks and conversions that the host side of several kernels shares.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "comm/peers.cuh"
#include "host/comm.hpp"

namespace megamoe {

// Both throw std::runtime_error.
void check(cudaError_t error, const char* what);
void require(bool good, const char* name, int64_t value, const char* allowed);

int sm_count();

Deadline deadline_of(const WorkspaceHandle& handle);
Peers peers_of(const WorkspaceHandle& handle);

}  // namespace megamoe
