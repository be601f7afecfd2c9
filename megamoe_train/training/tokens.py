"""Checks of token files that the user made: a readable index, enough text on both sides of the split, known tokens."""

from argparse import Namespace

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megamoe_train.training.corpus import TokenFiles

_TOKENS_PER_READ = 1 << 24


def check(source: TokenFiles, args: Namespace) -> None:
    """Raises ValueError for a broken index, a .bin shorter than it, too little text, or a token outside vocab-size."""
    try:
        dataset = IndexedDataset(str(source.prefix))
    except Exception as error:  # whatever a file that is no index does to the reader
        raise ValueError(f"data: {source.prefix}.idx cannot be read: {error}") from error
    lengths = dataset.sequence_lengths.astype(np.int64)
    tokens = np.memmap(source.name, dtype=dataset.index.dtype, mode="r")
    if len(tokens) < lengths.sum():
        raise ValueError(f"data: {source.name} has {len(tokens)} tokens of {lengths.sum()} that its index names")
    _check_split(source, lengths, args)
    _check_vocabulary(source, tokens[: lengths.sum()], args)


def _check_split(source: TokenFiles, lengths: np.ndarray, args: Namespace) -> None:
    """Megatron splits by whole documents: both parts must hold a sequence."""
    train, valid, _ = parse_and_normalize_split(args.split)
    ends = [round(share * len(lengths)) for share in (train, train + valid)]
    held = int(lengths[: ends[0]].sum()), int(lengths[ends[0] : ends[1]].sum())
    if min(held) <= args.seq_length:
        raise ValueError(
            f"data: {source.name} ({len(lengths)} documents split {args.split}) gives {held[0]} tokens to train and "
            f"{held[1]} to validate; seq-length {args.seq_length} needs {args.seq_length + 1} of each"
        )


def _check_vocabulary(source: TokenFiles, tokens: np.ndarray, args: Namespace) -> None:
    starts = range(0, len(tokens), _TOKENS_PER_READ)
    largest = max(int(tokens[start : start + _TOKENS_PER_READ].max()) for start in starts)
    if args.vocab_size is not None and largest >= args.vocab_size:
        raise ValueError(
            f"data: {source.name} has token {largest}, outside vocab-size {args.vocab_size}; "
            f"--set vocab-size={largest + 1}"
        )
