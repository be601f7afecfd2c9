#pragma once
#include "cuda.h"

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, int, int,
                                                    cudaDriverEntryPointQueryResult*) {
    *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
    return cudaSuccess;
}
