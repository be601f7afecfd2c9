"""DeepSeek-V4-Flash: 284B parameters, 13B active. Published values: see deepseek_v4.py."""

from megamoe_train.recipes import deepseek_v4 as v4
from megamoe_train.recipes import h100
from megamoe_train.recipes.base import Recipe, World

LAYERS = 43
MODEL = {
    "num-layers": LAYERS,
    "hidden-size": 4096,
    "num-experts": 256,
    "moe-ffn-hidden-size": 2048,
    "moe-shared-expert-intermediate-size": 2048,
    "moe-router-topk-scaling-factor": 1.5,
}
TRAINING = v4.training(tokens=32e12, batch=18432, peak=2.7e-4, end=2.7e-5)  # 75.5M tokens a step


def deepseek_v4_flash_pretrain_120gpu_h100_bf16(world: World) -> Recipe:
    """The smallest: 15 pipeline stages of 3 layers, one of 2, EP = 8, every expert on one rank only."""
    return _pretrain("deepseek_v4_flash_pretrain_120gpu_h100_bf16", world, stages=15)


def deepseek_v4_flash_pretrain_256gpu_h100_bf16(world: World) -> Recipe:
    """Comfortable: 8 pipeline stages, EP = 8, every expert on four ranks that share its optimizer state."""
    return _pretrain("deepseek_v4_flash_pretrain_256gpu_h100_bf16", world, stages=8)


def deepseek_v4_flash_proxy_1gpu_h100_bf16(world: World) -> Recipe:
    """3 layers of 32 experts: the rows per expert of the full model's layer at EP = 8."""
    return _proxy("deepseek_v4_flash_proxy_1gpu_h100_bf16", world, layers=3, ranks=1)


def deepseek_v4_flash_proxy_2gpu_h100_bf16(world: World) -> Recipe:
    """3 layers of 64 experts on 2 GPUs, EP = 2."""
    ran = "2x H200 141GB, 200 steps"
    return _proxy("deepseek_v4_flash_proxy_2gpu_h100_bf16", world, layers=3, ranks=2, ran=ran)


def deepseek_v4_flash_proxy_4gpu_h100_bf16(world: World) -> Recipe:
    """3 layers of 128 experts on 4 GPUs, EP = 4."""
    return _proxy("deepseek_v4_flash_proxy_4gpu_h100_bf16", world, layers=3, ranks=4)


def deepseek_v4_flash_proxy_8gpu_h100_bf16(world: World) -> Recipe:
    """3 layers of all 256 experts on 8 GPUs, EP = 8."""
    return _proxy("deepseek_v4_flash_proxy_8gpu_h100_bf16", world, layers=3, ranks=8)


def _pretrain(name: str, world: World, *, stages: int) -> Recipe:
    return Recipe(
        name=name,
        summary=f"DeepSeek-V4-Flash, 284B: 43 layers, 256 experts, top-6; EP 8 x PP {stages} x data parallel",
        settings=h100.settings(
            h100.MODEL,
            v4.MODEL,
            v4.PREDICTION,
            MODEL,
            v4.attention(world, heads=64, q_lora=1024),
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


def _proxy(name: str, world: World, *, layers: int, ranks: int, ran: str = "") -> Recipe:
    """32 experts for each of the `ranks` of its name, and four sequences a step, or the smaller proxies' batch."""
    experts, most = 32 * ranks, max(2, ranks)
    batch = max(v4.PROXY["global-batch-size"], 4 * ranks)
    shape = {"num-layers": layers, "num-experts": experts, "num-attention-heads": 64, "global-batch-size": batch}
    return Recipe(
        name=name,
        summary=f"DeepSeek-V4-Flash's layer at its widths: {layers} layers, {experts} experts, top-6",
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
            h100.parallel(1, layers, expert=min(world.num_ranks, most)),
        ),
        most_ranks=most,
        has_run=ran,
        notes=(*v4.PROXY_NOTES, h100.run_note(ran)),
        stand_ins=v4.stand_ins(world)[:4],
        env=h100.ENV,
        for_h100=True,
    )
