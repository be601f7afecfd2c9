"""An ordinary Megatron-LM training script, shaped as pretrain_gpt.py is: GPT on mock data through `pretrain()`.

It knows nothing of megamoe_train. The tests run it unchanged, with Megatron's own dispatcher and with ours.
"""

from functools import partial

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args


def train_valid_test_datasets_provider(num_samples, vp_stage=None):
    """The three datasets of mock tokens, built on every rank."""
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split=args.split,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, num_samples, lambda: True, config).build()


def loss_func(loss_mask, output_tensor):
    """Masked sum of token losses, the number of tokens, and what is reported."""
    mask = loss_mask.reshape(-1).float()
    loss = torch.sum(output_tensor.reshape(-1).float() * mask)
    num_tokens = mask.sum().clone().detach().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])}


def forward_step(data_iterator, model):
    """One micro-batch through the model."""
    batch = next(data_iterator)
    mask = batch.get("attention_mask")
    output = model(
        batch["tokens"].cuda(),
        batch["position_ids"].cuda(),
        None if mask is None else mask.cuda(),
        labels=batch["labels"].cuda(),
        loss_mask=batch["loss_mask"].cuda(),
    )
    return output, partial(loss_func, batch["loss_mask"].cuda())


if __name__ == "__main__":
    train_valid_test_datasets_provider.is_distributed = True
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "NullTokenizer"})
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, train_valid_test_datasets_provider, ModelType.encoder_or_decoder, forward_step)
