// Plan, dispatch and combine, from plain pointers to their launches.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace megamoe {

// One rank's workspace; megamoe_train/workspace.py: Workspace.handle holds the same numbers in this order.
struct WorkspaceHandle {
    int64_t bases;  // device address of R base addresses
    int64_t rank;
    int64_t ranks;
    int64_t experts;
    int64_t top_k;
    int64_t hidden;
    int64_t tokens;
    int64_t deadline_ns;
    int64_t wait_record;
};
constexpr int kHandleInts = sizeof(WorkspaceHandle) / 8;
constexpr int kLayoutInts = 15;

// Offsets of the regions and the bytes in all, in the order of WorkspaceLayout. shape: R, E, K, H, T.
void write_workspace_layout(const int64_t* shape, int64_t* out);

// kAll: the three in one call; with one rank kPlace has written source_of already.
enum class PlanPhase : int { kCount = 0, kPlace = 1, kSources = 2, kAll = 3 };

struct PlanArgs {
    WorkspaceHandle workspace;
    const void* ids;
    bool wide_ids;
    int64_t tokens;
    int row_tile;
    int64_t capacity;
    int* block_counts;
    int64_t block_counts_size;
    int* control;
    int64_t status;
    int64_t* slot_of;
    int* ids_out;
    int* counts;
    int* expert_rows;
    int* expert_offset;
    int64_t* source_of;
    cudaStream_t stream;
};

// Ints that block_counts needs for `slots` = T * K.
int64_t plan_scratch(int64_t slots, int64_t experts);

void run_plan(PlanPhase phase, const PlanArgs& args);

enum class RowsPhase : int { kStage = 0, kAnnounceStaged = 1, kAnnounce = 2, kPull = 3, kPush = 4, kSum = 5 };

struct RowsArgs {
    WorkspaceHandle workspace;
    int op;
    int buffer;
    int64_t tokens;
    const int* plan_control;
    const int64_t* source_of;
    const int* num_rows;
    const int64_t* slot_of;
    const int* ids;
    void* pool;
    void* tokens_in;
    void* tokens_out;
    const float* weights;
    float* row_weights;
    float* dweights;
    int* control;
    int num_sms;
    cudaStream_t stream;
};

void run_rows(RowsPhase phase, const RowsArgs& args);

struct RoutingArgs {
    const void* map;
    const float* probs;
    int* ids;
    float* weights;
    int64_t tokens;
    int64_t experts;
    int64_t top_k;
    cudaStream_t stream;
};

void run_routing(const RoutingArgs& args);

// Device addresses, a multiple of 8192 bytes.
void run_copy(int64_t source, int64_t target, int64_t bytes, int num_sms, cudaStream_t stream);

void run_abort(const WorkspaceHandle& workspace, cudaStream_t stream);

}  // namespace megamoe
