"""Datasets for Megatron's `pretrain()`: GPTDataset over prepared tokens, and a validation set that stays the same."""

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from megatron.training import get_args, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage


class FixedSamples(torch.utils.data.Dataset):
    """The first `num_samples` of a dataset, over and over.

    Megatron's validation iterator never starts again: each evaluation reads on where the last one stopped. With one
    evaluation's samples repeated, every evaluation sees the same text, so losses of different steps compare.
    """

    split = Split.valid  # Megatron's loader picks its batch size by this

    def __init__(self, dataset: torch.utils.data.Dataset, num_samples: int) -> None:
        self.dataset = dataset
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples << 20  # more evaluations than any run makes

    def __getitem__(self, index: int) -> dict:
        return self.dataset[index % self.num_samples]


def datasets(num_samples, vp_stage=None):
    """Train, validation and (no) test datasets, on the ranks that read data. Megatron calls this."""
    args = get_args()
    wanted = [num_samples[0], args.eval_iters * args.eval_global_batch_size, 0]
    train, valid, _ = BlendedMegatronDatasetBuilder(
        GPTDataset, wanted, lambda: _reads_data(args, vp_stage), _config(args)
    ).build()
    return train, None if valid is None else FixedSamples(valid, wanted[1]), None


datasets.is_distributed = True  # Megatron: call it on every rank, the builder sorts out who does what


def _reads_data(args, vp_stage) -> bool:
    first_or_last = is_first_or_last_pipeline_stage(vp_stage) or bool(args.mtp_num_layers)
    return mpu.get_tensor_model_parallel_rank() == 0 and first_or_last


def _config(args) -> GPTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=None if blend_per_split else args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
    )
