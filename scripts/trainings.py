"""What the scripts that train share: whole trainings one after another in one process, and the launch of ranks."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megamoe_train.training import launch

ROOT = Path(__file__).resolve().parent.parent


def die_with_parent() -> None:
    """From here on this process is killed when its parent ends, however that ends.

    For the launcher of a training and its ranks: each rank has a session of its own, so that nothing else would take
    it along, and it would hold its GPU.
    """
    launch.follow_parent(signal.SIGKILL)


def start_ranks(
    ranks: int,
    script: str,
    *options: str,
    defaults: Mapping[str, str] | None = None,
    forced: Mapping[str, str] | None = None,
    **streams,
) -> subprocess.Popen:
    """Runs a script of this folder as `ranks` ranks on this machine; text on its streams.

    defaults, forced: variables of the environment, where this process has none and over what it has. streams: as Popen
    takes them. Ranks call die_with_parent.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**(defaults or {}), "OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path, **(forced or {})}
    return subprocess.Popen([*command, str(ROOT / "scripts" / script), *options], env=environment, cwd=ROOT, text=True,
                            preexec_fn=die_with_parent, **streams)  # fmt: skip


def pretrain_once(
    args: Namespace,
    datasets: Callable,
    forward_step: Callable | None = None,
    after_step: Callable[[int], None] | None = None,
) -> list[tuple[float, float]]:
    """Megatron's `pretrain()` on the process group of this process; nothing of it stays behind.

    args: validated, and set as Megatron's global ones. Returns loss and gradient norm of each step: nan where this rank
    has none.
    """
    import torch
    from megatron.core.enums import ModelType
    from megatron.core.transformer.moe import moe_logging
    from megatron.training import pretrain, training
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

    from megamoe_train.training import model

    steps: list[tuple[float, float]] = []
    original = training.training_log

    def training_log(losses, *rest, **more):
        # The gradient norm stands there in 0.19.2; None on ranks without one.
        norm = rest[6]
        steps.append((float(losses.get("lm loss", float("nan"))), float("nan") if norm is None else float(norm)))
        if after_step is not None:
            after_step(len(steps))
        return original(losses, *rest, **more)

    training.training_log = training_log
    try:
        config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
        pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step or model.forward_step)
    finally:
        training.training_log = original
        training.destroy_global_state()
        moe_logging.destroy_moe_metrics_tracker()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return steps


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be; the first is text, the others are numbers."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
