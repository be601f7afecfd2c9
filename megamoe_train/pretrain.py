"""`python -m megamoe_train.pretrain --recipe NAME`: pretrain a mixture-of-experts model with Megatron.

Alone, it starts one process per GPU (two without a GPU) under torchrun's agent. Under torchrun or srun it is one rank.
Run it again and it resumes; Ctrl-C leaves a checkpoint. Every Megatron argument can be changed with `--set key=value`
or after `--`: `python -m megamoe_train.pretrain --set lr=1e-3 -- --train-iters 500`. `--megamoe-config FILE.yaml` takes
flat lines of `key: value`; the command line wins over it, and it over the recipe.
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from megamoe_train import recipes
from megamoe_train.training import launch
from megamoe_train.training.request import Request, check_early

USER_ERROR = 2
GPUS_OF_A_NODE = 8


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
    parser.add_argument(
        "--log-layers",
        type=int,
        default=0,
        metavar="N",
        help="every N steps, of each layer the expert load, and on a GPU the time and overlap of its passes",
    )
    parser.add_argument("--nnodes", type=int, default=1, metavar="N", help="machines that this command runs on")
    parser.add_argument("--rdzv-endpoint", default="", metavar="HOST:PORT", help="where several machines meet")
    parser.add_argument("--rdzv-id", default="", metavar="ID", help="the same on all machines, new at every start")
    parser.add_argument(
        "--dry-run", "--dryrun", action="store_true", help="show the command and the Megatron arguments, and stop"
    )
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
        layers_every=options.log_layers,
    )
    # With --rdzv-id this is the launcher of one machine, though srun's variables are those of a rank.
    if not options.dry_run and (options.launched or not options.rdzv_id) and launch.adopt_rank():
        _be_a_rank(request, options)
    try:
        return _launch(request, options, argv)
    except ValueError as error:
        print(f"megamoe_train: error: {error}", file=sys.stderr)
        return USER_ERROR


def _be_a_rank(request: Request, options: argparse.Namespace) -> NoReturn:
    from megamoe_train.training import job

    if options.launched:
        launch.follow_parent()
    launch.leave(job.run(request, verbose=options.verbose))


def _launch(request: Request, options: argparse.Namespace, argv: list[str]) -> int:
    """Check what can be checked in no time, then start the ranks. Raises ValueError."""
    if options.dry_run:
        return _show(request, options, argv)
    num_gpus = _count_gpus()
    most = recipes.find(request.recipe, recipes.World(num_gpus or launch.CPU_RANKS, num_gpus)).most_ranks
    num_ranks = launch.default_ranks(num_gpus, most) if options.nproc is None else options.nproc
    if num_ranks < 1 or 0 < num_gpus < num_ranks:
        raise ValueError(f"--nproc: {num_ranks} is not between 1 and the number of GPUs ({num_gpus})")
    if options.nnodes < 1 or (options.nnodes > 1 and not (options.rdzv_endpoint and options.rdzv_id)):
        raise ValueError(f"--nnodes: {options.nnodes} machines meet by --rdzv-endpoint HOST:PORT and --rdzv-id ID")
    check_early(request, num_ranks * options.nnodes, num_gpus)
    nodes = launch.Nodes(options.nnodes, options.rdzv_endpoint, options.rdzv_id)
    return launch.start(["--launched", *argv], num_ranks, nodes)


def _show(request: Request, options: argparse.Namespace, argv: list[str]) -> int:
    """The torchrun command and the Megatron arguments, for the ranks asked for or those of the recipe's name."""
    total = recipes.ranks_of(request.recipe)
    num_ranks = min(total, GPUS_OF_A_NODE) if options.nproc is None else options.nproc
    nnodes = options.nnodes if options.nproc or options.nnodes > 1 else -(-total // num_ranks)
    recipe, table, _ = check_early(request, num_ranks * nnodes, num_ranks if total > 2 else _count_gpus(), dry=True)
    meet = "--standalone" if nnodes == 1 else f"--nnodes {nnodes} --rdzv-backend c10d --rdzv-endpoint HOST:PORT"
    print(f"torchrun {meet} --nproc-per-node {num_ranks} -m megamoe_train.pretrain {' '.join(argv)}")
    for line in (*recipe.notes, *recipe.stand_ins):
        print(f"  # {line}")
    print("\n".join(f"  --{name} {' '.join(values)}".rstrip() for name, values in table.items()))
    return 0


def _count_gpus() -> int:
    """What torch can use. Raises ValueError where the driver shows GPUs that it cannot."""
    import torch

    from megamoe_train.training import machine

    count = torch.cuda.device_count()
    machine.check_driver(count, torch.version.cuda)
    return count


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
