"""Which checkpoint a job goes on from, and whether it can be read, before anything is built or written.

Megatron writes a checkpoint into `iter_NNNNNNN`, then its `metadata.json`, and last the number into
`latest_checkpointed_iteration.txt`: whatever a kill leaves behind, that file still names a whole checkpoint, or is
itself cut short, which is repaired here.
"""

import contextlib
import os
import textwrap
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
# Arguments that decide which parameters exist and how long they are.
_SHAPE_ARGUMENTS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "num_experts",
    "moe_layer_freq",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "mtp_num_layers",
    "multi_latent_attention",
    "normalization",
    "swiglu",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "position_embedding_type",
    "moe_shared_expert_gate",
    "moe_latent_size",
    "untie_embeddings_and_output_weights",
)
# Arguments that decide how the optimizer's state is laid out.
_OPTIMIZER_ARGUMENTS = ("optimizer", "use_distributed_optimizer", "bf16", "fp16")
_MISSING = object()  # an argument that the Megatron which saved did not have


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint."""

    step: int
    folder: Path
    unfinished: tuple[int, ...] = ()  # later steps whose save never ended
    tracked: bool = True  # whether TRACKER names this one

    def describe(self) -> str:
        """One line for the user: which checkpoint, and what is passed over."""
        text = f"resuming from step {self.step} ({self.folder})"
        if self.unfinished:
            steps = ", ".join(str(step) for step in self.unfinished)
            text += f"; the save at step {steps} was interrupted and is not used"
        return text


def find(root: Path, step: int | None = None) -> Checkpoint | None:
    """The checkpoint to load from `root`: that of `step`, else the latest whole one; None where there is none.

    Raises ValueError when the one that is named is not there.
    """
    whole, unfinished = _saved_steps(root)
    latest = step if step is not None else _tracked_step(root)
    if latest is None:
        if not whole:
            return None
        latest = whole[-1]
        return Checkpoint(latest, folder_of(root, latest), _later(unfinished, latest), tracked=False)
    if latest not in whole:
        there = ", ".join(str(saved) for saved in whole) or "none"
        raise ValueError(f"checkpoint: step {latest} in {root} is missing or was never completed (whole: {there})")
    return Checkpoint(latest, folder_of(root, latest), _later(unfinished, latest))


def folder_of(root: Path, step: int) -> Path:
    """Where Megatron keeps the checkpoint of `step`."""
    return root / f"iter_{step:07d}"


def mend_tracker(checkpoint: Checkpoint) -> None:
    """Name `checkpoint` in TRACKER where a kill left that file empty or absent."""
    if not checkpoint.tracked:
        path = checkpoint.folder.parent / TRACKER
        part = path.with_suffix(".part")
        part.write_text(str(checkpoint.step))
        os.replace(part, path)


def verify(checkpoint: Checkpoint, args: Namespace) -> None:
    """Raises ValueError when files of the checkpoint are damaged, or when it belongs to a model of another shape."""
    root = checkpoint.folder.parent
    try:
        _check_files(checkpoint.folder)
        saved = _saved_arguments(checkpoint.folder)
    except Exception as error:  # a damaged pickle or zip can raise anything
        whole = [step for step in _saved_steps(root)[0] if step != checkpoint.step]
        hint = f"; other checkpoints there: {', '.join(map(str, whole))} (--set ckpt-step={whole[-1]})" if whole else ""
        raise ValueError(f"checkpoint: {checkpoint.folder} cannot be read: {_first_line(error)}{hint}") from error
    _check_same(checkpoint, saved, args, _SHAPE_ARGUMENTS)
    goes_on = checkpoint.step < args.train_iters and not (args.finetune or args.no_load_optim)
    if goes_on:  # and so needs the optimizer's state
        try:
            _check_optimizer(checkpoint, saved, args)
        except ValueError as error:
            raise ValueError(f"{error}; --set no-load-optim=true takes the weights alone") from error


@contextlib.contextmanager
def loading(checkpoint: Checkpoint) -> Iterator[None]:
    """Whatever Megatron raises while it loads what `verify` let pass, as one line. Its CheckpointException is no
    Exception, and lists every key of the file."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        why = textwrap.shorten(_last_line(error), 200, placeholder=" ...")
        raise DoesNotLoad(f"checkpoint: {checkpoint.folder} does not fit this job: {why}") from error


class DoesNotLoad(ValueError):
    """A whole checkpoint that Megatron could not put into this job's model and optimizer."""


def _check_same(checkpoint: Checkpoint, saved: Namespace, args: Namespace, names: tuple[str, ...]) -> None:
    for name in names:
        was, now = getattr(saved, name, _MISSING), getattr(args, name, _MISSING)
        if was != now and _MISSING not in (was, now):
            option = name.replace("_", "-")
            raise ValueError(f"checkpoint: {checkpoint.folder} was saved with {option} {was}, this job has {now}")


def _check_optimizer(checkpoint: Checkpoint, saved: Namespace, args: Namespace) -> None:
    """Raises ValueError where Megatron 0.19.2 cannot take up the optimizer's state, whatever the dispatcher."""
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE

    _check_same(checkpoint, saved, args, _OPTIMIZER_ARGUMENTS)
    was, now = saved.expert_model_parallel_size, args.expert_model_parallel_size
    if args.num_experts and (was == 1) != (now == 1):  # optimizer.py:640: at EP = 1 experts have no group of their own
        raise ValueError(
            f"checkpoint: {checkpoint.folder} was saved with expert-model-parallel-size {was}, this job has {now}; "
            "Megatron does not carry the optimizer's state between 1 and more"
        )
    if args.use_distributed_optimizer and not HAVE_APEX_OR_TE:  # distrib_optimizer.py:839
        raise ValueError(
            f"checkpoint: {checkpoint.folder} was saved with use-distributed-optimizer, whose state Megatron cannot "
            "take up without TransformerEngine or apex"
        )
    if saved.no_save_optim:
        raise ValueError(f"checkpoint: {checkpoint.folder} was saved with no-save-optim")


def _saved_steps(root: Path) -> tuple[list[int], list[int]]:
    """Steps whose checkpoint is whole, and steps whose save never finished; both ascending."""
    steps: tuple[list[int], list[int]] = ([], [])
    for folder in sorted(root.glob("iter_*")) if root.is_dir() else []:
        number = folder.name.removeprefix("iter_")
        if number.isdecimal():
            steps[0 if (folder / "metadata.json").is_file() else 1].append(int(number))
    return steps


def _tracked_step(root: Path) -> int | None:
    """The step that TRACKER names; None where it is absent or was cut short."""
    try:
        text = (root / TRACKER).read_text().strip()
    except FileNotFoundError:
        return None
    return int(text) if text.isdecimal() else None


def _later(steps: list[int], than: int) -> tuple[int, ...]:
    return tuple(step for step in steps if step > than)


def _check_files(folder: Path) -> None:
    """Every byte range that the checkpoint's index names must lie inside its file."""
    from torch.distributed.checkpoint import FileSystemReader

    needed: dict[str, int] = {}
    for place in FileSystemReader(str(folder)).read_metadata().storage_data.values():
        needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
    for name, size in needed.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else 0
        if found < size:
            raise ValueError(f"{name} has {found} bytes of {size}")


def _saved_arguments(folder: Path) -> Namespace:
    from megatron.core import dist_checkpointing

    return dist_checkpointing.load_common_state_dict(str(folder))["args"]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _last_line(error: BaseException) -> str:
    """Kind and text of an error. A CheckpointException's text is the tracebacks of the ranks, which end so already."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    return lines[-1] if kind == "CheckpointException" and lines else ": ".join([kind, *lines[-1:]])
