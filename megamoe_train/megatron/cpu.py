"""Megatron 0.19.2 on a machine without a GPU: every change it needs, each with its reason.

Megatron says `cuda` where it means "my device". `apply()` makes those words mean the CPU. It does nothing where
`torch.cuda.is_available()`, and nothing twice. What is *not* changed: `is_available()` and `device_count()` stay
truthful, so that no library takes a CUDA path by mistake.

Two limits it cannot lift: training scripts need an `if __name__ == "__main__"` guard (saving a checkpoint spawns
processes that import the script), and without TransformerEngine or apex a distributed-optimizer checkpoint in
torch_dist format does not resume with its optimizer state, whatever the dispatcher (distrib_optimizer.py:839).
"""

import contextlib
import functools
import importlib
import logging
import os
import sys

import torch

from megamoe_train.megatron import wheel

_FACTORIES = ("tensor", "as_tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn", "randint")
_applied = False


def apply() -> None:
    """Make Megatron's device words mean the CPU. A no-op on a machine with a GPU, and when called again."""
    global _applied
    if _applied or torch.cuda.is_available():
        return
    _applied = True
    # jit_fuser is torch.compile: on a CPU it asks for a C++ compiler and minutes per function.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if "torch._dynamo.config" in sys.modules:
        sys.modules["torch._dynamo.config"].disable = True
    _devices()
    _streams()
    _random_state()
    _megatron()
    wheel.use_shipped_dataset_helper()


def _devices() -> None:
    """`device="cuda"`, `.cuda()`, `current_device()` and the type names that Megatron compares."""
    # `device=torch.cuda.current_device()` is how Megatron names its device (router.py:184, timers.py:303).
    torch.cuda.current_device = lambda: torch.device("cpu")
    # Every rank would otherwise ask for a device that is not there (initialize.py:282).
    torch.cuda.set_device = lambda device: None
    # `device="cuda"` literals: clip_grads.py:108, rerun_state_machine.py:264, training.py:1137 and others.
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    # The batch and the model are moved "to the GPU" (training.py:1818 and every user's forward_step).
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    # Asserts compare `type()` with "torch.cuda.FloatTensor" (clip_grads.py:174, distrib_optimizer.py:477).
    torch.Tensor.type = _cuda_type_name(torch.Tensor.type)


def _on_cpu(factory):
    """`factory` with a CUDA `device` argument replaced by the CPU."""

    @functools.wraps(factory)
    def wrapped(*args, **kwargs):
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return wrapped


def _cuda_type_name(original):
    """`Tensor.type` that, asked without a type, names the CUDA type of the same dtype."""

    def tensor_type(self, *args, **kwargs):
        answer = original(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    return tensor_type


class _Nothing:
    """Stands for a CUDA stream or event. CPU work is done when the call returns, so there is nothing to wait for."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, *args):
        pass

    wait = wait_event = wait_stream = synchronize = record

    def record_event(self, *args):
        return self

    def query(self):
        return True

    def __eq__(self, other):
        return isinstance(other, _Nothing)  # one queue only, so every stream is the current one

    __hash__ = object.__hash__


def _streams() -> None:
    """Streams, events, synchronisation, NVTX ranges."""
    # The alltoall dispatcher copies its splits on a side stream (token_dispatcher.py:469).
    torch.cuda.Stream = torch.cuda.Event = _Nothing
    # DDP and the pipeline schedules order themselves against these (param_and_grad_buffer.py:632, training.py:1876).
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: _Nothing()
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    # The timers synchronise before they read the clock (timers.py:152).
    torch.cuda.synchronize = lambda device=None: None
    # NVTX ranges need a library that a CPU build of torch lacks (core/utils.py).
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *args: 0


def _random_state() -> None:
    """The RNG tracker keeps one CUDA generator state per name; here those are states of the CPU generator."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    # Read and written by the tracker, recomputation and checkpoints (random.py:303, checkpointing.py:417).
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.manual_seed
    # Megatron's own pair goes to CUDA generators directly, or queues the call until CUDA starts, which is never.
    random._get_cuda_rng_state = lambda device=-1, clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    # The tracker warns when the CPU generator moves inside a fork; here that is what a fork is for (random.py:331).
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _megatron() -> None:
    """Places where Megatron itself decides by the presence of a GPU."""
    utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    # Splits that already lie on the CPU stay tensors, and all_to_all refuses them (moe_utils.py:1184).
    utils.maybe_move_tensor_to_cpu = dispatcher.maybe_move_tensor_to_cpu = _to_cpu
    initialize = importlib.import_module("megatron.training.initialize")
    # `allow_no_cuda` is False by default and pretrain() does not pass it (initialize.py:43).
    initialize.initialize_megatron.__defaults__ = (True, *initialize.initialize_megatron.__defaults__[1:])
    # Process groups are made, and the RNG tracker seeded, only where a GPU is counted (initialize.py:350,447).
    initialize._initialize_distributed = _counting_one_device(initialize._initialize_distributed)
    initialize._set_random_seed = _counting_one_device(initialize._set_random_seed)


def _to_cpu(tensor, as_numpy=False, record_stream=False):
    """`maybe_move_tensor_to_cpu` for tensors that are there already."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _counting_one_device(original):
    """`original`, for the time of whose call `device_count()` says 1."""

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        count, torch.cuda.device_count = torch.cuda.device_count, lambda: 1
        try:
            return original(*args, **kwargs)
        finally:
            torch.cuda.device_count = count

    return wrapped
