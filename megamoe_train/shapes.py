"""What a training job's settings say about sizes: the model (ModelShape), and how it lies on the ranks (Layout).

Read from a recipe's settings, from the table of a request, or from Megatron's parsed arguments, so that the memory
and FLOP models see what Megatron will build. Standard library only. Sizes in elements and tokens, never in bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# The widest heads that FlashAttention 2 and 3 and cuDNN's fused attention train with on Hopper; wider ones fall back to
# TransformerEngine's unfused attention (its documentation, "Attention backends").
FUSED_HEAD_DIM = 256

Settings = Mapping[str, Any] | argparse.Namespace


class Reader:
    """Settings by Megatron's spelling (`num-layers`), whatever they are held in."""

    def __init__(self, settings: Settings) -> None:
        items = vars(settings) if isinstance(settings, argparse.Namespace) else settings
        self._values = {name.replace("_", "-"): value for name, value in items.items()}

    def flag(self, name: str) -> bool:
        """Whether a bare flag is given (`[]` in a request's table)."""
        value = self._values.get(name)
        return value == [] or bool(value)

    def value(self, name: str, default: Any = None) -> Any:
        """The single value of a setting, `default` where it is absent or None."""
        value = self._values.get(name)
        if isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]
        return default if value is None else value

    def integer(self, name: str, default: int = 0) -> int:
        """The value as a whole number. Raises ValueError for another."""
        value = self.value(name, default)
        try:
            return int(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: got {value!r}; allowed: a whole number") from error

    def negated(self, flag: str, positive: str, default: bool) -> bool:
        """`positive` of Megatron's arguments, which the command line spells as the flag `--no-...`."""
        if self.flag(flag):
            return False
        value = self._values.get(positive)
        return default if value is None else self.flag(positive)


@dataclass(frozen=True)
class Attention:
    """Widths of one attention layer: grouped-query, or latent (MLA) where `kv_rank` is set."""

    heads: int
    groups: int  # of keys and values; without meaning for MLA
    qk_dim: int  # of a head's query and key, rotary part included
    v_dim: int  # of a head's value
    rope_dim: int = 0  # MLA: the part of qk_dim that is shared and rotated
    q_rank: int = 0  # MLA: 0 means that queries are projected at once
    kv_rank: int = 0
    qk_norm: bool = False

    @property
    def latent(self) -> bool:
        return self.kv_rank > 0


@dataclass(frozen=True)
class ModelShape:
    """A GPT of Megatron's with SwiGLU, RMSNorm and no biases, as all recipes here are."""

    layers: int
    hidden: int  # H
    vocab: int  # padded
    attention: Attention
    dense_width: int  # of layers without experts
    moe_layers: tuple[bool, ...]  # one for each decoder layer
    experts: int  # E; 0 means none
    top_k: int  # K
    expert_width: int  # I
    shared_width: int  # of the shared expert; 0 means none
    mtp: int  # layers of multi-token prediction
    untied: bool  # an output matrix of its own
    sequence: int

    @classmethod
    def of(cls, settings: Settings) -> ModelShape:
        """Raises ValueError for settings whose parameters this model cannot count."""
        read = Reader(settings)
        _refuse_unmodelled(read)
        layers, hidden, heads = (read.integer(n) for n in ("num-layers", "hidden-size", "num-attention-heads"))
        # Megatron's default with SwiGLU: as many parameters as 4H without gates (arguments.py, validate_args).
        dense = read.integer("ffn-hidden-size", int(4 * hidden * 2 / 3 / 64) * 64)
        experts = read.integer("num-experts")
        return cls(
            layers=layers,
            hidden=hidden,
            vocab=_padded_vocab(read),
            attention=_attention(read, hidden, heads),
            dense_width=dense,
            moe_layers=_moe_layers(read.value("moe-layer-freq", 1), layers, experts),
            experts=experts,
            top_k=read.integer("moe-router-topk", 2) if experts else 0,
            expert_width=read.integer("moe-ffn-hidden-size", dense) if experts else 0,
            shared_width=read.integer("moe-shared-expert-intermediate-size"),
            mtp=read.integer("mtp-num-layers"),
            untied=read.flag("untie-embeddings-and-output-weights"),
            sequence=read.integer("seq-length"),
        )

    @property
    def mtp_is_moe(self) -> bool:
        """A layer of multi-token prediction is built like the last decoder layer."""
        return bool(self.moe_layers) and self.moe_layers[-1]


@dataclass(frozen=True)
class Stage:
    """What one pipeline stage holds. Decoder layers are named by their number, 0 first."""

    layers: tuple[int, ...]
    mtp: int
    embedding: bool
    output: bool


@dataclass(frozen=True)
class Layout:
    """How the model lies on the ranks of a job, and how it is trained there."""

    ranks: int
    pipeline: int
    context: int
    expert: int  # R
    stages: tuple[Stage, ...]
    micro_batch: int  # sequences
    micro_batches: int  # of one step, in each pipeline
    bf16: bool
    fp32_gradients: bool
    sharded_optimizer: bool
    recompute: str  # "none" | "full" | "core_attn" | "moe" | several of the last two, joined by "+"
    transformer_engine: bool  # its layers and its fused Adam
    fused_attention: bool  # scores are never written down

    @classmethod
    def of(cls, settings: Settings, ranks: int, model: ModelShape) -> Layout:
        """Raises ValueError for a layout that does not divide, or that the models do not cover."""
        read = Reader(settings)
        pipeline = read.integer("pipeline-model-parallel-size", 1)
        context = read.integer("context-parallel-size", 1)
        expert = read.integer("expert-model-parallel-size", 1)
        if ranks < 1 or ranks % (pipeline * context) or ranks % (pipeline * expert):
            raise ValueError(
                f"world size: {ranks} is not a multiple of expert-model-parallel-size {expert} x "
                f"pipeline-model-parallel-size {pipeline} and of context-parallel-size {context} x {pipeline}"
            )
        bf16 = read.flag("bf16")
        micro_batch = read.integer("micro-batch-size", 1)
        engine = read.value("transformer-impl", "transformer_engine") == "transformer_engine"
        replicas = ranks // (pipeline * context)
        batch = read.integer("global-batch-size", micro_batch * replicas)
        return cls(
            ranks=ranks,
            pipeline=pipeline,
            context=context,
            expert=expert,
            stages=_stages(read, pipeline, model),
            micro_batch=micro_batch,
            micro_batches=max(1, batch // (micro_batch * replicas)),
            bf16=bf16,
            fp32_gradients=not bf16 or read.flag("accumulate-allreduce-grads-in-fp32"),
            sharded_optimizer=read.flag("use-distributed-optimizer"),
            recompute=_recompute(read),
            transformer_engine=engine,
            fused_attention=engine and max(model.attention.qk_dim, model.attention.v_dim) <= FUSED_HEAD_DIM,
        )

    @property
    def dense_replicas(self) -> int:
        """Ranks that hold the same dense parameters (context ranks count: they share the optimizer's work)."""
        return self.ranks // self.pipeline

    @property
    def expert_replicas(self) -> int:
        """EDP: ranks that hold the same experts."""
        return self.ranks // (self.pipeline * self.expert)

    def tokens(self, model: ModelShape) -> int:
        """T: tokens of one micro-batch on one rank."""
        return self.micro_batch * model.sequence // self.context


def _refuse_unmodelled(read: Reader) -> None:
    for name, only in (("tensor-model-parallel-size", 1), ("expert-tensor-parallel-size", 1)):
        if read.integer(name, only) != only:
            raise ValueError(f"{name}: got {read.value(name)}; the memory model covers {only}")
    biases = not (read.flag("disable-bias-linear") or read.value("add-bias-linear") is False)
    for wrong, what in (
        (not read.flag("swiglu"), "swiglu absent"),
        (read.value("normalization", "LayerNorm") != "RMSNorm", "normalization other than RMSNorm"),
        (biases, "biases in linear layers"),
    ):
        if wrong:
            raise ValueError(f"{what}: not covered by the memory and FLOP models")


def _attention(read: Reader, hidden: int, heads: int) -> Attention:
    if read.flag("multi-latent-attention"):
        rope = read.integer("qk-pos-emb-head-dim", 64)
        return Attention(
            heads=heads,
            groups=heads,
            qk_dim=read.integer("qk-head-dim", 128) + rope,
            v_dim=read.integer("v-head-dim", 128),
            rope_dim=rope,
            q_rank=read.integer("q-lora-rank"),
            kv_rank=read.integer("kv-lora-rank", 32),
            qk_norm=read.flag("qk-layernorm"),
        )
    groups = read.integer("num-query-groups", heads) if read.flag("group-query-attention") else heads
    width = read.integer("kv-channels", hidden // heads)
    return Attention(heads, groups, width, width, qk_norm=read.flag("qk-layernorm"))


def _padded_vocab(read: Reader) -> int:
    padded = read.value("padded-vocab-size")
    if padded is not None:
        return int(padded)
    multiple = read.integer("make-vocab-size-divisible-by", 128)
    return -(-read.integer("vocab-size") // multiple) * multiple


def _moe_layers(frequency: Any, layers: int, experts: int) -> tuple[bool, ...]:
    """`moe-layer-freq`: n, every n-th layer from the first; or a list (also as text: "[0]*1+[1]*3")."""
    if not experts:
        return (False,) * layers
    if isinstance(frequency, str) and frequency.strip().startswith(("[", "(")):
        frequency = _evaluate(frequency)
    if isinstance(frequency, Sequence) and not isinstance(frequency, str):
        pattern = tuple(bool(int(value)) for value in frequency)
        if len(pattern) != layers:
            raise ValueError(f"moe-layer-freq: got {len(pattern)} layers; allowed: num-layers = {layers}")
        return pattern
    return tuple(number % int(frequency) == 0 for number in range(layers))


def _evaluate(pattern: str) -> list[int]:
    """ "[0]*1+[1]*3" -> [0, 1, 1, 1]: sums of lists of 0 and 1, each repeated. Raises ValueError for anything else."""
    result: list[int] = []
    for part in pattern.strip().strip("()").replace(" ", "").split("+"):
        items, _, times = part.strip("()").partition("*")
        if not (items.startswith("[") and items.endswith("]")):
            raise ValueError(f"moe-layer-freq: got {pattern!r}; allowed: a number, or lists such as [0]*1+[1]*3")
        result += [int(item) for item in items[1:-1].split(",")] * int(times or 1)
    return result


def _stages(read: Reader, pipeline: int, model: ModelShape) -> tuple[Stage, ...]:
    text = read.value("pipeline-model-parallel-layout")
    if text is not None:
        rows = [row.strip() for row in str(text).replace(",", "").split("|")]
        if "*" in str(text) or set("".join(rows)) - set("EtmL"):
            raise ValueError(f"pipeline-model-parallel-layout: {text!r}: write it out, as in Ett|ttt|tmL")
    else:
        per_stage, rest = divmod(model.layers, pipeline)
        if rest:
            raise ValueError(f"num-layers: {model.layers} is not a multiple of pipeline-model-parallel-size {pipeline}")
        rows = ["t" * per_stage for _ in range(pipeline)]
        rows[0] = "E" + rows[0]
        rows[-1] += "m" * model.mtp + "L"
    if len(rows) % pipeline:
        raise ValueError(f"pipeline-model-parallel-layout: {len(rows)} stages on {pipeline} pipeline ranks")
    stages = []
    for rank in range(pipeline):  # with virtual stages, a rank holds every pipeline-th row
        mine = [number for number in range(len(rows)) if number % pipeline == rank]
        numbers = [_first_layer(rows, row) + i for row in mine for i in range(rows[row].count("t"))]
        held = "".join(rows[row] for row in mine)
        stages.append(Stage(tuple(numbers), held.count("m"), "E" in held, "L" in held))
    found = sum(len(stage.layers) for stage in stages), sum(stage.mtp for stage in stages)
    if found != (model.layers, model.mtp):
        raise ValueError(
            f"pipeline-model-parallel-layout: holds {found[0]} decoder and {found[1]} prediction layers; the model has "
            f"{model.layers} and {model.mtp}"
        )
    return tuple(stages)


def _first_layer(rows: Sequence[str], row: int) -> int:
    return sum(before.count("t") for before in rows[:row])


def _recompute(read: Reader) -> str:
    granularity = read.value("recompute-granularity")
    if granularity == "selective":
        modules = read._values.get("recompute-modules") or ["core_attn"]
        return "+".join(sorted([modules] if isinstance(modules, str) else map(str, modules)))
    return "full" if granularity == "full" else "none"
