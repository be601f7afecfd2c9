"""Which checkpoint a job goes on from, and whether it can be read, before anything is built or written.

Megatron writes a checkpoint into `iter_NNNNNNN`, then its `metadata.json`, and last the number into
`latest_checkpointed_iteration.txt`: whatever a kill leaves behind, that file still names a whole checkpoint, or is
itself cut short, which is repaired here.
"""

import os
from argparse import Namespace
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
    "untie_embeddings_and_output_weights",
)


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
    for name in _SHAPE_ARGUMENTS:
        was, now = getattr(saved, name, None), getattr(args, name, None)
        if was != now and was is not None and now is not None:
            option = name.replace("_", "-")
            raise ValueError(f"checkpoint: {checkpoint.folder} was saved with {option} {was}, this job has {now}")


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
