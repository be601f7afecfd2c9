"""The order of work of the grouped GEMM, walked on the CPU: csrc/schedule/grouped.cuh compiled for the host."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from .host import compile_host

TILE_M, TILE_N = 128, 256
GROUP_BYTES, LEAST_COLUMNS = 8 << 20, 8  # of the columns that a wgrad's units go along
ORDERS = pytest.mark.parametrize("reduced", [-1, 0, 40, 1024, 9000])


@pytest.fixture(scope="module")
def walker(tmp_path_factory) -> Path:
    return compile_host("walk_schedule.cpp", tmp_path_factory.mktemp("schedule"))


def walk(walker: Path, cases: list[tuple[int, int]], reduced: int = -1) -> list[list[tuple[int, int]]]:
    """For each (n_tiles, rows): the tiles in order, two per unit, one of each CTA.

    reduced: rows that a wgrad sums over, `rows` being those of its gradient; -1: another product.
    """
    text = "\n".join(f"{n} {rows} {reduced}" for n, rows in cases)
    lines = subprocess.run([walker], input=text, capture_output=True, text=True, check=True).stdout.splitlines()
    result = []
    for line in lines:
        units, *numbers = (int(word) for word in line.split())
        assert len(numbers) == 4 * units
        result.append(list(zip(numbers[::2], numbers[1::2], strict=True)))
    return result


def cases() -> list[tuple[int, int]]:
    rng = random.Random(5)
    edges = [0, 1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 383, 384, 385, 1536, 5000]
    return [(n, rows) for n in (1, 2, 3, 16, 28) for rows in edges] + [
        (rng.randint(1, 64), rng.randint(0, 20000)) for _ in range(200)
    ]


@ORDERS
def test_each_tile_is_done_once(walker, reduced):
    """Every row and column tile that an expert has appears once; what lies beyond has no rows or no columns."""
    for (n_tiles, rows), tiles in zip(cases(), walk(walker, cases(), reduced), strict=True):
        needed = {(m, n) for m in range(-(-rows // TILE_M)) for n in range(n_tiles)}
        assert len(set(tiles)) == len(tiles), f"n_tiles {n_tiles}, rows {rows}: a tile is done twice"
        assert needed <= set(tiles), f"n_tiles {n_tiles}, rows {rows}: a tile is missing"
        for m, n in set(tiles) - needed:
            assert n == n_tiles and n_tiles % 2 == 1, f"n_tiles {n_tiles}, rows {rows}: tile {(m, n)} has no work"


@ORDERS
def test_no_row_tile_without_rows(walker, reduced):
    """Compute is not padded to pairs: the last 1..128 rows are done by two CTAs side by side."""
    for (n_tiles, rows), tiles in zip(cases(), walk(walker, cases(), reduced), strict=True):
        beyond = [m for m, _ in tiles if m * TILE_M >= rows]
        assert not beyond, f"n_tiles {n_tiles}, rows {rows}: row tile {beyond[0]} has no rows"


@ORDERS
def test_pairs_share_an_operand(walker, reduced):
    """The CTAs of a unit have the same column tile or the same row tile: that operand is multicast."""
    for (n_tiles, rows), tiles in zip(cases(), walk(walker, cases(), reduced), strict=True):
        for (m0, n0), (m1, n1) in zip(tiles[::2], tiles[1::2], strict=True):
            assert (m1, n1) in {(m0 + 1, n0), (m0, n0 + 1)}, f"n_tiles {n_tiles}, rows {rows}"


@pytest.mark.parametrize("n_tiles", [7, 16])
@pytest.mark.parametrize("pairs", [0, 1, 4, 8, 11])
def test_the_tail_reuses_column_tiles(walker, n_tiles, pairs):
    """The last rows' unit of two column tiles comes right behind the last group's units of them."""
    (tiles,) = walk(walker, [(n_tiles, pairs * 256 + 50)])
    units = list(zip(tiles[::2], tiles[1::2], strict=True))
    tails = [i for i, ((m, _), _) in enumerate(units) if m == 2 * pairs]
    assert [units[i][0][1] for i in tails] == list(range(0, n_tiles, 2))
    width = pairs - max(pairs - 1, 0) // 8 * 8
    for i in tails:
        column = units[i][0][1]
        columns = [column] * width + [column + 1] * width if column + 1 < n_tiles else [column] * width
        assert [n for (_, n), _ in units[i - len(columns) : i]] == columns


def test_groups_reuse_a_column_tile(walker):
    """Inside a group of eight pairs all row tiles of a column tile come one after the other."""
    (tiles,) = walk(walker, [(16, 20 * 256)])
    pairs = tiles[::2]
    for start, width in ((0, 8), (8 * 16, 8), (16 * 16, 4)):
        for column in range(16):
            run = pairs[start + column * width : start + (column + 1) * width]
            assert {n for _, n in run} == {column}
            assert [m for m, _ in run] == sorted(m for m, _ in run)


@pytest.mark.parametrize("reduced", [1, 384, 1024, 1536, 9000])
@pytest.mark.parametrize("n_tiles", [1, 7, 12, 16, 28, 56])
@pytest.mark.parametrize("rows", [100, 512, 1408, 7168])
def test_a_wgrad_goes_along_rows_of_the_gradient(walker, reduced, n_tiles, rows):
    """In groups of columns whose part of the right operand stays in L2, even but for the last, of about one width; from
    one group to the next, the rows go to and fro, the last 128 without a neighbour behind them."""
    (tiles,) = walk(walker, [(n_tiles, rows)], reduced)
    units = list(zip(tiles[::2], tiles[1::2], strict=True))
    pairs = [(m0 // 2, n0) for (m0, n0), (_, n1) in units if n0 == n1]
    count, tail = rows // 256 + (rows % 256 > 128), 0 < rows % 256 <= 128
    widths: list[int] = []
    at = 0
    while at < len(pairs):
        run = next((i for i, (pair, _) in enumerate(pairs[at:]) if pair != pairs[at][0]), n_tiles)
        down = range(count) if len(widths) % 2 == 0 else range(count - 1, -1, -1)
        expected = [(pair, n) for pair in down for n in range(sum(widths), sum(widths) + run)]
        assert pairs[at : at + count * run] == expected
        widths.append(run)
        at += count * run
    assert tail == any(n0 != n1 for (_, n0), (_, n1) in units)
    if count > 1:  # else groups cannot be told apart
        assert sum(widths) == n_tiles and all(width % 2 == 0 for width in widths[:-1])
        assert max(widths) <= max(LEAST_COLUMNS, GROUP_BYTES // (reduced * TILE_N * 2) + 1)
        assert max(widths) - min(widths) <= 2 * len(widths)
