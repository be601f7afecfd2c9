"""Where the compiled CUDA extension lies and what can be said of it without loading it. Standard library only."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
PATTERN = "_C*.so"


def built_files() -> list[Path]:
    """The extension's compiled files in this package: none before a build, one after."""
    return sorted(PACKAGE.glob(PATTERN))


def fused_missing() -> str:
    """Why no fused backend serves CUDA tensors, as a clause. Called only when none is registered."""
    files = built_files()
    if not files:
        return f"the CUDA extension is not built (no {PATTERN} in {PACKAGE})"
    return f"the CUDA extension {files[0].name} does not hold the fused layer"
