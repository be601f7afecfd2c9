"""Memory model of a training job: parameters, gradients, optimizer, activations, workspace of each pipeline stage.

`python -m megamoe_train.memory --recipe NAME` prints the table, without a GPU.

Parameters are counted exactly (tests compare with models that Megatron builds). In bf16 with Megatron's distributed
optimizer a parameter costs 6 + 12 / replicas bytes: 2 of weight, 4 of fp32 gradient, and the fp32 master weight and
Adam's two moments shared by the replicas (Rajbhandari et al., ZeRO, arXiv 1910.02054; Megatron's README on the
distributed optimizer). Experts have fewer replicas (EDP) than the rest. Activations follow Korthikanti et al.
(arXiv 2205.05198), with this layer's own in the place of the MLP's. All figures are bytes of one rank.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from .config import MegaMoEConfig
from .shapes import Layout, ModelShape, Stage

GIB = 2**30

# What torch may allocate on an 80 GB H100: 79.1 GiB are there; the CUDA context, NCCL's and NVSHMEM's buffers and
# what fragmentation leaves unused take about a tenth.
USABLE_BYTES = 72 * GIB

# Rows that a rank's experts receive, over the mean: what pools are sized for while routers are not yet balanced.
ROWS_OVER_MEAN = 1.25
ROW_TILE = 128


@dataclass(frozen=True)
class Parameters:
    """Numbers of one rank."""

    dense: int
    expert: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank of one pipeline stage."""

    stage: int
    parameters: Parameters
    weights: int
    gradients: int
    optimizer: int
    activations: int  # kept for backward by all micro-batches in flight
    transient: int  # most that one layer, the loss, or the optimizer step adds for a moment
    workspace: int

    @property
    def total(self) -> int:
        return (
            self.weights + self.gradients + self.optimizer + self.activations + self.transient + self.workspace
        )  # fmt: skip


def attention_parameters(model: ModelShape) -> int:
    """One attention layer with its norms on queries and keys; the norm before it is the layer's."""
    a, hidden = model.attention, model.hidden
    out = a.heads * a.v_dim * hidden
    if not a.latent:
        return hidden * (a.heads + 2 * a.groups) * a.qk_dim + out + (2 * a.qk_dim if a.qk_norm else 0)
    queries = a.heads * a.qk_dim
    query = a.q_rank * (hidden + queries) if a.q_rank else hidden * queries
    norms = (a.q_rank + a.kv_rank) if a.qk_norm else 0
    keys_and_values = a.heads * (a.qk_dim - a.rope_dim + a.v_dim)
    return query + hidden * (a.kv_rank + a.rope_dim) + a.kv_rank * keys_and_values + norms + out


def layer_parameters(model: ModelShape, ep_size: int, *, moe: bool) -> Parameters:
    """One decoder layer on one rank: two norms, attention, router and shared expert or the dense SwiGLU, experts."""
    common = 2 * model.hidden + attention_parameters(model)
    if not moe:
        return Parameters(common + 3 * model.hidden * model.dense_width, 0)
    dense = common + model.hidden * model.experts + 3 * model.hidden * model.shared_width
    return Parameters(dense, model.experts // ep_size * 3 * model.hidden * model.expert_width)


def stage_parameters(model: ModelShape, stage: Stage, ep_size: int) -> Parameters:
    """One pipeline stage on one rank. A prediction layer has three norms and a matrix that joins 2H to H."""
    held = [layer_parameters(model, ep_size, moe=model.moe_layers[layer]) for layer in stage.layers]
    held += [layer_parameters(model, ep_size, moe=model.mtp_is_moe)] * stage.mtp
    matrix = model.vocab * model.hidden
    # The embedding stands where tokens come in, and again where prediction layers need it.
    embeddings = int(stage.embedding or stage.mtp > 0)
    outputs = int(stage.output and (model.untied or not embeddings))
    dense = sum(layer.dense for layer in held) + matrix * (embeddings + outputs)
    dense += stage.mtp * (3 * model.hidden + 2 * model.hidden**2)
    # The final norm is with the last decoder layer where prediction layers follow it (transformer_block.py:387).
    normed = model.layers - 1 in stage.layers if model.mtp else stage.output
    dense += model.hidden * int(normed)
    return Parameters(dense, sum(layer.expert for layer in held))


def total_parameters(model: ModelShape) -> int:
    """Of the whole model, every expert and every matrix once."""
    whole = Stage(tuple(range(model.layers)), model.mtp, True, True)
    held = stage_parameters(model, whole, 1)
    return held.dense + held.expert


def active_parameters(model: ModelShape) -> int:
    """Of the whole model, with K of the E experts of each layer and without prediction layers."""
    whole = stage_parameters(model, Stage(tuple(range(model.layers)), 0, True, True), 1)
    return whole.dense + (whole.expert // model.experts * model.top_k if model.experts else 0)


def stage_memory(model: ModelShape, layout: Layout, number: int) -> Memory:
    """The memory of stage `number` (0 first)."""
    stage = layout.stages[number]
    parameters = stage_parameters(model, stage, layout.expert)
    held = parameters.dense + parameters.expert
    weight_bytes = 2 if layout.bf16 else 4
    gradient_bytes = 4 if layout.fp32_gradients else 2
    states = 12 if layout.bf16 else 8  # with bf16 weights an fp32 master weight is among them
    shares = [
        (parameters.dense, layout.dense_replicas if layout.sharded_optimizer else 1),
        (parameters.expert, layout.expert_replicas if layout.sharded_optimizer else 1),
    ]
    sharded = sum(-(-count // replicas) for count, replicas in shares)
    kept, transient = _activations(model, layout, number)
    # Without TransformerEngine's fused Adam, torch's makes one temporary as long as its parameters.
    update = 0 if layout.transformer_engine else 4 * sharded
    return Memory(
        stage=number,
        parameters=parameters,
        weights=held * weight_bytes,
        gradients=held * gradient_bytes,
        optimizer=states * sharded,
        activations=kept,
        # The optimizer steps when no activation is left.
        transient=max(transient, update - kept),
        workspace=workspace(model, layout),
    )


def estimate(model: ModelShape, layout: Layout) -> list[Memory]:
    """Every stage, first to last."""
    return [stage_memory(model, layout, number) for number in range(layout.pipeline)]


def largest(model: ModelShape, layout: Layout) -> Memory:
    """The stage that needs most."""
    return max(estimate(model, layout), key=lambda memory: memory.total)


def workspace(model: ModelShape, layout: Layout) -> int:
    """Symmetric bytes of one rank: one workspace for each expert-parallel group, whatever the number of layers."""
    if not model.experts:
        return 0
    from .workspace import bytes_needed

    shape = MegaMoEConfig(model.hidden, model.expert_width, model.experts, model.top_k, layout.expert)
    return bytes_needed(shape, layout.tokens(model))


def _activations(model: ModelShape, layout: Layout, number: int) -> tuple[int, int]:
    """Bytes kept by all micro-batches in flight, and the most that is alive for a moment beside them."""
    stage = layout.stages[number]
    tokens, item = layout.tokens(model), 2 if layout.bf16 else 4
    kinds = [model.moe_layers[layer] for layer in stage.layers] + [model.mtp_is_moe] * stage.mtp
    each = [_layer_kept(model, layout, tokens, item, moe=moe) for moe in kinds]
    in_flight = min(layout.pipeline - number, layout.micro_batches)  # 1F1B: Narayanan et al., arXiv 2104.04473
    kept = in_flight * sum(each)
    moments = [_layer_moment(model, layout, tokens, item, moe=moe) for moe in set(kinds)]
    if stage.output:
        # Logits in the weights' dtype, in fp32 for the loss, and the softmax that its backward needs.
        moments.append((1 + stage.mtp) * tokens * model.vocab * (item + 8))
    return kept, max(moments, default=0)


def _attention_kept(model: ModelShape, tokens: int, item: int, *, scores: bool) -> int:
    """Queries, keys and values before and after rotation, the attention's output; scores where they are kept."""
    a = model.attention
    width = a.heads * (2 * a.qk_dim + a.v_dim) + a.groups * (2 * a.qk_dim + a.v_dim)
    if a.latent:
        width += 2 * (a.q_rank + a.kv_rank) + a.rope_dim
    kept = tokens * width * item
    return kept + (_scores(model, tokens, item) if scores else 0)


def _scores(model: ModelShape, tokens: int, item: int) -> int:
    """Unfused attention keeps two heads x sequence matrices for each token, the softmax and what it becomes after
    dropout; its backward makes two more, their gradients."""
    return 2 * tokens * model.attention.heads * model.sequence * item


def _layer_whole(model: ModelShape, layout: Layout, tokens: int, item: int, *, moe: bool) -> int:
    """All that one layer keeps for backward where nothing is recomputed: inputs of both norms, and their outputs."""
    recomputed = layout.recompute.split("+")
    scores = not layout.fused_attention and "core_attn" not in recomputed
    kept = 4 * tokens * model.hidden * item + _attention_kept(model, tokens, item, scores=scores)
    if not moe:
        return kept + tokens * 3 * model.dense_width * item
    if "moe" in recomputed:
        return kept
    return kept + _moe_kept(model, tokens, item)


def _moe_kept(model: ModelShape, tokens: int, item: int) -> int:
    """h of the fused call (its x is the norm's output), the router's scores in fp32 with their map, the shared
    expert's product and activation."""
    rows = tokens * model.top_k  # the mean over ranks; an expert's last tile is padded
    h = (rows + ROW_TILE // 2) * 2 * model.expert_width * item
    return h + tokens * (model.experts * 9 + 3 * model.shared_width * item)


def _layer_kept(model: ModelShape, layout: Layout, tokens: int, item: int, *, moe: bool) -> int:
    if layout.recompute == "full":
        return tokens * model.hidden * item  # the layer's input
    return _layer_whole(model, layout, tokens, item, moe=moe)


def _layer_moment(model: ModelShape, layout: Layout, tokens: int, item: int, *, moe: bool) -> int:
    """What a layer's backward needs beside what is kept: its recomputed activations, the larger of attention's
    scores and the experts' row pools (dispatched dY and x, a; dh takes h's place), and the gradient of its input."""
    again = layout.recompute == "full"
    recomputed = _layer_whole(model, layout, tokens, item, moe=moe) if again else 0
    if "moe" in layout.recompute.split("+") and moe:
        recomputed += _moe_kept(model, tokens, item)
    rows = int(tokens * model.top_k * ROWS_OVER_MEAN) if moe else 0
    pools = rows * (2 * model.hidden + model.expert_width) * item
    unfused = 0 if layout.fused_attention else _scores(model, tokens, item)
    return recomputed + max(pools, unfused) + 2 * tokens * model.hidden * item


def table(model: ModelShape, layout: Layout) -> str:
    """The estimate as text: equal neighbouring stages share a line, GiB."""
    head = (
        "stage",
        "dense",
        "expert",
        "weights",
        "grads",
        "optimizer",
        "activations",
        "transient",
        "workspace",
        "total",
    )
    rows: list[tuple[str, ...]] = []
    for memory in estimate(model, layout):
        sizes = (
            memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.transient,
            memory.workspace, memory.total,
        )  # fmt: skip
        counts = (f"{memory.parameters.dense / 1e6:,.0f}M", f"{memory.parameters.expert / 1e6:,.0f}M")
        rows.append((str(memory.stage), *counts, *(f"{size / GIB:.2f}" for size in sizes)))
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)
    )


def describe(model: ModelShape, layout: Layout) -> str:
    """One line: the largest stage's total and its parts."""
    most = largest(model, layout)
    parts = {
        "weights": most.weights,
        "gradients": most.gradients,
        "optimizer": most.optimizer,
        "activations": most.activations + most.transient,
        "workspace": most.workspace,
    }
    text = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    return f"{most.total / GIB:.1f} GiB a GPU (stage {most.stage}: {text})"


def main(argv: list[str] | None = None) -> int:
    """Prints the table of a recipe. Exit status 2 where the recipe refuses the number of ranks."""
    from . import recipes

    parser = argparse.ArgumentParser(prog="python -m megamoe_train.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="debug", help=f"one of: {', '.join(recipes.names())}")
    parser.add_argument("--ranks", type=int, help="ranks of the job (default: those of the recipe's name)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a Megatron argument")
    options = parser.parse_args(argv)
    try:
        ranks = recipes.ranks_of(options.recipe) if options.ranks is None else options.ranks
        recipe = recipes.find(options.recipe, recipes.World(ranks, num_gpus=0))
        from .training import settings

        changed = settings.from_recipe(recipe.settings)
        settings.apply_sets(changed, options.set)
        model = ModelShape.of(changed)
        layout = Layout.of(changed, ranks, model)
    except ValueError as error:
        print(f"megamoe_train: error: {error}", file=sys.stderr)
        return 2
    print(f"{options.recipe} on {ranks} ranks: {total_parameters(model) / 1e9:.2f}B parameters, "
          f"{active_parameters(model) / 1e9:.2f}B active; GiB a rank, by pipeline stage")  # fmt: skip
    print(table(model, layout))
    print(f"usable on an 80 GB H100: {USABLE_BYTES / GIB:.0f} GiB; the largest stage: {describe(model, layout)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
