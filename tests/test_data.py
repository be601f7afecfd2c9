"""Text sources, the tokenizer, and the token files they become."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from tokenizers import Tokenizer

from megamoe_train.training import corpus, prepare

VOCABULARY = 320


def quiet(text: str) -> None:
    """For callers that want no progress."""


def read(prefix: str, tokenizer: Tokenizer) -> list[str]:
    """Documents of a Megatron dataset as text; every one must end with the end mark, and have no other."""
    dataset = IndexedDataset(prefix)
    documents = [dataset[index] for index in range(len(dataset))]
    assert all((tokens == prepare.END_OF_TEXT_ID).nonzero()[0].tolist() == [len(tokens) - 1] for tokens in documents)
    return [tokenizer.decode(tokens[:-1]) for tokens in documents]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    odd = ["", "x", "Grüße, 世界 🙂\t\u200b", "<|endof", "\r\n\n  def f():\n\treturn 0\n"]
    return [f"document {number}: {odd[number % 5]} {'word ' * number}" for number in range(90)]


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory, texts) -> Path:
    path = tmp_path_factory.mktemp("text") / "some.jsonl"
    path.write_text("\n\n".join(json.dumps({"id": 1, "text": text}) for text in texts) + "\n")
    return path


def test_every_document_comes_back_from_the_token_files(jsonl, texts, tmp_path):
    source = corpus.find_source([str(jsonl)])
    source.check()
    prepared = prepare.prepare(source, VOCABULARY, tmp_path, 10, quiet)
    tokenizer = Tokenizer.from_file(f"{prepared.folder}/tokenizer.json")
    assert prepared.vocab_size == VOCABULARY
    held_out = texts[1::20]
    assert read(prepared.valid_prefix, tokenizer) == held_out
    assert read(prepared.train_prefix, tokenizer) == [text for text in texts if text not in held_out]
    assert prepared.documents == len(texts)
    datasets = [IndexedDataset(prefix) for prefix in (prepared.train_prefix, prepared.valid_prefix)]
    counts = [int(dataset.sequence_lengths.sum()) for dataset in datasets]  # the view dies with its dataset
    assert counts == [prepared.train_tokens, prepared.valid_tokens]


def test_prepared_once_and_again_when_the_text_changes(jsonl, tmp_path):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(jsonl.read_bytes())
    cache = tmp_path / "cache"
    said: list[str] = []
    first = prepare.prepare(corpus.find_source([str(copy)]), VOCABULARY, cache, 10, said.append)
    assert said
    said.clear()
    assert prepare.prepare(corpus.find_source([str(copy)]), VOCABULARY, cache, 10, said.append) == first
    assert said == []
    with copy.open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    second = prepare.prepare(corpus.find_source([str(copy)]), VOCABULARY, cache, 10, said.append)
    assert second.documents == first.documents + 1
    assert second.folder != first.folder
    other = prepare.prepare(corpus.find_source([str(copy)]), VOCABULARY - 1, cache, 10, said.append)
    assert len({first.folder, second.folder, other.folder}) == 3


PREPARE = """
import sys
from pathlib import Path
from megamoe_train.training import corpus, prepare
print(prepare.prepare(corpus.find_source([sys.argv[1]]), int(sys.argv[2]), Path(sys.argv[3]), 10, print).folder)
"""


def test_processes_that_come_together_prepare_once_with_the_same_bits(jsonl, tmp_path):
    """Two into one folder (one works, one waits); this process into another: no order of events changes a token."""
    (tmp_path / "a" / "partial").mkdir(parents=True)
    (tmp_path / "a" / "partial" / "train.bin").write_text("left by a process that was killed")
    command = [sys.executable, "-W", "ignore", "-c", PREPARE, str(jsonl), str(VOCABULARY), str(tmp_path / "a")]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    running = [subprocess.Popen(command, **options) for _ in range(2)]
    alone = Path(prepare.prepare(corpus.find_source([str(jsonl)]), VOCABULARY, tmp_path / "b", 10, quiet).folder)
    said = [process.communicate(timeout=250)[0].splitlines() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sorted(len(lines) for lines in said) == [1, 3]  # the folder; and, from the one that worked, two lines
    folders = [Path(lines[-1]) for lines in said]
    assert folders[0] == folders[1]
    for name in ("train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer.json"):
        assert (folders[0] / name).read_bytes() == (alone / name).read_bytes(), name
    assert not (tmp_path / "a" / "partial").exists()


def test_too_little_text_leaves_nothing(tmp_path):
    path = tmp_path / "short.jsonl"
    path.write_text("\n".join(json.dumps({"text": "a few words"}) for _ in range(3)))
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=r"tokens to train and \d+ to validate .* seq-length 64 needs 65 of each"):
        prepare.prepare(corpus.find_source([str(path)]), VOCABULARY, cache, 65, quiet)
    assert [file.name for file in cache.iterdir()] == ["lock"]


def test_vocabulary_below_the_bytes_is_refused(jsonl):
    with pytest.raises(ValueError, match="vocab-size: 256 is below 257"):
        prepare.train_tokenizer(corpus.find_source([str(jsonl)]), 256)


def test_text_file_becomes_blocks_that_join_to_the_file(tmp_path):
    paragraph = "A line of a paragraph, as long as lines are.\n" * 9 + "\n"
    text = paragraph * 30 + "no newline at the end, and " + "very long lines " * 1000 + "\n" + "last"
    path = tmp_path / "book.txt"
    path.write_text(text)
    blocks = list(corpus.find_source([str(path)]).documents())
    assert "".join(blocks) == text
    assert all(len(block) >= corpus.BLOCK_CHARACTERS for block in blocks[:-1])
    inside = [block for block in blocks if block.startswith("A line") and "very long" not in block]
    assert len(inside) >= 5
    assert all(block.endswith("\n\n") for block in inside)


def test_folder_and_several_files_keep_their_order(tmp_path):
    for name, text in (("b.txt", "bbb"), ("a.jsonl", '{"text": "aaa"}\n'), ("c/d.txt", "ddd"), ("e.md", "eee")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(corpus.find_source([str(tmp_path)]).documents()) == ["aaa", "bbb", "ddd"]
    two = [str(tmp_path / "c" / "d.txt"), str(tmp_path / "a.jsonl")]
    assert list(corpus.find_source(two).documents()) == ["ddd", "aaa"]


def test_other_text_key(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "yes", "text": "no"}\n')
    assert list(corpus.find_source([str(path)], text_key="body").documents()) == ["yes"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "absent.txt does not exist"),
        ("empty.txt", "", "empty.txt is empty"),
        ("blank.txt", " \n\n", "blank.txt is empty"),
        ("empty.jsonl", "\n", "empty.jsonl is empty"),
        ("bad.jsonl", '{"text": "a"', "bad.jsonl line 1 is not JSON"),
        ("list.jsonl", "[1]", r"list.jsonl line 1 has no string 'text' \(it has: list"),
        (
            "key.jsonl",
            '{"body": "a", "id": 3}',
            r"key.jsonl line 1 has no string 'text' \(it has: body, id; --text-key",
        ),
        ("table.csv", "a,b", "table.csv is neither .txt, .jsonl"),
        ("half.bin", "abc", "half.idx is missing beside"),
    ],
)
def test_files_that_are_no_text(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        corpus.find_source([str(path)]).check()


def test_bad_line_far_inside_is_named(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text('{"text": "fine"}\n' * 999 + '{"text": 5}\n')
    source = corpus.find_source([str(path)])
    source.check()
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=r"long.jsonl line 1000 has no string 'text'"):
        prepare.prepare(source, VOCABULARY, cache, 10, quiet)
    assert [file.name for file in cache.iterdir()] == ["lock"]


def test_file_without_permission(tmp_path, monkeypatch):
    path = tmp_path / "secret.txt"
    path.write_text("text")

    def refuse(self, *args, **kwargs):  # root, who runs some test machines, may read every file
        raise PermissionError(13, "Permission denied")

    source = corpus.find_source([str(path)])
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"secret.txt cannot be read \(Permission denied\)"):
        source.check()


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=r"is a directory without .txt or .jsonl files"):
        corpus.find_source([str(tmp_path)])


def test_megatron_prefix_in_three_spellings(tmp_path):
    prefix = tmp_path / "tokens"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
    builder.add_document(np.arange(9, dtype=np.uint16), [9])
    builder.finalize(f"{prefix}.idx")
    for spelling in (prefix, f"{prefix}.bin", f"{prefix}.idx"):
        source = corpus.find_source([str(spelling)])
        assert isinstance(source, corpus.TokenFiles)
        assert source.prefix == prefix
    with pytest.raises(ValueError, match="prefix is given alone"):
        corpus.find_source([str(prefix), str(prefix)])
    (tmp_path / "tokens.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tokens.bin is empty"):
        corpus.find_source([str(prefix)])


def test_embedded_corpus_is_this_pythons_own_text():
    source = corpus.find_source([])
    source.check()
    documents = list(islice(source.documents(), 200))
    assert sum(map(len, documents)) > 1 << 20
    assert any("The Zen of Python" in text or "assert" in text for text in documents[:80])  # topics come first
    assert any("import" in text and "def " in text for text in documents[80:])
    assert source.fingerprint() == corpus.EmbeddedCorpus().fingerprint()


def test_validation_samples_stay_the_same():
    from megamoe_train.training.data import FixedSamples

    fixed = FixedSamples(list("abcdefgh"), 3)
    assert [fixed[index] for index in range(9)] == list("abcabcabc")
    assert len(fixed) > 3 * 100_000 and len(fixed) % 3 == 0
