"""Processes of a job: found (torchrun, srun) or started here (torchrun's agent, one process per GPU, or two without).

Ctrl-C and SIGTERM reach the ranks as SIGTERM, once: Megatron then finishes the step, saves a checkpoint and leaves.
torchrun's own handling would kill the ranks after 30 s, in the middle of a long save.
"""

import atexit
import ctypes
import logging
import os
import signal
import subprocess
import sys
import uuid
from dataclasses import dataclass
from typing import NoReturn

CPU_RANKS = 2
_MOST_THREADS = 8  # per rank: small matrices gain nothing from more
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


def adopt_rank() -> bool:
    """Whether this process is one rank of a job that something else started; srun's variables become torchrun's."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_RANK", "0")
        return True
    if "SLURM_STEP_ID" not in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return False
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
    }
    os.environ.setdefault("MASTER_ADDR", _first_slurm_host())
    # Two jobs of one user on a node must not meet; Slurm's job numbers differ.
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000))
    return True


def _first_slurm_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return listed.stdout.split()[0]


def default_ranks(num_gpus: int, most: int | None) -> int:
    """Processes to start on this machine: one per GPU up to `most`, two where there is no GPU."""
    ranks = num_gpus or CPU_RANKS
    return min(ranks, most) if most else ranks


@dataclass(frozen=True)
class Nodes:
    """The machines of a job. One: this machine alone. More: the same command runs on each of them."""

    count: int = 1
    endpoint: str = ""  # HOST:PORT where the machines meet, HOST being the first of them
    job: str = ""  # the same on all machines, another for every start of a job


def start(arguments: list[str], num_ranks: int, nodes: Nodes | None = None) -> int:
    """Run `python -m megamoe_train.pretrain ARGUMENTS` as `num_ranks` ranks on this machine under torchrun's agent.

    Returns the exit status: 0, that of the first rank that failed, or 128 + the signal that stopped the job.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    nodes = nodes or Nodes()

    # The ranks report their own failures; the agent's table of exit codes would only bury the message.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(_MOST_THREADS, (os.cpu_count() or 1) // num_ranks))))
    config = LaunchConfig(
        min_nodes=nodes.count,
        max_nodes=nodes.count,
        nproc_per_node=num_ranks,
        run_id=nodes.job or uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=nodes.endpoint if nodes.count > 1 else "localhost:0",
        rdzv_configs=_is_host(nodes),
        local_addr="localhost" if nodes.count == 1 else os.environ.get("SLURMD_NODENAME"),
        max_restarts=0,
        monitor_interval=0.2,
        signals_to_handle="SIGQUIT",  # the others are ours
    )
    stopper = _Stopper()
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "megamoe_train.pretrain", *arguments)
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        return stopper.status or (first.exitcode if first.exitcode > 0 else 128 - first.exitcode)
    return stopper.status


def _is_host(nodes: Nodes) -> dict:
    """Slurm says which machine is the first; elsewhere torch compares the endpoint with its own host names."""
    if nodes.count == 1 or "SLURM_NODEID" not in os.environ:
        return {}
    return {"is_host": os.environ["SLURM_NODEID"] == "0"}


class _Stopper:
    """Hands the first stop signal to the ranks, and kills them at the second Ctrl-C.

    A scheduler may deliver SIGTERM twice, to the step and through srun: the second changes nothing.
    """

    def __init__(self) -> None:
        self.status = 0
        for number in _STOP_SIGNALS:
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame) -> None:
        again, self.status = bool(self.status), self.status or 128 + number
        if again and number != signal.SIGINT:
            print("megamoe_train: stopping already", file=sys.stderr, flush=True)
            return
        message = "killed" if again else "stopping after this step, with a checkpoint; once more to kill"
        print(f"\nmegamoe_train: {message}", file=sys.stderr, flush=True)
        for rank in _children():
            rank.send_signal(signal.SIGKILL if again else signal.SIGTERM)


def _children() -> list:
    import psutil

    return psutil.Process().children()


def follow_parent(number: int = signal.SIGTERM) -> None:
    """Send this rank the signal `number` when the process that started it dies, so that no rank trains on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def leave(status: int) -> NoReturn:
    """End this rank: who has asked to be told of its end (W&B, worker processes) is told, the system does the rest.

    The interpreter takes ten seconds to let go of a large model, and NCCL's groups, which Megatron does not destroy,
    may wait for peers that have left.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
