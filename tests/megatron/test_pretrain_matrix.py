"""Whole runs of Megatron's `pretrain()` on two ranks: equal losses, gradient norms and evaluations, checkpoints."""

from functools import partial

import pytest

from tests.megatron import rows
from tests.megatron.curves import EP1, EP2, OVERLAPPED, resumed, row, weights_alone

FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
SHARED = ("--moe-shared-expert-intermediate-size", "128")
ROWS = {
    "EP=2": row(*EP2),
    "EP=1, data parallel": row(*EP1),
    "staged": row(*EP2, ours_too=("--megamoe-experts", "staged")),
    "full recomputation": row(*EP2, ours_too=FULL),
    "recomputed MoE layers": row(*EP2, ours_too=("--recompute-granularity", "selective", "--recompute-modules", "moe")),
    "recomputed h": row(*EP2, ours_too=("--megamoe-recompute", "fc1")),
    "shared experts and MTP": row(*EP2, *SHARED, "--mtp-num-layers", "1"),
    "evaluation after every step": row(*EP2, "--eval-interval", "1"),
    "dropped tokens": row(*EP2, "--moe-expert-capacity-factor", "0.75"),
    "V4 router, clamp": row(
        *EP2,
        "--moe-router-score-function",
        "sqrtsoftplus",
        "--moe-router-enable-expert-bias",
        "--moe-router-load-balancing-type",
        "seq_aux_loss",
        "--moe-router-dtype",
        "fp32",
        "--activation-func-clamp-value",
        "0.1",
    ),
    "distributed optimizer": row(*EP2, "--use-distributed-optimizer"),
    "bf16": row(*EP2, *OVERLAPPED, "--bf16", tolerance=3e-3, norm_tolerance=3e-2),
    "checkpoint: alltoall to megamoe": partial(resumed, saved="alltoall", loaded="megamoe"),
    "checkpoint: megamoe to alltoall": partial(resumed, saved="megamoe", loaded="alltoall"),
    "checkpoint: weights of alltoall EP=2 to megamoe EP=1": weights_alone,
}
ran = rows.fixture(__name__, world_size=2)


@pytest.mark.parametrize("row", ROWS)
def test_pretrain(ran, row):
    ran.check(row)
