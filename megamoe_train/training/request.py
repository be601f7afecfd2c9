"""What the user asks for, and every check of it. Nothing here writes a file; a ValueError is the user's to read."""

import contextlib
import hashlib
import importlib.util
import json
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megamoe_train import recipes
from megamoe_train.training import capacity, checkpointing, corpus, prepare, settings

RECORD = "run.json"  # in the output folder: what the run was started with
_CONFIG = "megamoe-config"
_OWN_DATA = ("data-path", "data-args-path", "train-data-path", "per-split-data-args-path")


@dataclass(frozen=True)
class Request:
    """The command line of `megamoe_train.pretrain`."""

    recipe: str
    out: Path
    data: tuple[str, ...] = ()
    text_key: str = "text"
    data_cache: Path | None = None  # where tokenized text is kept; None means in `out`
    config_files: tuple[str, ...] = ()  # flat YAML
    sets: tuple[str, ...] = ()
    megatron: tuple[str, ...] = ()  # Megatron arguments, as given after `--`
    layers_every: int = 0  # steps between two tables of every layer's expert load; 0: none

    @property
    def checkpoints(self) -> Path:
        """Where this run saves, and where it looks for what to resume from."""
        return self.out / "checkpoints"

    def table(self, recipe: recipes.Recipe) -> settings.Settings:
        """The recipe's arguments with everything that the command line changes. Raises ValueError."""
        table = settings.from_recipe(recipe.settings)
        checkpoints = [str(self.checkpoints)]
        table |= {"save": checkpoints, "load": checkpoints, "tensorboard-dir": [str(self.out / "tensorboard")]}
        for path in self.config_files:
            settings.apply_yaml(table, path)
        settings.apply_sets(table, self.sets)
        settings.apply_arguments(table, self.megatron)
        if _CONFIG in table:  # Megatron's parser would read it before the recipe, which then wins in silence
            raise ValueError(f"{_CONFIG}: give --{_CONFIG} FILE before the --, as an option of this command")
        return table


@dataclass(frozen=True)
class Job:
    """A request whose checks have passed."""

    request: Request
    recipe: recipes.Recipe
    args: Namespace  # Megatron's, validated
    source: corpus.Source | None  # None: Megatron's own data arguments say it
    text_folder: Path | None  # where the tokens of a text source lie, or will lie
    checkpoint: checkpointing.Checkpoint | None

    @property
    def start_step(self) -> int:
        return self.checkpoint.step if self.checkpoint and not self.args.finetune else 0

    def record(self) -> dict:
        """What is kept in the output folder, so that a resumed run can be compared with the one that began."""
        return {"recipe": self.recipe.name, "data": self.source and self.source.name, "data-id": _identity(self.source)}


def check_early(
    request: Request, num_ranks: int, num_gpus: int, *, dry: bool = False
) -> tuple[recipes.Recipe, settings.Settings, corpus.Source | None]:
    """The checks that need no Megatron: recipe, memory, layout over ranks, data files. Raises ValueError.

    dry: nothing will run, so that GPUs and data may be missing.
    """
    recipe = recipes.find(request.recipe, recipes.World(num_ranks=num_ranks, num_gpus=num_gpus))
    table = request.table(recipe)
    if recipe.for_h100 and num_gpus == 0 and not dry:
        raise ValueError(
            f"recipe: {recipe.name} is for H100 GPUs, and torch sees none here; --dry-run shows what would run, "
            "--recipe debug runs on the CPU"
        )
    capacity.check(recipe, table, num_ranks)
    settings.check_shape(table, num_ranks)
    settings.check_steps(table)
    _check_tokenizer(table)
    given = request.data or any(name in table for name in _OWN_DATA)
    if recipe.needs_data and not given:
        if dry:
            return recipe, table, None
        raise ValueError(
            f"data: recipe {recipe.name} needs --data: text files, or the prefix of Megatron .bin/.idx token files"
        )
    return recipe, table, _find_data(request, table)


def check(request: Request, num_ranks: int) -> Job:
    """Every check. Imports Megatron, and reads a checkpoint's index. Raises ValueError."""
    import torch

    recipe, table, source = check_early(request, num_ranks, torch.cuda.device_count())
    folder = _point_to_data(table, source, request)
    args = _parse(table)
    _check_backend(args)
    _check_wandb(args)
    if isinstance(source, corpus.TokenFiles):
        from megamoe_train.training import tokens

        tokens.check(source, args)
    checkpoint = checkpointing.find(Path(args.load), args.ckpt_step) if args.load else None
    if checkpoint is None and args.load and Path(args.load) != request.checkpoints:
        raise ValueError(f"load: {args.load} holds no checkpoint")
    if checkpoint:
        checkpointing.verify(checkpoint, args)
        _check_same_data(request.out, source)
    return Job(request, recipe, args, source, folder, checkpoint)


def _check_tokenizer(table: settings.Settings) -> None:
    """Raises ValueError for a tokenizer file that is not there; Megatron would find out after the ranks have met."""
    for name in ("tokenizer-model", "vocab-file", "merge-file"):
        for path in table.get(name, []):
            looks_local = path.startswith((".", "/", "~")) or name != "tokenizer-model" or Path(path).suffix
            if looks_local and not Path(path).expanduser().exists():
                raise ValueError(f"{name}: {path} does not exist")


def _find_data(request: Request, table: settings.Settings) -> corpus.Source | None:
    if "mock-data" in table:
        raise ValueError("mock-data: this command trains on text; without --data it takes the texts Python carries")
    given = [name for name in _OWN_DATA if name in table]
    if given and request.data:
        raise ValueError(f"data: --data and --{given[0]} are both given; give one of them")
    if given:
        return None
    source = corpus.find_source(list(request.data), request.text_key)
    source.check()
    return source


def _point_to_data(table: settings.Settings, source: corpus.Source | None, request: Request) -> Path | None:
    """Add Megatron's data arguments; returns the folder of a text source's tokens."""
    cache = request.data_cache or request.out / "data"
    table.setdefault("data-cache-path", [str(cache / "index")])
    if isinstance(source, corpus.TokenFiles):
        table["data-path"] = [str(source.prefix)]
        table.setdefault("split", ["95,5,0"])
    if source is None or isinstance(source, corpus.TokenFiles):
        return None
    folder = prepare.folder_for(source, settings.integer(table, "vocab-size", 4096), cache)
    table["train-data-path"], table["valid-data-path"] = [str(folder / "train")], [str(folder / "valid")]
    return folder


def _parse(table: settings.Settings) -> Namespace:
    """Megatron's parser and validation over the table. Raises ValueError in the place of their exits and asserts."""
    from megamoe_train.megatron.install import install

    install()
    from megatron.training import arguments

    def strict(parser: ArgumentParser) -> ArgumentParser:
        settings.check_known(table, parser._option_string_actions)
        parser.error = _raise  # argparse would print Megatron's 700 options and exit
        return parser

    before, sys.argv = sys.argv, [sys.argv[0], *settings.to_arguments(table)]
    try:
        with _one_line_errors():
            args = arguments.parse_args(extra_args_provider=strict)
            arguments.validate_args(args)
            arguments.core_transformer_config_from_args(args)
    finally:
        sys.argv = before
    return args


def _raise(message: str) -> None:
    raise ValueError(message)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Megatron's asserts, some of them without words, as ValueErrors."""
    try:
        yield
    except (AssertionError, RuntimeError, KeyError, TypeError, NotImplementedError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = next((frame for frame in reversed(frames) if "megatron" in frame.filename), frames[-1])
        where = f"{Path(place.filename).name}:{place.lineno}"
        raise ValueError(f"Megatron refuses these arguments ({where}): {str(error) or place.line}") from error


def _check_backend(args: Namespace) -> None:
    from megamoe_train import backends
    from megamoe_train.megatron.install import options

    if args.num_experts and args.moe_token_dispatcher_type == "megamoe":
        try:
            backends.resolve(options().backend)
        except backends.BackendUnavailable as error:
            raise ValueError(str(error)) from error


def _check_wandb(args: Namespace) -> None:
    """Raises ValueError where Megatron's writer would fail: after the ranks have met, on the last one alone."""
    if not args.wandb_project:
        return
    if importlib.util.find_spec("wandb") is None:
        raise ValueError("wandb-project: wandb is not installed (pip install wandb), or leave --wandb-project out")
    if not args.wandb_exp_name:
        raise ValueError("wandb-project: give the run a name too, --set wandb-exp-name=NAME")


def _check_same_data(out: Path, source: corpus.Source | None) -> None:
    """Raises ValueError when the run in `out` was trained on other text: its tokens mean other words."""
    try:
        began = json.loads((out / RECORD).read_text())
    except FileNotFoundError:
        return
    if began.get("data-id") != _identity(source):
        now = source.name if source else "Megatron's data arguments"
        raise ValueError(
            f"data: the run in {out} was trained on {began['data']}, not on {now}; --out starts another run"
        )


def _identity(source: corpus.Source | None) -> str | None:
    return None if source is None else hashlib.sha256(source.fingerprint().encode()).hexdigest()[:16]
