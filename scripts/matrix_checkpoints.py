"""Rows of gpu_matrix.py that stop and go on: checkpoints from one dispatcher to the other, resumed, killed; and one
that compares the two sizings of megamoe, to the bit.

Each is the training command as users start it, on a small model and a small text, under --deterministic-mode with
NCCL_ALGO=Ring. One whole run of each dispatcher is what the others are compared with: it saves at every fourth step.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trainings

sys.path.insert(0, str(trainings.ROOT))
from tests import pretrain_runs

STEPS, EVERY = 12, 4
FROM = 8  # the checkpoint that others go on from
KILLED = 6  # the step after which ranks are killed
CAPACITY = 1024  # rows that hold any routing of the small model's 256 tokens, top-2, eight experts on two ranks


class Differs(Exception):
    """A run went on, but not as it should have."""


@dataclass
class Place:
    """Where the runs of these rows are, and what they share."""

    folder: Path
    backend: str
    on_gpu: bool
    limits: tuple[float, float]  # relative differences of the first loss and of all losses, between the dispatchers

    def __post_init__(self):
        self.text = pretrain_runs.write_text(self.folder / "topics.txt")
        self.said: dict[str, str] = {}
        self.whole = functools.cache(self._whole)
        # Inherited by every run; --deterministic-mode asks for them.
        for name, value in (("NCCL_ALGO", "Ring"), ("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
                            ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")):  # fmt: skip
            os.environ.setdefault(name, value)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(trainings.ROOT), os.environ.get("PYTHONPATH")]))

    def train(self, name: str, dispatcher: str, *, on_line: Callable | None = None, status: int = 0, **changes) -> str:
        """One run in the folder `name`, gone on with where it is there; what it said. Raises RuntimeError."""
        steps = {"train_iters": STEPS, "save_interval": EVERY, "eval_interval": STEPS, "eval_iters": 1}
        backend = {"megamoe_backend": self.backend} if dispatcher == "megamoe" else {}
        options = pretrain_runs.arguments(
            self.folder / name, self.text, "--moe-dispatcher", dispatcher,
            **steps, log_interval=1, deterministic_mode="true", **backend, **changes,
        )  # fmt: skip
        found, said = pretrain_runs.run(options, on_line)
        self.said[name] = said
        if found != status:
            tail = " / ".join(said.splitlines()[-3:])
            raise RuntimeError(f"{name} ended with status {found}, not {status}: {tail}")
        return said

    def losses(self, name: str) -> dict[int, float]:
        return {step: value for (step, key), value in self.history(name).items() if key == "loss"}

    def history(self, name: str) -> dict[tuple[int, str], object]:
        return pretrain_runs.history(self.folder / name)

    def _whole(self, dispatcher: str) -> str:
        name = f"whole {dispatcher}"
        self.train(name, dispatcher)
        return name

    def gone_on(self, name: str, source: str, dispatcher: str, **changes) -> str:
        """A run that goes on from the checkpoint at step FROM of another; what it is to be compared with."""
        whole = self.whole(source)
        load = self.folder / whole / "checkpoints"
        said = self.train(name, dispatcher, load=f"'{load}'", ckpt_step=FROM, **changes)
        if f"resuming from step {FROM} " not in said:
            raise Differs(f"did not say that it resumes from step {FROM}")
        return whole


def across(source: str, target: str, place: Place) -> str:
    """Saved by one dispatcher, loaded by the other."""
    name = f"{source} to {target}"
    whole = place.gone_on(name, source, target)
    first, every = _apart(place, whole, name)
    said = f"from step {FROM}, loss apart by {first:.1e} at once, {every:.1e} at most"
    if first > place.limits[0] or every > place.limits[1]:
        raise Differs(said)
    return said


def fewer_ranks(place: Place) -> str:
    """EP = 2 to EP = 1, the weights alone: Megatron does not carry the optimizer's state there."""
    changes = {"expert_model_parallel_size": 1, "no_load_optim": "true"}
    whole = place.gone_on("EP 1", "megamoe", "megamoe", **changes)
    first, _ = _apart(place, whole, "EP 1")
    said = f"from step {FROM}, loss apart by {first:.1e} at once"
    if first > place.limits[0]:
        raise Differs(said)
    return said


def stock_resumes(place: Place) -> str:
    """Without this no difference of ours would mean anything."""
    whole = place.gone_on("stock", "alltoall", "alltoall")
    return _same(place, whole, "stock", f"from step {FROM}")


def killed_in_a_step(place: Place) -> str:
    return _killed(place, "killed in a step", pretrain_runs.kill_after(KILLED))


def killed_in_a_save(place: Place) -> str:
    name = "killed in a save"
    return _killed(place, name, pretrain_runs.kill_while_saving(place.folder / name, FROM))


def fixed_rows(place: Place) -> str:
    """Sizing decides how much room there is, not what is computed."""
    whole = place.whole("megamoe")
    place.train("fixed rows", "megamoe", megamoe_sizing="fixed", megamoe_capacity=CAPACITY)
    return _same(place, whole, "fixed rows", f"pools of {CAPACITY} rows, high water")


def _killed(place: Place, name: str, on_line: Callable) -> str:
    from megamoe_train.training import checkpointing

    whole = place.whole("megamoe")
    place.train(name, "megamoe", on_line=on_line, status=137)
    left = checkpointing.find(place.folder / name / "checkpoints")
    if left is None or left.step == STEPS:
        raise Differs(f"the kill came too {'early' if left is None else 'late'}")
    said = place.train(name, "megamoe")
    if f"resuming from step {left.step} " not in said:
        raise Differs(f"did not say that it resumes from step {left.step}")
    interrupted = f", past the save at step {left.unfinished[0]} that never ended" if left.unfinished else ""
    return _same(place, whole, name, f"resumed from step {left.step}{interrupted}")


def _same(place: Place, whole: str, name: str, said: str) -> str:
    """Every number of the second is that of the first, to the bit."""
    expected, found = place.history(whole), place.history(name)
    apart = sorted(key for key, value in found.items() if expected.get(key) != value)
    if apart or (STEPS, "loss") not in found:
        raise Differs(f"{said}; not bitwise: {', '.join(f'{name} of step {step}' for step, name in apart[:3])}")
    numbers = sum(key != "step" for _, key in found)
    return f"{said}, {numbers} numbers equal to the bit"


def _apart(place: Place, whole: str, name: str) -> tuple[float, float]:
    """Relative difference of the first loss after the checkpoint, and the largest."""
    expected, found = place.losses(whole), place.losses(name)
    if sorted(found) != list(range(FROM + 1, STEPS + 1)):
        raise Differs(f"{name} has losses of steps {sorted(found)}")
    apart = [abs(found[step] - expected[step]) / abs(expected[step]) for step in sorted(found)]
    return apart[0], max(apart)


ROWS: dict[str, Callable[[Place], str]] = {
    "checkpoint: alltoall resumes bitwise (deterministic mode)": stock_resumes,
    "checkpoint: megamoe, kill -9 in a step, bitwise (deterministic mode)": killed_in_a_step,
    "checkpoint: megamoe, kill -9 in a save, bitwise (deterministic mode)": killed_in_a_save,
    "checkpoint: saved with alltoall, loaded with megamoe": functools.partial(across, "alltoall", "megamoe"),
    "checkpoint: saved with megamoe, loaded with alltoall": functools.partial(across, "megamoe", "alltoall"),
    "checkpoint: EP=2 -> EP=1": fewer_ranks,
    "fixed rows, high water: the same bits (deterministic mode)": fixed_rows,
}


def run_row(name: str, place: Place) -> dict:
    """The answer of a row, as gpu_matrix.py keeps it."""
    try:
        return {"row": name, "state": "ran", "said": ROWS[name](place)}
    except Differs as error:
        return {"row": name, "state": "differs", "said": str(error)}
    except (RuntimeError, ValueError, OSError) as error:
        return {"row": name, "state": "failed", "said": str(error)[:300]}
