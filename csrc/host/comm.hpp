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
constexpr int kLayoutInts = 16;
constexpr int kPlanLayoutInts = 8;

// Offsets of the regions and the bytes in all, in the order of WorkspaceLayout. shape: R, E, K, H, T.
void write_workspace_layout(const int64_t* shape, int64_t* out);

// A plan's tables in device memory: layout/plan.cuh.
struct PlanPointers {
    int* control;
    int* counts;
    int* expert_rows;
    int* expert_offset;
    int* block_counts;
    int* topk_ids;
    int64_t* slot_of;
    int64_t* source_of;  // null while its memory is not allocated yet
};

// Offsets of the tables, in the order of PlanLayout, for `slots` = T * K.
void write_plan_layout(int64_t ranks, int64_t experts, int64_t slots, int64_t* out);

// Bytes of the tables before source_of.
int64_t plan_bytes(const WorkspaceHandle& workspace, int64_t tokens);

// source_of: where it has memory of its own; else it follows the other tables.
PlanPointers plan_pointers(const WorkspaceHandle& workspace, int64_t tokens, void* tables, int64_t* source_of);

// kAll: the three in one call; with one rank kPlace has written source_of already.
enum class PlanPhase : int { kCount = 0, kPlace = 1, kSources = 2, kAll = 3 };

struct PlanArgs {
    WorkspaceHandle workspace;
    const void* ids;
    bool wide_ids;
    int64_t tokens;
    int row_tile;
    int64_t capacity;
    PlanPointers plan;
    int64_t status;
    cudaStream_t stream;
};

void run_plan(PlanPhase phase, const PlanArgs& args);

enum class RowsPhase : int { kStage = 0, kAnnounceStaged = 1, kAnnounce = 2, kPull = 3, kPush = 4, kSum = 5 };

struct RowsArgs {
    WorkspaceHandle workspace;
    int op;
    int buffer;
    int64_t tokens;
    PlanPointers plan;
    void* pool;
    void* tokens_in;
    void* tokens_out;
    const float* weights;
    float* row_weights;
    float* dweights;
    int* control;  // kPull with peers: 4 ints, then R x T x K for rows_of_token
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
