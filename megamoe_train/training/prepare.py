"""Text to tokens: a byte-level BPE tokenizer trained on the text, and two Megatron datasets (train, valid).

A prepared folder holds `tokenizer.json`, `train.bin/.idx`, `valid.bin/.idx` and `meta.json`. It appears whole or not
at all: it is written beside its final name and renamed.
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import batched
from pathlib import Path

import numpy as np

from megamoe_train.training.corpus import EmbeddedCorpus, TextFiles

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0  # the first special token; recipes tell Megatron so (null-tokenizer-eod-id)
VALIDATION_EVERY = 20  # the second document of every 20 is held out
_TOKENIZER_CHARACTERS = 64 << 20  # the tokenizer learns from at most this much, from the start of the text
_DOCUMENTS_PER_BATCH = 256
_FORMAT = 1  # raised when prepared folders of an earlier version must not be used


@dataclass(frozen=True)
class Prepared:
    """What a prepared folder holds."""

    folder: str
    source: str
    fingerprint: str
    vocab_size: int  # tokens that exist; at most what was asked for
    train_tokens: int
    valid_tokens: int
    documents: int

    @property
    def train_prefix(self) -> str:
        return f"{self.folder}/train"

    @property
    def valid_prefix(self) -> str:
        return f"{self.folder}/valid"


def folder_for(source: EmbeddedCorpus | TextFiles, vocab_size: int, cache: Path) -> Path:
    """Where `source`, tokenized with a vocabulary of `vocab_size`, lies or will lie. Reads nothing but file sizes."""
    return cache / f"{source.fingerprint()}-{vocab_size}-v{_FORMAT}"


def is_ready(folder: Path) -> bool:
    """Whether a prepared folder is there, which then is whole."""
    return (folder / "meta.json").exists()


def prepare(
    source: EmbeddedCorpus | TextFiles, vocab_size: int, cache: Path, least: int, say: Callable[[str], None]
) -> Prepared:
    """Tokenize `source` unless that is done. Any number of processes may call it; one works, the others wait.

    `least` is how many tokens training and validation each need. Raises ValueError where the text is shorter, and for
    a document that cannot be read.
    """
    folder = folder_for(source, vocab_size, cache)
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / "lock"):
        if not is_ready(folder):
            _write(source, vocab_size, folder, least, say)
        prepared = Prepared(**{**json.loads((folder / "meta.json").read_text()), "folder": str(folder)})
    _check_length(prepared.source, {"train": prepared.train_tokens, "valid": prepared.valid_tokens}, least)
    return prepared


def _write(source, vocab_size: int, folder: Path, least: int, say) -> None:
    partial = folder.parent / "partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed; the lock says nobody works there now
    partial.mkdir()
    try:
        say(f"tokenizer: learning {vocab_size} tokens from {source.name}")
        tokenizer = train_tokenizer(source, vocab_size)
        tokenizer.save(str(partial / "tokenizer.json"))
        say("data: tokenizing")
        counts, documents = _write_datasets(source, tokenizer, vocab_size, partial)
        _check_length(source.name, counts, least)
        meta = Prepared(
            folder="",
            source=source.name,
            fingerprint=source.fingerprint(),
            vocab_size=tokenizer.get_vocab_size(),
            train_tokens=counts["train"],
            valid_tokens=counts["valid"],
            documents=documents,
        )
        (partial / "meta.json").write_text(json.dumps(asdict(meta), indent=1))
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_length(name: str, counts: dict[str, int], least: int) -> None:
    if min(counts.values()) < least:
        raise ValueError(
            f"data: {name} gives {counts['train']} tokens to train and {counts['valid']} to validate (every "
            f"{VALIDATION_EVERY}th document); seq-length {least - 1} needs {least} of each"
        )


def train_tokenizer(source: EmbeddedCorpus | TextFiles, vocab_size: int):
    """A byte-level BPE tokenizer (any text can be encoded, and decodes to itself) of at most `vocab_size` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(f"vocab-size: {vocab_size} is below {len(alphabet) + 1}, one for each byte and an end mark")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_sample(source.documents()), trainer)
    assert tokenizer.token_to_id(END_OF_TEXT) == END_OF_TEXT_ID
    return tokenizer


def _sample(documents: Iterator[str]) -> Iterator[str]:
    """The first `_TOKENIZER_CHARACTERS` of text."""
    seen = 0
    for document in documents:
        yield document
        seen += len(document)
        if seen > _TOKENIZER_CHARACTERS:
            return


def _write_datasets(source, tokenizer, vocab_size: int, folder: Path) -> tuple[dict[str, int], int]:
    """Writes train and valid; returns their token counts, and the number of documents."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path

    dtype = DType.optimal_dtype(vocab_size)
    prefixes = {split: str(folder / split) for split in ("train", "valid")}
    builders = {split: IndexedDatasetBuilder(get_bin_path(prefix), dtype) for split, prefix in prefixes.items()}
    counts, documents = dict.fromkeys(prefixes, 0), 0
    for batch in batched(source.documents(), _DOCUMENTS_PER_BATCH):
        for encoding in tokenizer.encode_batch(list(batch)):
            split = "valid" if documents % VALIDATION_EVERY == 1 else "train"
            tokens = np.array([*encoding.ids, END_OF_TEXT_ID], dtype=dtype)
            builders[split].add_document(tokens, [len(tokens)])
            counts[split] += len(tokens)
            documents += 1
    for split, builder in builders.items():
        builder.finalize(get_idx_path(prefixes[split]))
    return counts, documents


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
