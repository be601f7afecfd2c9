"""One rank of a training job: all checks, then the data, then Megatron's `pretrain()`, then a summary."""

import fcntl
import json
import os
import signal
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from megamoe_train import placement
from megamoe_train.training import capacity, checkpointing, machine, prepare, settings
from megamoe_train.training.console import Console
from megamoe_train.training.request import RECORD, Job, Request, check, check_early

USER_ERROR = 2  # exit status of a request that fails a check
_GRACE_S = 10.0  # in which a failed rank's launcher ends the others


def run(request: Request, *, verbose: bool) -> int:
    """Run this rank from its environment (RANK, WORLD_SIZE, LOCAL_RANK). Returns the exit status."""
    console = Console(verbose=verbose)
    signal.signal(signal.SIGTERM, _leave)
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    held: list[object] = []  # what has to stay open as long as the job
    try:
        held += _take_place(request, num_ranks)
        job = check(request, num_ranks)
        if job.start_step >= job.args.train_iters:
            if rank == 0:
                console.say(_nothing_left(job))
            return 0
        prepared = prepare_data(job, console.say)
        claim = claim_folder(request.out) if rank == 0 else None
    except Exception as error:
        return _fail(error, console, rank)
    try:
        return _train(job, prepared, console, rank, num_ranks)
    except checkpointing.DoesNotLoad as error:
        return _refuse_late(error, console)
    except Exception as error:
        return _crash(error, console, rank)
    finally:
        if claim is not None:
            os.close(claim)


def _take_place(request: Request, num_ranks: int) -> list[object]:
    """This rank's GPU for itself, memory for its workspace, and expert-parallel groups inside NVLink domains.

    Before Megatron is imported, and collective over all ranks: where one cannot go on, all leave with its reason.
    Returns what has to stay open. Raises ValueError.
    """
    import torch

    num_gpus = torch.cuda.device_count()
    machine.check_driver(num_gpus, torch.version.cuda)  # torchrun and srun start ranks that no launcher of ours saw
    recipe, table, _ = check_early(request, num_ranks, num_gpus)
    for name, value in recipe.env.items():  # before there is a CUDA context, which reads some of them
        os.environ.setdefault(name, value)
    # The reference backend works over any process group, wherever its ranks sit.
    ours = settings.dispatcher(table) == "megamoe" and table.get("megamoe-backend") != ["reference"]
    held: list[object] = []
    device, refused = None, None
    if num_gpus:
        device = int(os.environ["LOCAL_RANK"]) % num_gpus
        torch.cuda.set_device(device)
    place = placement.Place.mine(device)
    if device is not None:
        try:
            held.append(machine.claim_gpu(place.gpu))
            if ours:
                machine.check_workspace(table, num_ranks, *torch.cuda.mem_get_info(device))
        except ValueError as error:
            refused = str(error)
    group = settings.integer(table, "expert-model-parallel-size", 1) if ours else 1
    held.append(placement.meet(group, place, refused=refused))
    return held


def claim_folder(out: Path) -> int:
    """Lock the output folder for the life of the returned descriptor. Raises ValueError while another run has it."""
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"out: another run is writing to {out}; --out DIR takes another folder") from None
    return descriptor


def _leave(number: int, frame) -> None:
    """Before training there is nothing to save: leave, tidying up on the way."""
    sys.exit(128 + number)


def _fail(error: Exception, console: Console, rank: int) -> int:
    """A failed check. All ranks fail alike, so the first of each machine speaks."""
    if not isinstance(error, ValueError | OSError):
        return _crash(error, console, rank)
    if os.environ["LOCAL_RANK"] == "0":
        console.say(f"megamoe_train: error: {error}")
    return USER_ERROR


def _refuse_late(error: checkpointing.DoesNotLoad, console: Console) -> int:
    """A checkpoint that only loading shows to be of another job: most often on all ranks, but maybe on one alone. The
    first of the machine speaks at once; the others wait to be ended, and speak if nobody does."""
    traceback.print_exception(error)
    signal.signal(signal.SIGTERM, _leave)
    if os.environ["LOCAL_RANK"] != "0":
        time.sleep(_GRACE_S)
    log = f" (log of this rank: {console.log_path})" if console.log_path else ""
    console.say(f"megamoe_train: error: {error}{log}")
    return USER_ERROR


def _crash(error: Exception, console: Console, rank: int) -> int:
    """Something nobody foresaw: the end of the traceback, and where the whole log lies."""
    console.end_progress()
    traceback.print_exception(error)
    tail = "".join(traceback.format_exception(error, limit=-4))
    log = f"\nlog of this rank: {console.log_path}" if console.log_path else ""
    console.say(f"megamoe_train: rank {rank} failed\n{tail.rstrip()}{log}")
    return 1


def prepare_data(job: Job, say: Callable[[str], None]) -> prepare.Prepared | None:
    """Tokens of a text source. The first rank of each machine works, the others wait for what it writes; if it fails
    it leaves no empty folder, and whoever started the ranks ends the others."""
    folder = job.text_folder
    if folder is None:
        return None
    while os.environ["LOCAL_RANK"] != "0" and not prepare.is_ready(folder):
        time.sleep(0.1)
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        return prepare.prepare(job.source, job.args.vocab_size, folder.parent, job.args.seq_length + 1, say)
    except ValueError:
        (folder.parent / "lock").unlink(missing_ok=True)
        for parent in made:
            _remove_if_empty(parent)
        raise


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # somebody keeps files there
        return


def _train(job: Job, prepared: prepare.Prepared | None, console: Console, rank: int, num_ranks: int) -> int:
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.global_vars import get_tensorboard_writer, set_global_variables

    from megamoe_train.training import data, model
    from megamoe_train.training.speed import Speed
    from megamoe_train.training.watch import Watch

    out, args = job.request.out, job.args
    console.open_log(out / "logs" / f"rank{rank}.log")
    if rank == 0:
        _record(job)
        for line in header(job, prepared, num_ranks):
            console.say(line)
    title = f"{job.recipe.name} ({args.moe_token_dispatcher_type})"
    watch = Watch(console, out, title, job.start_step, job.checkpoint, Speed(args), job.request.layers_every)
    watch.install()
    set_global_variables(args)
    if args.exit_signal_handler:
        # Ctrl-C, where torchrun or srun hands it to the ranks, saves as SIGTERM does.
        signal.signal(signal.SIGINT, signal.getsignal(signal.SIGTERM))
    begin = time.time()
    stopped = False
    try:
        config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
        pretrain(config, data.datasets, ModelType.encoder_or_decoder, model.forward_step)
    except SystemExit as leaving:
        # After a signal, --exit-interval or --exit-duration-in-mins, Megatron saves and leaves with 0.
        if leaving.code or watch.saved_step is None:
            console.end_progress()
            console.say(f"megamoe_train: Megatron left with {leaving.code!r}; log of this rank: {console.log_path}")
            return int(leaving.code or 1)
        stopped = True
    console.end_progress()
    if writer := get_tensorboard_writer():
        writer.close()  # it keeps the last events for itself until then
    _record_memory(out, rank)
    watch.draw()
    if watch.speaks:
        for line in watch.summary(time.time() - begin, args.train_iters, stopped):
            console.say(line)
    return 0


def _record_memory(out: Path, rank: int) -> None:
    """This rank's peaks of the session, bytes, in logs/memory-rankN.json. On a GPU only."""
    import torch

    if torch.cuda.is_available():
        peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        (out / "logs" / f"memory-rank{rank}.json").write_text(json.dumps(peaks))


def _record(job: Job) -> None:
    """Write run.json, and mend the checkpoint tracker. By rank 0 alone, before the ranks first meet."""
    out = job.request.out
    part = out / f"{RECORD}.part"
    part.write_text(json.dumps(job.record(), indent=1))
    os.replace(part, out / RECORD)
    if job.checkpoint:
        checkpointing.mend_tracker(job.checkpoint)


def header(job: Job, prepared: prepare.Prepared | None, num_ranks: int) -> list[str]:
    """What runs, on what, from where."""
    import torch

    from megamoe_train import backends
    from megamoe_train.megatron.install import options

    args = job.args
    device = f"GPU {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "CPU"
    ours = args.moe_token_dispatcher_type == "megamoe"
    backend = f", backend {backends.resolve(options().backend)}" if ours else ""
    lines = [
        f"recipe {job.recipe.name}: {job.recipe.summary}",
        *(f"  note: {note}" for note in job.recipe.notes),
        *(f"  {stand_in}" for stand_in in job.recipe.stand_ins),
        f"model: {args.num_layers} layers, hidden {args.hidden_size}, {_experts(args)}, vocabulary {args.vocab_size}",
        f"{num_ranks} ranks on {device} over {args.distributed_backend}: expert parallel "
        f"{args.expert_model_parallel_size}, pipeline {args.pipeline_model_parallel_size}",
        f"moe dispatcher {args.moe_token_dispatcher_type}{backend}",
    ]
    lines.append(capacity.line(args, num_ranks))
    if prepared:
        lines.append(
            f"data: {prepared.source}; {prepared.train_tokens:,} tokens to train, {prepared.valid_tokens:,} to validate"
        )
    elif job.source:
        lines.append(f"data: {job.source.name}")
    lines.append(job.checkpoint.describe() if job.checkpoint else "starting from random weights")
    lines.append(
        f"{args.train_iters} steps of {args.global_batch_size} x {args.seq_length} tokens; files in {job.request.out}"
    )
    return lines


def _experts(args: Namespace) -> str:
    if not args.num_experts:
        return "no experts"
    return f"{args.num_experts} experts of {args.moe_ffn_hidden_size}, top-{args.moe_router_topk}"


def _nothing_left(job: Job) -> str:
    return (
        f"{job.request.out} is already at step {job.start_step} of {job.args.train_iters}; "
        f"--set train-iters={2 * job.start_step} trains on, --out DIR starts another run"
    )
