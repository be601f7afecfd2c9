"""The schedule of the fused kernels (csrc/schedule), walked on the CPU: agents of several ranks in random orders, any
number of resident clusters. No deadlock, nothing read before it is made, all work done once. Mutations must be caught.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .host import CSRC, HERE, compile_host

CASES = 160  # of the unchanged schedule
MUTATED_CASES = 120  # at most, of each mutation
WORKERS = len(os.sched_getaffinity(0))
ORDER, PULLS, GROUPED = "order.cuh", "pulls.cuh", "grouped.cuh"
WALK, MOVERS = "walk_fused.cpp", "fused_movers.hpp"
SHARES = "ceil_div(n_extent, tile_columns(gemm)) * warpgroups_of(rows, m_tile)"
MUTATIONS = {
    # what: (file, text, what replaces it, words of which one must stand in the failure)
    "weight gradients between dgrads": (
        ORDER, "return {4, experts, {0, lag_for(clusters, dgrad2, experts), experts, experts}};",
        "const int lag = lag_for(clusters, dgrad2, experts);\n    return {4, experts, {0, lag, lag, lag}};",
        ["deadlock"]),
    "the second pull has no mover": (WALK, "puller.which = state,", "puller.which = 0,", ["deadlock", "a row"]),
    "the frontier stays where it is": (
        WALK, "here.frontier[pull] = std::max(here.frontier[pull], job.expert);", ";", ["deadlock"]),
    "the next unit is never due": (WALK, "mine.due = units;", ";", ["deadlock"]),
    "one expert less of the lead": (PULLS, "return expert - lead;", "return expert - lead + 1;", ["deadlock"]),
    "fc2 an expert ahead of fc1": (
        ORDER, "return {2, experts, {0, experts}};", "return {2, experts, {0, -1}};", ["deadlock", "not done once"]),
    "what needs leads what is needed": (
        ORDER, "index / order.products - order.lag[product]",
        "index / order.products - (order.lag[order.products - 1] - order.lag[product])", ["deadlock"]),
    "the last segment dropped": (
        ORDER, "return order.products * (order.experts + order.lag[order.products - 1]);",
        "return order.products * (order.experts + order.lag[order.products - 1]) - 1;", ["not done once", "deadlock"]),
    "a unit of every long segment dropped": (
        GROUPED, "return num_pairs(rows) * n_tiles + ", "return num_pairs(rows) * n_tiles - (num_pairs(rows) > 1) + ",
        ["not done once", "deadlock"]),
    "one unit instead of another": (
        ORDER, "unit_at(rows, n_tiles, index);", "unit_at(rows, n_tiles, index - (index == 1));", ["twice"]),
    "one unit of a wgrad instead of another": (
        ORDER, "rows, n_tiles, index);\n    return", "rows, n_tiles, index - (index == 1));\n    return", ["twice"]),
    "made one share early": (ORDER, SHARES, f"{SHARES} - (gemm == Gemm::kFc1 || gemm == Gemm::kDgrad2)", ["not made"]),
    "made one share late": (ORDER, SHARES, f"{SHARES} + (gemm == Gemm::kFc1 || gemm == Gemm::kDgrad2)", ["deadlock"]),
    "pushed one share early": (
        ORDER, SHARES, f"{SHARES} - (gemm == Gemm::kFc2 || gemm == Gemm::kDgrad1)", ["not filled"]),
    "pushed one share late": (ORDER, SHARES, f"{SHARES} + (gemm == Gemm::kFc2 || gemm == Gemm::kDgrad1)", ["deadlock"]),
    "an M pair waits for its first tile": (
        ORDER, "(unit.n_pair ? 1 : kClusterSize)", "1", ["not made", "not there"]),
    "a weight gradient waits for one tile": (
        ORDER, "all_rows ? ceil_div(rows, kTileM) :", "all_rows ? (rows > 0 ? 1 : 0) :", ["not made", "not there"]),
    "wgrad1 does not wait for x": (ORDER, "product == kProductWgrad1 ? 1 : -1", "-1", ["not there"]),
    "the claim at the end does not count": (
        MOVERS, "state == 4 ? work.claim_rows : 1", "state == 4 ? work.claim_rows : 0", ["acknowledgements"]),
    "staging announced by the first claim": (
        MOVERS, "if (rank.staged_tokens != tokens) state = -1;", "if (rank.staged_tokens == tokens) state = -1;",
        ["that is not staged", "deadlock"]),
    "staging is left to nobody": (
        WALK, "            if (state == 1 && stager.step(world, rank)) return true;\n", "",
        ["deadlock", "not staged once"]),
    "the second pull does not wait for staging": (
        MOVERS, "which == 1 && !rank.staged_word[from]", "which == 2", ["that is not staged"]),
    "no turn waits": (MOVERS, "round == 1 && std", "round == 2 && std", ["not summed once"]),
    "tokens are not taken": (MOVERS, "return rank.taken[token]++ != 0;", "return false;", ["not summed once"]),
}  # fmt: skip


def run(binary: Path, *arguments: object) -> str:
    command = [binary, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout.strip()


def build_mutation(folder: Path, file: str, before: str, after: str) -> Path:
    shutil.copytree(CSRC / "schedule", folder / "csrc" / "schedule")
    for source in (HERE / WALK, *HERE.glob("fused_*.hpp")):
        shutil.copy(source, folder)
    changed = folder / file if file in (WALK, MOVERS) else folder / "csrc" / "schedule" / file
    text = changed.read_text()
    assert text.count(before) == 1, f"{file}: {before!r} stands there {text.count(before)} times"
    changed.write_text(text.replace(before, after))
    return compile_host(folder / WALK, folder, folder / "csrc")


@pytest.fixture(scope="module")
def walker(tmp_path_factory) -> Path:
    return compile_host(WALK, tmp_path_factory.mktemp("fused"))


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> dict[str, str]:
    """What the walk says of each mutation; built and run side by side."""

    def judge(name: str) -> str:
        binary = build_mutation(tmp_path_factory.mktemp("mutation"), *MUTATIONS[name][:3])
        return run(binary, 0, MUTATED_CASES)

    with ThreadPoolExecutor(WORKERS) as pool:
        return dict(zip(MUTATIONS, pool.map(judge, MUTATIONS), strict=True))


def test_any_order(walker):
    with ThreadPoolExecutor(WORKERS) as pool:
        starts = range(0, CASES, 20)
        for start, said in zip(starts, pool.map(lambda seed: run(walker, seed, 20), starts), strict=True):
            assert said.startswith("ok"), f"seeds from {start}: {said}"


def test_dependencies_point_to_earlier_work(walker):
    assert run(walker, "order").startswith("ok")


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_is_caught(mutation, failures):
    said = failures[mutation]
    assert said.startswith("failed"), f"{mutation}: nothing noticed it"
    assert any(word in said for word in MUTATIONS[mutation][3]), f"{mutation}: {said}"
