"""`python -m megamoe_train.pretrain --recipe NAME`: pretrain a mixture-of-experts model with Megatron.

Alone, it starts one process per GPU (two without a GPU) under torchrun's agent. Under torchrun or srun it is one rank.
Run it again and it resumes; Ctrl-C leaves a checkpoint. Every Megatron argument can be changed with `--set key=value`
or after `--`: `python -m megamoe_train.pretrain --set lr=1e-3 -- --train-iters 500`. `--megamoe-config FILE.yaml` takes
flat lines of `key: value`; the command line wins over it, and it over the recipe.
"""

import argparse
import sys
from pathlib import Path

from megamoe_train import recipes
from megamoe_train.training import launch
from megamoe_train.training.request import Request, check_early

USER_ERROR = 2


def parser() -> argparse.ArgumentParser:
    """The options of this command; Megatron's come after `--`."""
    parser = argparse.ArgumentParser(
        prog="python -m megamoe_train.pretrain",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", default="debug", help=f"one of: {', '.join(recipes.names())} (default: debug)")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="PATH",
        help=".txt and .jsonl files or folders of them, or one Megatron .bin/.idx prefix (default: Python's own texts)",
    )
    parser.add_argument("--text-key", default="text", help="the key of the text in .jsonl lines (default: text)")
    parser.add_argument("--data-cache", type=Path, metavar="DIR", help="where tokens are kept (default: OUT/data)")
    parser.add_argument("--out", type=Path, help="folder of checkpoints, logs and curves (default: runs/RECIPE)")
    parser.add_argument("--moe-dispatcher", help="megamoe, or one of Megatron's: alltoall, allgather, flex")
    parser.add_argument(
        "--megamoe-config", action="append", default=[], metavar="FILE.yaml", help="flat YAML of Megatron arguments"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a Megatron argument")
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="processes on this machine (default: GPUs, or 2 without)"
    )
    parser.add_argument("--verbose", action="store_true", help="show Megatron's output too, instead of logging it")
    parser.add_argument("--dry-run", action="store_true", help="show the Megatron arguments and stop")
    parser.add_argument("--launched", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str]) -> int:
    """Returns the exit status: 0, 2 for a request that fails a check, 128 + signal, or that of a failed rank."""
    split = argv.index("--") if "--" in argv else len(argv)
    options = parser().parse_args(argv[:split])
    dispatcher = [f"moe-dispatcher={options.moe_dispatcher}"] if options.moe_dispatcher else []
    request = Request(
        recipe=options.recipe,
        out=options.out or Path("runs") / options.recipe,
        data=tuple(options.data),
        text_key=options.text_key,
        data_cache=options.data_cache,
        config_files=tuple(options.megamoe_config),
        sets=(*dispatcher, *options.set),
        megatron=tuple(argv[split + 1 :]),
    )
    if launch.adopt_rank() and not options.dry_run:
        return _be_a_rank(request, options)
    try:
        return _launch(request, options, argv)
    except ValueError as error:
        print(f"megamoe_train: error: {error}", file=sys.stderr)
        return USER_ERROR


def _be_a_rank(request: Request, options: argparse.Namespace) -> int:
    from megamoe_train.training import job

    if options.launched:
        launch.follow_parent()
    return job.run(request, verbose=options.verbose)


def _launch(request: Request, options: argparse.Namespace, argv: list[str]) -> int:
    """Check what can be checked in no time, then start the ranks. Raises ValueError."""
    num_gpus = _count_gpus()
    most = recipes.find(request.recipe, recipes.World(num_gpus or launch.CPU_RANKS, num_gpus)).most_ranks
    num_ranks = launch.default_ranks(num_gpus, most) if options.nproc is None else options.nproc
    if num_ranks < 1 or 0 < num_gpus < num_ranks:
        raise ValueError(f"--nproc: {num_ranks} is not between 1 and the number of GPUs ({num_gpus})")
    _, table, _ = check_early(request, num_ranks, num_gpus)
    if options.dry_run:
        print(f"torchrun --standalone --nproc-per-node {num_ranks} -m megamoe_train.pretrain {' '.join(argv)}")
        print("\n".join(f"  --{name} {' '.join(values)}".rstrip() for name, values in table.items()))
        return 0
    return launch.start(["--launched", *argv], num_ranks)


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
