"""Eyes on Megatron's training loop: what it computes each step, shown, kept and drawn.

`pretrain()` offers no callbacks, so six functions of `megatron.training.training` are wrapped: they are called as
before, with the same arguments, and what they return or are given is read. TensorBoard gets Megatron's own curves
through Megatron's own writer, and ours beside them.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer, training

from megamoe_train.megatron import workspaces
from megamoe_train.training import checkpointing
from megamoe_train.training.console import Console
from megamoe_train.training.load import ExpertLoad, LayerLoad
from megamoe_train.training.metrics import Metrics, draw
from megamoe_train.training.passes import PassTime, PassTimes
from megamoe_train.training.speed import Speed

LOSS = "lm loss"
_WATCHED = ("train", "train_step", "training_log", "evaluate", "save_checkpoint_and_time", "load_checkpoint")


class Watch:
    """The record of this session. Only the last rank has losses (as in Megatron), so only it writes and speaks."""

    def __init__(
        self,
        console: Console,
        folder: Path,
        title: str,
        start_step: int,
        checkpoint: checkpointing.Checkpoint | None,
        speed: Speed,
        layers_every: int = 0,
    ) -> None:
        """layers_every: steps between two tables of every layer's expert load, in the log and the writers; 0: none."""
        self.console = console
        self.speed = speed
        self.layers_every = layers_every
        self.title = title
        self.picture = folder / "loss.png"
        self.step = start_step
        self.start_step = start_step
        self.checkpoint = checkpoint
        self.saved_step: int | None = None
        self.speaks = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        self.folder = folder
        self.metrics: Metrics | None = None
        self._load: ExpertLoad | None = None
        self._passes: PassTimes | None = None  # where layers are asked for, on a GPU
        self._mark: float | None = None  # when this step began; moved on by evaluations and saves between steps
        self._evaluated: tuple[int, tuple] | None = None  # step of the last evaluation, and what it returned

    def install(self) -> None:
        """Wrap Megatron's functions, for this process and for good."""
        for name in _WATCHED:
            original = getattr(training, name)
            wrapper = functools.wraps(original)(functools.partial(getattr(self, f"_{name}"), original))
            setattr(training, name, wrapper)

    def draw(self) -> None:
        """Write loss.png."""
        if self.metrics and self.metrics.steps:
            draw(self.metrics, self.title, self.picture)

    def summary(self, seconds: float, last_step: int, stopped: bool) -> list[str]:
        """The end of a session, in a few lines."""
        steps = self.step - self.start_step
        how = f"stopped at step {self.step} of {last_step}" if stopped else f"done: {self.step} steps"
        tokens = steps * get_current_global_batch_size() * get_args().seq_length
        lines = [f"{how}; this session {steps} steps, {tokens:,} tokens in {seconds / 60:.1f} minutes"]
        measured = [f"{line['validation_loss']:.4f} (step {line['step']})" for line in self.metrics.validations]
        if measured:
            lines.append("validation loss " + " -> ".join(dict.fromkeys((measured[0], measured[-1]))))
        lines.append(f"loss curve {self.picture}; tensorboard --logdir {get_args().tensorboard_dir}")
        if self.saved_step is not None:
            lines.append(f"checkpoint of step {self.saved_step} in {get_args().save}")
        if stopped:
            lines.append("the same command goes on from there")
        return lines

    def _load_checkpoint(self, original: Callable, *args, **kwargs):
        if self.checkpoint is None:
            return original(*args, **kwargs)
        with checkpointing.loading(self.checkpoint):
            return original(*args, **kwargs)

    def _train(
        self, original: Callable, forward_step, model, optimizer, scheduler, train_data, valid_data, *rest, **more
    ):
        args = get_args()
        self._load = ExpertLoad(model, args.num_layers)
        if self.layers_every and torch.cuda.is_available():
            self._passes = PassTimes(model, args.num_layers)
        if self.speaks:  # not before: by now the ranks have met, so rank 0 has claimed the folder
            self.metrics = Metrics(self.folder / "metrics.jsonl", self.start_step)
        if args.iteration == 0 and args.do_valid:
            self._evaluate_first(args, forward_step, model, optimizer, valid_data, *rest)
        return original(forward_step, model, optimizer, scheduler, train_data, valid_data, *rest, **more)

    def _evaluate_first(self, args, forward_step, model, optimizer, valid_data, process_non_loss, config, *_) -> None:
        """Megatron evaluates after the first interval at the earliest; the loss before any step is the start point."""
        gathers = training.should_disable_forward_pre_hook(args)
        if gathers:  # parameters are in place already; the first gather belongs to train()
            training.disable_forward_pre_hook(model, param_sync=False)
        training.evaluate_and_print_results(
            "iteration 0", forward_step, valid_data, model, 0, process_non_loss, config, write_to_tensorboard=True
        )
        if gathers:
            training.enable_forward_pre_hook(model)

    def _train_step(self, original: Callable, *args, **kwargs):
        self._mark = self._mark or time.perf_counter()
        if self._passes:
            self._passes.active = (self.step + 1) % self.layers_every == 0
        return original(*args, **kwargs)

    def _training_log(self, original: Callable, losses, total_losses, learning_rate, iteration, *rest, **more):
        # The positions of 0.19.2: loss scale, memory flag, skipped, gradient norm.
        grad_norm = rest[3]
        result = original(losses, total_losses, learning_rate, iteration, *rest, **more)
        self.step = iteration
        load = self._load.read()  # reads the GPU, so the clock stands when the step is done
        workspaces.check()  # before this step may be saved
        now = time.perf_counter()
        passes = self._passes.read() if self._passes and self._passes.active else {}
        if self.speaks:
            self._record(get_args(), losses, learning_rate, grad_norm, load, passes, now - self._mark)
        self._mark = time.perf_counter() if passes else now  # reading them is no part of the next step
        return result

    def _record(self, args, losses, learning_rate, grad_norm, load, passes, seconds: float) -> None:
        tokens = get_current_global_batch_size() * args.seq_length
        line = {
            "step": self.step,
            "loss": losses[LOSS].item() if LOSS in losses else float("nan"),  # a skipped step has none
            "lr": learning_rate,
            "grad_norm": None if grad_norm is None else float(grad_norm),
            **self.speed.measured(tokens, seconds),
            "load": [[round(value, 4) for value in layer.triple] for layer in load.values()],
        }
        with_layers = bool(self.layers_every) and self.step % self.layers_every == 0
        if with_layers:
            line["layers"] = {
                layer: asdict(values) | (asdict(passes[layer]) if layer in passes else {})
                for layer, values in load.items()
            }
        self.metrics.add(line)
        self._to_writers(line, load, passes, with_layers)
        text = describe(line)
        self.console.progress(self.step, args.train_iters, text)
        if not self.console.is_terminal and self._is_shown(args):
            self.console.say(f"step {self.step:>{len(str(args.train_iters))}}/{args.train_iters}  {text}")
        if with_layers:
            for row in layer_table(load, passes):
                self.console.say(row)

    def _is_shown(self, args) -> bool:
        """A log gets the first steps, every log interval and the last step."""
        early = self.step - self.start_step <= 3
        return early or self.step % args.log_interval == 0 or self.step == args.train_iters

    def _to_writers(
        self, line: dict, load: dict[int, LayerLoad], passes: dict[int, PassTime], with_layers: bool
    ) -> None:
        """Ours beside Megatron's own curves, through its TensorBoard and W&B writers where they exist."""
        curves = {name: line[key] for key, name in Speed.CURVES.items() if line.get(key) is not None}
        for layer, values in load.items():
            for name, value in zip(("min", "max", "cv"), values.triple, strict=True):
                curves[f"expert-load/layer-{layer}-{name}"] = value
            if with_layers:
                curves[f"expert-load/layer-{layer}-empty"] = values.empty
                curves[f"expert-load/layer-{layer}-dropped"] = values.dropped
        for layer, times in passes.items():
            curves |= {f"passes/layer-{layer}-{name.replace('_', '-')}": value for name, value in asdict(times).items()}
        if writer := get_tensorboard_writer():
            for name, value in curves.items():
                writer.add_scalar(name, value, self.step)
        if wandb := get_wandb_writer():
            wandb.log(curves, self.step)

    def _evaluate(self, original: Callable, *args, **kwargs):
        # pretrain() evaluates once more after the last step, on the same weights and, here, on the same samples.
        if self._evaluated and self._evaluated[0] == self.step:
            return self._evaluated[1]
        with self._clock_stopped():
            result = original(*args, **kwargs)
        self._evaluated = (self.step, result)
        if self.speaks and result[0]:
            loss = result[0][LOSS].item()
            self.metrics.add({"step": self.step, "validation_loss": loss})
            self.console.say(f"validation loss at step {self.step}: {loss:.4f}")
            self.draw()
        return result

    def _save_checkpoint_and_time(self, original: Callable, iteration, *args, **kwargs):
        with self._clock_stopped():
            result = original(iteration, *args, **kwargs)
        self.saved_step = iteration
        if self.speaks:
            self.console.say(f"checkpoint saved at step {iteration}")
        return result

    @contextlib.contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if self._mark is not None:
            self._mark += time.perf_counter() - begin


def describe(line: dict) -> str:
    """One step as a user reads it."""
    norm = "-" if line["grad_norm"] is None else f"{line['grad_norm']:.2f}"
    text = f"loss {line['loss']:.4f}  lr {line['lr']:.2e}  grad norm {norm}  {line['tokens_per_s']:,.0f} tokens/s"
    if line.get("tflops") is not None:
        text += f"  {line['tflops']:.3g} TFLOP/s/{'GPU' if 'allocated_gib' in line else 'rank'}"
    if line.get("mfu") is not None:
        text += f" ({100 * line['mfu']:.1f}% MFU)"
    if line["load"]:
        least, most, spread = zip(*line["load"], strict=True)
        text += f"  expert load {min(least):.2f}-{max(most):.2f} cv {max(spread):.2f}"
    return text


def layer_table(load: dict[int, LayerLoad], passes: dict[int, PassTime]) -> list[str]:
    """Expert load of every layer, and where they were timed the last rank's passes, as lines for a log."""
    rows = []
    for layer, one in load.items():
        row = f"  layer {layer:>3}  expert load {one.least:.2f}-{one.most:.2f}  cv {one.cv:.2f}  empty {one.empty}  "
        row += f"dropped {one.dropped}"
        if times := passes.get(layer):
            row += f"  forward {times.forward_ms:.2f} ms (overlap {times.forward_overlap:.0%})"
            row += f"  backward {times.backward_ms:.2f} ms (overlap {times.backward_overlap:.0%})"
        rows.append(row)
    return rows or ["  no MoE layer has routed a token"]
