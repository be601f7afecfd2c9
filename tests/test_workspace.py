"""The workspace without a GPU: one layout in two languages, its size, agreement of the ranks."""

import itertools
import subprocess

import pytest
import torch

from megamoe_train.config import MegaMoEConfig
from megamoe_train.workspace import ALIGNMENT, Layout, Shape, bytes_needed, check_agreement, layout_of
from tests.csrc.host import CSRC
from tests.distributed import run_ranks

SHAPES = [
    Shape(ranks, experts * ranks, top_k, hidden, tokens)
    for ranks, experts, top_k, hidden, tokens in itertools.chain(
        itertools.product((1, 2, 8, 64), (1, 5), (1, 6), (256, 7168), (0, 1, 4099)),
        [(2, 192, 6, 7168, 8192), (2, 8, 16, 16384, 500_000)],
    )
]

PROGRAM = """
#include <cstdio>
#include "layout/workspace.cuh"
int main() {
    long long r, e, k, h, t;
    while (std::scanf("%lld %lld %lld %lld %lld", &r, &e, &k, &h, &t) == 5) {
        const megamoe::WorkspaceLayout layout = megamoe::workspace_layout({r, e, k, h, t});
        const int64_t* word = &layout.state;
        for (; word <= &layout.bytes; ++word) std::printf("%lld ", static_cast<long long>(*word));
        std::printf("\\n");
    }
}
"""


def test_python_and_csrc_lay_it_out_alike(tmp_path):
    source, binary = tmp_path / "layout.cpp", tmp_path / "layout"
    source.write_text(PROGRAM)
    subprocess.run(["g++", "-std=c++20", "-Wall", f"-I{CSRC}", "-o", binary, source], check=True)
    asked = "\n".join(f"{s.ranks} {s.experts} {s.top_k} {s.hidden} {s.tokens}" for s in SHAPES)
    answer = subprocess.run([binary], input=asked, capture_output=True, text=True, check=True).stdout.splitlines()
    for shape, line in zip(SHAPES, answer, strict=True):
        assert [int(word) for word in line.split()] == layout_of(shape).offsets(), shape


def regions(shape: Shape) -> dict[str, int]:
    """Bytes of each region as the table of csrc/layout/workspace.cuh names them, written out a second time."""
    R, E, K, H, T = shape.ranks, shape.experts, shape.top_k, shape.hidden, shape.tokens
    tiles = (R * T * K + 127) // 128 + E // R
    counts = 4 * 2 * R * ((E + 8 + 31) // 32 * 32)
    words = {"state": 32, "abort": 8, "counted": 8 * R, "listed": 8 * R, "ready": 32 * R, "pulled": 16 * R}
    lists = {"pushed": 8 * R, "staged": 8 * R, "counts": counts, "row_sources": 8 * T * K, "weights": 8 * T * K}
    return words | lists | {"dweights": 4 * T * K, "staging": 4 * T * H, "slots": 2 * K * T * H,
                            "tile_flags": 4 * R * tiles}  # fmt: skip


def test_no_region_reaches_into_the_next():
    for shape in SHAPES:
        layout = layout_of(shape)
        names = [name for name in Layout.__dataclass_fields__ if name != "bytes"]
        ends = [*layout.offsets()[1:-1], layout.bytes]
        assert list(regions(shape)) == names
        for name, end in zip(names, ends, strict=True):
            begin = getattr(layout, name)
            assert begin % ALIGNMENT == 0 and end - begin >= regions(shape)[name] > end - begin - ALIGNMENT, name


def test_bytes_needed_of_the_flash_layer():
    config = MegaMoEConfig(num_experts=256, top_k=6, hidden_size=4096, intermediate_size=2048, ep_size=2)
    size = bytes_needed(config, 8192)
    rows = 2 * 8192 * 4096
    assert (2 + 6) * rows < size < (2 + 6) * rows * 1.01
    with pytest.raises(ValueError, match="tokens: got -1; allowed: >= 0"):
        bytes_needed(config, -1)


def test_shapes_that_cannot_be_are_refused_by_name():
    good = dict(ranks=2, experts=8, top_k=2, hidden=512, tokens=64)
    Shape(**good).validate()
    for field, value in (("ranks", 65), ("experts", 9), ("experts", 2048), ("top_k", 17), ("hidden", 300),
                         ("tokens", 2**30)):  # fmt: skip
        with pytest.raises(ValueError, match=f"{field}: got {value}; allowed"):
            Shape(**good | {field: value}).validate()


def agree(rank: int, world_size: int, changed: dict) -> str:
    values = dict(ranks=world_size, experts=8, top_k=2, hidden=512, tokens=64)
    if rank == world_size - 1:
        values |= changed
    try:
        check_agreement(Shape(**values), torch.distributed.group.WORLD, torch.device("cpu"), capacity=0)
    except ValueError as error:
        return str(error)
    return "agreed"


def test_ranks_that_differ_are_named_on_every_rank():
    assert run_ranks(agree, 3, {}) == ["agreed"] * 3
    for field, mine, theirs in (("hidden", 512, 256), ("tokens", 64, 65)):
        message = f"workspace {field}: rank 2 of the EP group has {theirs}, rank 0 has {mine}; they must agree"
        assert run_ranks(agree, 3, {field: theirs}) == [message] * 3
