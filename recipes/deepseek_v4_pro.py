"""DeepSeek-V4-Pro: 1.6T parameters, 49B active. Published values: see deepseek_v4.py."""

from megamoe_train.recipes import deepseek_v4 as v4
from megamoe_train.recipes import h100
from megamoe_train.recipes.base import Recipe, World

LAYERS = 61
MODEL = {
    "num-layers": LAYERS,
    "hidden-size": 7168,
    "num-experts": 384,
    "moe-ffn-hidden-size": 3072,
    "moe-shared-expert-intermediate-size": 3072,
    "moe-router-topk-scaling-factor": 2.5,
}
TRAINING = v4.training(tokens=33e12, batch=23040, peak=2.0e-4, end=2.0e-5)  # 94.4M tokens a step


def deepseek_v4_pro_pretrain_1488gpu_h100_bf16(world: World) -> Recipe:
    """The smallest: a layer a stage, EP = 8, every expert on three ranks that share its optimizer state."""
    return _pretrain("deepseek_v4_pro_pretrain_1488gpu_h100_bf16", world, stages=62)


def deepseek_v4_pro_pretrain_1984gpu_h100_bf16(world: World) -> Recipe:
    """Comfortable: a layer a stage, EP = 8, every expert on four ranks that share its optimizer state."""
    return _pretrain("deepseek_v4_pro_pretrain_1984gpu_h100_bf16", world, stages=62)


def deepseek_v4_pro_proxy_1gpu_h100_bf16(world: World) -> Recipe:
    """2 layers of 16 experts."""
    return _proxy("deepseek_v4_pro_proxy_1gpu_h100_bf16", world, layers=2, experts=16, ran="1x H200 141GB, 60 steps")


def deepseek_v4_pro_proxy_2gpu_h100_bf16(world: World) -> Recipe:
    """2 layers of 32 experts on 2 GPUs, EP = 2."""
    return _proxy("deepseek_v4_pro_proxy_2gpu_h100_bf16", world, layers=2, experts=32)


def _pretrain(name: str, world: World, *, stages: int) -> Recipe:
    return Recipe(
        name=name,
        summary=f"DeepSeek-V4-Pro, 1.6T: 61 layers, 384 experts, top-6; EP 8 x PP {stages} x data parallel",
        settings=h100.settings(
            h100.MODEL,
            v4.MODEL,
            v4.PREDICTION,
            MODEL,
            v4.attention(world, heads=128, q_lora=1536),
            h100.RUN,
            TRAINING,
            h100.PRECISION,
            h100.implementation(world),
            h100.parallel(stages, LAYERS, mtp=1),
        ),
        notes=(h100.NEVER_RUN,),
        stand_ins=v4.stand_ins(world),
        env=h100.ENV,
        for_h100=True,
        needs_data=True,
    )


def _proxy(name: str, world: World, *, layers: int, experts: int, ran: str = "") -> Recipe:
    shape = {"num-layers": layers, "num-experts": experts, "num-attention-heads": 128}
    return Recipe(
        name=name,
        summary=f"DeepSeek-V4-Pro's layer at its widths: {layers} layers, {experts} experts, top-6",
        settings=h100.settings(
            h100.MODEL,
            v4.MODEL,
            MODEL,
            h100.RUN,
            v4.PROXY,
            v4.proxy_batch(world),
            shape,
            h100.PRECISION,
            h100.implementation(world),
            h100.parallel(1, layers, expert=min(world.num_ranks, 2)),
        ),
        most_ranks=2,
        has_run=ran,
        notes=(*v4.PROXY_NOTES, h100.run_note(ran)),
        stand_ins=v4.stand_ins(world)[:4],
        env=h100.ENV,
        for_h100=True,
    )
