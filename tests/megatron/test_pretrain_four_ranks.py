"""Whole runs of Megatron's `pretrain()` on four ranks: pipelines, EP=4, experts that are data parallel too."""

from functools import partial

import pytest

from tests.megatron import rows
from tests.megatron.curves import EP2, EP4, PP2, resumed, row, stale_weights

ROWS = {
    "EP=4": row(*EP4),
    "EP=2 x data parallel 2, overlapped; stale weights without the hooks": stale_weights,
    "PP=2 x EP=2": row(*EP2, *PP2),
    "PP=2 x EP=2, interleaved, recomputed": row(
        *EP2,
        *PP2,
        "--num-layers",
        "4",
        "--num-virtual-stages-per-pipeline-rank",
        "2",
        "--recompute-granularity",
        "selective",
        "--recompute-modules",
        "moe",
    ),
    "checkpoint: alltoall EP=2 to megamoe EP=4": partial(resumed, saved="alltoall", loaded="megamoe", load_on=EP4),
    "checkpoint: megamoe EP=4 to alltoall EP=2": partial(resumed, saved="megamoe", loaded="alltoall", save_on=EP4),
}
ran = rows.fixture(__name__, world_size=4)


@pytest.mark.parametrize("row", ROWS)
def test_pretrain(ran, row):
    ran.check(row)
