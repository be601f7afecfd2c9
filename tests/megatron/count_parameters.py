"""Builds pipeline stages of recipes with Megatron's own classes, without memory for their weights, and counts them.

    python -m tests.megatron.count_parameters ANSWERS.json < cases.json

A case is {"settings": {argument: value}, "stages": [numbers]}; its answer {stage: [dense, expert]}. One process plays
one rank of each stage in a group of fake peers.
"""

import json
import os
import sys
from pathlib import Path


def main(answers: Path) -> None:
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megamoe_train.training import request, settings

    def count(table, stage: int) -> tuple[int, int]:
        """Numbers of parameters of the stage's first rank: all but the experts, the experts."""
        from megatron.core import parallel_state as mpu
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
        from megatron.core.transformer.dot_product_attention import DotProductAttention
        from megatron.training.argument_utils import gpt_config_from_args
        from megatron.training.models.gpt import GPTModelBuilder

        pipeline = settings.integer(table, "pipeline-model-parallel-size", 1)
        expert = settings.integer(table, "expert-model-parallel-size", 1)
        ranks = pipeline * expert
        os.environ["WORLD_SIZE"] = str(ranks)
        args = request._parse(dict(table))
        args.perform_initialization = False
        dist.init_process_group("fake", store=FakeStore(), rank=stage * expert, world_size=ranks)
        mpu.initialize_model_parallel(
            expert_model_parallel_size=expert, pipeline_model_parallel_size=pipeline, create_gloo_process_groups=False
        )
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        _accept_latent_widths(DotProductAttention)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        config = gpt_config_from_args(args)
        config.vocab_size = args.vocab_size
        model = GPTModelBuilder(config).build_model(groups)
        parameters = list(model.parameters())
        assert all(p.is_meta for p in parameters if p.numel() > 1 << 22), "large weights are not to be allocated"
        experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        mpu.destroy_model_parallel()
        dist.destroy_process_group()
        return sum(p.numel() for p in parameters) - experts, experts

    found = []
    cases = json.load(sys.stdin)
    from megamoe_train.megatron.install import install

    install(backend="reference")
    torch.cuda.current_device = lambda: torch.device("meta")
    for case in cases:
        table = settings.from_recipe(case["settings"])
        found.append({stage: count(table, stage) for stage in case["stages"]})
    answers.write_text(json.dumps(found))


def _accept_latent_widths(attention: type) -> None:
    """Latent attention needs TransformerEngine's core attention, which has no parameters, as Megatron's has none."""
    original = attention.__init__
    if not hasattr(original, "__wrapped__"):

        def init(self, *args, k_channels=None, v_channels=None, **kwargs):
            original(self, *args, **kwargs)

        init.__wrapped__ = original
        attention.__init__ = init


if __name__ == "__main__":
    main(Path(sys.argv[1]))
