"""Where training text comes from: the user's files, or text that every Python carries. No torch, no Megatron.

A document is a string. Sources are read as streams, so a file may be larger than memory.
"""

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

BLOCK_CHARACTERS = 2048  # a .txt file becomes documents of whole paragraphs, at least this long
_MIN_CORPUS_BYTES = 1 << 20
# Installed packages and tests differ from machine to machine; tables of numbers are no text, and a step on one of them
# sends the gradient norm from 1 to 90.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "ensurepip", "__pycache__"}
_TABLES = {"encodings", "stringprep.py", "entities.py", "topics.py"}  # topics are read as topics, not as source


class EmbeddedCorpus:
    """Python's documentation topics and the sources of its library, as installed on this machine."""

    name = "Python's documentation topics and library sources"

    def documents(self) -> Iterator[str]:
        """Yields every topic and every source file, in the order of their names."""
        yield from _topics()
        for path in _library_files():
            yield path.read_text(encoding="utf-8", errors="replace")

    def fingerprint(self) -> str:
        """Changes when the text changes (another Python release)."""
        sizes = [f"{path.name} {path.stat().st_size}" for path in _library_files()]
        return _digest(sizes + [str(len(topic)) for topic in _topics()])

    def check(self) -> None:
        """Raises ValueError where Python was installed without its library sources."""
        size = sum(path.stat().st_size for path in _library_files())
        if size < _MIN_CORPUS_BYTES:
            raise ValueError(
                f"data: this Python carries only {size} bytes of library sources in {sysconfig.get_paths()['stdlib']}; "
                "give text with --data FILE"
            )


class TextFiles:
    """The user's .txt and .jsonl files."""

    def __init__(self, paths: list[Path], text_key: str = "text") -> None:
        self.paths = paths
        self.text_key = text_key
        self.name = ", ".join(str(path) for path in paths)

    def documents(self) -> Iterator[str]:
        """Yields paragraphs of .txt files joined to blocks, and the texts of .jsonl lines. Raises ValueError."""
        for path in self.paths:
            yield from _jsonl_documents(path, self.text_key) if path.suffix == ".jsonl" else _text_blocks(path)

    def fingerprint(self) -> str:
        """Changes when a file is replaced, grows, or is written again."""
        return _digest([*_stats(self.paths), self.text_key])

    def check(self) -> None:
        """Raises ValueError for a file that is empty or unreadable, or whose first line is no document."""
        for path in self.paths:
            try:
                with path.open("rb") as file:
                    if not file.read(1 << 16).strip():
                        raise ValueError(f"data: {path} is empty")
            except OSError as error:
                raise ValueError(f"data: {path} cannot be read ({error.strerror})") from error
            if path.suffix == ".jsonl":
                next(_jsonl_documents(path, self.text_key))


class TokenFiles:
    """A Megatron dataset prefix: PREFIX.bin and PREFIX.idx, tokens already. Nothing is prepared."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.name = f"{prefix}.bin"

    def fingerprint(self) -> str:
        """Changes when the files are replaced, grow, or are written again."""
        return _digest(_stats([Path(f"{self.prefix}.bin"), Path(f"{self.prefix}.idx")]))

    def check(self) -> None:
        """Presence and size were checked when the prefix was found; the rest needs Megatron's reader."""


Source = EmbeddedCorpus | TextFiles | TokenFiles


def find_source(paths: list[str], text_key: str = "text") -> Source:
    """The source that `--data PATH ...` names; no path means the embedded corpus. Raises ValueError."""
    if not paths:
        return EmbeddedCorpus()
    prefixes = [prefix for path in paths if (prefix := _token_prefix(path))]
    if prefixes:
        if len(paths) > 1:
            raise ValueError("data: a Megatron .bin/.idx prefix is given alone; blends go through -- --data-path ...")
        return TokenFiles(prefixes[0])
    return TextFiles([file for path in paths for file in _text_files(Path(path))], text_key)


def _token_prefix(path: str) -> Path | None:
    """The prefix where `path` is PREFIX, PREFIX.bin or PREFIX.idx of a Megatron dataset."""
    prefix = Path(path.removesuffix(".bin").removesuffix(".idx"))
    halves = [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")]
    present = [half.is_file() for half in halves]
    if not any(present) or Path(path).is_dir():
        return None
    if not all(present):
        raise ValueError(f"data: {halves[present.index(False)]} is missing beside {halves[present.index(True)]}")
    if halves[0].stat().st_size == 0:
        raise ValueError(f"data: {halves[0]} is empty")
    return prefix


def _text_files(path: Path) -> list[Path]:
    """`path` itself, or the text files of a directory in the order of their names."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".jsonl") and file.is_file())
        if not files:
            raise ValueError(f"data: {path} is a directory without .txt or .jsonl files")
        return files
    if not path.exists():
        raise ValueError(f"data: {path} does not exist")
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"data: {path} is neither .txt, .jsonl, a directory of these, nor a Megatron .bin/.idx prefix")
    return [path]


def _text_blocks(path: Path) -> Iterator[str]:
    """Whole lines joined until a block is long enough; a block ends at an empty line where one comes in time."""
    block: list[str] = []
    length = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            block.append(line)
            length += len(line)
            at_paragraph = not line.strip()
            if length >= 2 * BLOCK_CHARACTERS or (length >= BLOCK_CHARACTERS and at_paragraph):
                yield "".join(block)
                block, length = [], 0
    if "".join(block).strip():
        yield "".join(block)


def _jsonl_documents(path: Path, text_key: str) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"data: {path} line {number} is not JSON ({error.msg})") from error
            if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
                keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                has = f"it has: {keys}; --text-key names another"
                raise ValueError(f"data: {path} line {number} has no string {text_key!r} ({has})")
            yield record[text_key]


def _topics() -> list[str]:
    from pydoc_data import topics

    return [text for _, text in sorted(topics.topics.items())]


def _library_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = [path for path in files if not (_SKIPPED | _TABLES).intersection(path.parts)]
    return [root / path for path in sorted(kept)]


def _stats(paths: list[Path]) -> list[str]:
    stats = [(path.resolve(), path.stat()) for path in paths]
    return [f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats]


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
