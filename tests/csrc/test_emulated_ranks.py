"""All kernels on the CPU (emulator/), the fused ones against fp64: several ranks that really wait for each other, one
late, copies that land late and in any order, warps that stall. Mutations of waits, fences and signals must be caught.

Two fences have no mutation here, since no rule of the emulator needs them: `fence.acq_rel.sys` in `signal`, which the
release store after it implies for the writes ordered before it by a barrier (it stands for the reader), and the fence
of the announcing thread, which repeats for the staging copies what every puller does after its acquire.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import sys
from pathlib import Path

import pytest

from tests import distributed

from .emulator import build, ranks, run

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64",
    reason="the emulator asks Linux for memory below 2 GB",
)
TIMEOUT_S = 240  # of two cores that others use as well
MUTATION_DEADLINE_S = 5.0
FIRST, PIECES, AHEAD, CTAS = (
    "layer of 4 ranks, one without tokens",
    "layer of 2 ranks, rows in pieces",
    "a rank without rows runs ahead",
    "combines by many CTAs",
)
FUSED, PEERS, MANY_ROWS = "fused, 2 ranks", "fused, 4 ranks", "fused, 1 rank, many rows"
ADDED = "fused, gradients added or not wanted"
SMALL_ROWS, PLANS = "layer of 2 ranks, several rows a unit", "plans, int32, high water"
EARLY = "if (!last_cta(params.control + kRowTicket, gridDim.x)) return;\n    if (threadIdx.x >= peers.ranks) return;"
MUTATIONS = {
    # what: (file, text, what replaces it, case that must fail)
    "rows pulled before they are announced": (
        "roles/dispatch.cuh", "if (unseen) wait_ready(peers, rank, expected);", "", PIECES),
    "no proxy fence between announcement and bulk load": (
        "roles/dispatch.cuh", "unseen);\n    ptx::fence_async();", "unseen);", PIECES),
    "staging overwritten before it was pulled": (
        "kernels/dispatch.cu", "    wait_pulled_kernel<<<1, kMaxRanks, 0, stream>>>(params);\n", "",
        "dispatches back to back"),
    "a token stored to one of its rows only": (
        "roles/mover.cuh", "        if (to != first) ptx::bulk_store(", "        if (false) ptx::bulk_store(", PIECES),
    "tokens of peers left to nobody": (
        "kernels/dispatch.cu", "static_cast<int>(blockIdx.x) < nvlink_ctas", "false", SMALL_ROWS),
    "a peer asked for another one's tokens": (
        "roles/dispatch.cuh", "(peers.rank + 1 + static_cast<int>(mine % others))", "(peers.rank + 1)", FIRST),
    "sum before the pushes": (
        "kernels/combine.cu", "if (params.peers.ranks > 1) wait_pushed_kernel<<<1, kMaxRanks, 0, stream>>>(params);",
        "", FIRST),
    "pushed announced by the first CTA": ("kernels/combine.cu", EARLY, EARLY.replace("!last_cta", "last_cta"), CTAS),
    "rows not written when the warp is done": ("roles/mover.cuh", "ptx::tma_store_wait_all();", "", PIECES),
    "no proxy fence between bulk stores and release": (
        "roles/mover.cuh", "ptx::tma_store_wait_all();\n        ptx::fence_async();", "ptx::tma_store_wait_all();",
        PIECES),
    "a stage filled again while it is being stored": (
        "roles/mover.cuh", "ptx::tma_store_wait_read<kStages - kLag - 1>();", "", PIECES),
    "a row stored before it landed": (
        "roles/mover.cuh", "wait(&shared_.full[stage], (stored_ / kStages) & 1, deadline_, Waiting::kRowLanded);", "",
        PIECES),
    "zeros stored without a fence": ("roles/mover.cuh", "ptx::fence_async_shared();", "", SMALL_ROWS),
    "counts read before they are sent": (
        "kernels/plan.cu",
        "wait_word(peers, words(peers, peers.rank, peers.layout.counted) + threadIdx.x, epoch, Waiting::kCounts,\n"
        "                  threadIdx.x);", "", PLANS),
    "lists read before they are sent": (
        "kernels/plan.cu",
        "    if (params.peers.ranks > 1) wait_listed_kernel<<<1, kMaxRanks, 0, stream>>>(params);\n", "", PLANS),
    "fused: rows pulled before they are announced": (
        "roles/pull.cuh", "        wait_for_peers(peers, source.rank, expected, seen);\n", "", PEERS),
    "fused: arrived before they are pulled": (
        "roles/pull.cuh", "        if (until == kAllRows) wait_for_frontier",
        "        if (lane == 0) add_counter(params.counters.arrived + which * params.tiles + first / kRowTile,"
        " params.claim_rows);\n        if (until == kAllRows) wait_for_frontier", PEERS),
    "fused: acknowledged by nobody": (
        "roles/pull.cuh", "            count_pulled(params, which, params.claim_rows, rows + 1);", "", PEERS),
    "summed in sweeps before it is there": (
        "roles/sum.cuh", "state.filled = state.filled && static_cast<int>(flag[i] - epoch) >= 0;", "", PEERS),
    "summed in a turn before it is there": ("roles/sum.cuh", "turn_filled(slot, epoch) & open;", "open;", PEERS),
    "no turn waits": ("roles/sum.cuh", "open == 0 || !wait", "true", PEERS),
    "a turn does not look at flags": (
        "roles/sum.cuh", "static_cast<int>(ptx::load_relaxed_sys(slot.flag) - epoch) < 0", "false", PEERS),
    "read before it is made": (
        "roles/fused.cuh", "        wait_counter(params.peers, counters.made + at, shares, Waiting::kTileMade);\n", "",
        FUSED),
    "read before its rows arrived": (
        "roles/fused.cuh",
        "            wait_counter(params.peers, counters.arrived + at, kRowTile, Waiting::kRowsArrived);\n", "", FUSED),
    "no proxy fence between counters and TMA loads": (
        "roles/fused.cuh", "    ptx::fence_async();\n}\n\n// Tells", "}\n\n// Tells", FUSED),
    "made before it is written": (
        "roles/fused.cuh", "        ptx::tma_store_wait_all();\n        ptx::fence_async();\n", "", FUSED),
    "movers are not told of the frontier": (
        "roles/fused.cuh",
        "    if ((threadIdx.x & 31) == 0 && pull >= 0) atomicMax(params.counters.frontier + pull, slot.expert);\n", "",
        FUSED),
    "the first unit of a row tile announces it": (
        "roles/scatter.cuh", " + warpgroups != all) return;", " != 0) return;", PEERS),
    "the second pull before it is staged": (
        "roles/pull.cuh", "if (which == 1) wait_for_staged(", "if (which == 2) wait_for_staged(", PEERS),
    "the last tokens staged by nobody": (
        "roles/stage.cuh", "if (first >= params.tokens) return false;",
        "if (first + params.claim_rows > params.tokens) return false;", FUSED),
    "staging left to waits": (
        "roles/fused.cuh", "            while (which == 1 && staging.step<kMoverDepth>()) {}  // peers pull it next\n",
        "", PEERS),
    "a unit's slot written before it was read": (
        "roles/scheduler.cuh",
        "    wait(&shared.unit_free[cursor.index], cursor.parity ^ 1, deadline, Waiting::kUnitSlotFree);\n", "",
        "fused, 1 rank"),
    "the next claim never due, behind a long product": (
        "roles/loader.cuh", "        if (k_block + 1 == claim_at) ptx::mbarrier_arrive(&shared.claim_due);\n", "",
        "fused, 1 rank, long products"),
    "the next claim never due, behind a short product": (
        "roles/loader.cuh", "    if (claim_at == 0) ptx::mbarrier_arrive(&shared.claim_due);\n", "", FUSED),
    "a stage handed back while products read it": (
        "roles/math.cuh", "        ptx::wgmma_wait<1>();\n", "", MANY_ROWS),
    "accumulators read before the last step": ("roles/math.cuh", "    ptx::wgmma_wait<0>();\n", "", MANY_ROWS),
    "products before their operands": (
        "roles/math.cuh",
        "        wait(&shared.stage_full[cursor.index], cursor.parity, params.deadline, Waiting::kStageFull);\n"
        "        if (previous", "        if (previous", MANY_ROWS),
    "a wgrad without its last rows": (
        "roles/math.cuh", "if (rest > kSliceK)", "if (rest > kBlockK)", FUSED),
    "a wgrad's last rows overwrite the others": (
        "roles/math.cuh", "cursor.index, d, whole > 0)", "cursor.index, d, false)", MANY_ROWS),
    "old gradients overwritten where L2 adds": (
        "roles/output.cuh", "params.accumulate && added_in_l2(stage)", "false", ADDED),
    "old gradients added twice": (
        "roles/output.cuh", "params.accumulate && added_in_l2(stage)", "params.accumulate", ADDED),
    "a stage loaded before it is free": (
        "roles/loader.cuh",
        "        wait(&shared.stage_free[ring.index], ring.parity ^ 1, params.deadline, Waiting::kStageFree);\n", "",
        MANY_ROWS),
    "fewer bytes expected than come": (
        "roles/loader.cuh", "ptx::mbarrier_expect(full, kStageBytes)",
        "ptx::mbarrier_expect(full, kStageBytes - 8192)", MANY_ROWS),
    "a stage handed back to the own loader only": (
        "roles/shared.cuh",
        "if (stage >= 0 && lane < kClusterSize) ptx::mbarrier_arrive_cta(&shared.stage_free[stage], lane);",
        "if (stage >= 0 && lane == 0) ptx::mbarrier_arrive(&shared.stage_free[stage], 2);", MANY_ROWS),
    "results stored without a fence": (
        "roles/output.cuh",
        "    ptx::fence_async_shared();  // this thread's writes before the TMA unit's reads\n", "", MANY_ROWS),
    "results written before there is place": (
        "roles/output.cuh", "    wait(&shared.stage_full[place.index], place.parity, deadline, Waiting::kStageFull);\n",
        "", MANY_ROWS),
    "a place handed back while results leave it": (
        "roles/output.cuh", "            ptx::tma_store_wait_read<1>();\n", "", MANY_ROWS),
    "a matrix descriptor of another tile": (
        "ptx/layout.cuh", "8192 >> 4", "4096 >> 4", MANY_ROWS),
    "one word for all announcements, a rank that runs ahead": (
        "layout/workspace.cuh", "constexpr int kReadySlots = 4;", "constexpr int kReadySlots = 1;", AHEAD),
}  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return build.build(tmp_path_factory.mktemp("emulated"))


def start(library: Path, seed: int, names: list[str], log: Path, deadline_s: float = ranks.DEADLINE_S):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*distributed.PRELOAD, run.__name__])
    process = context.Process(target=_child, args=(str(library), seed, names, str(log), deadline_s))
    process.start()
    return process


def _child(library: str, seed: int, names: list[str], log: str, deadline_s: float) -> None:
    os.environ["MEGAMOE_RECORD_DIR"] = os.path.dirname(log)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        run.main(library, str(seed), *names, deadline_s=deadline_s)
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the emulator's threads wait for ever


def test_every_case(library, tmp_path):
    log = tmp_path / "log"
    process = start(library, 0, list(run.CASES), log)
    process.join(TIMEOUT_S)
    assert process.exitcode == 0, log.read_text()
    assert [line for line in log.read_text().splitlines() if line.startswith("passed")] == [
        f"passed {name}" for name in run.CASES
    ]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_is_caught(mutation, library, tmp_path):
    name, old, new, case = MUTATIONS[mutation]
    changed = build.build(tmp_path, {name: (old, new)}, base=library.parent)
    for seed in range(12):
        log = tmp_path / f"log{seed}"
        process = start(changed, seed, [case], log, MUTATION_DEADLINE_S)
        process.join(TIMEOUT_S)
        if process.exitcode != 0:
            process.kill()
            print(log.read_text())
            return
    pytest.fail(f"{mutation}: nothing noticed it")
