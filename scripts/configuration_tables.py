"""Writes the tables of docs/configuration.md from megamoe_train/config.py. `--check` only says whether they match."""

from __future__ import annotations

import ast
import re
import sys

import toolchain
from megamoe_train.config import ENVIRONMENT

PAGE = toolchain.ROOT / "docs" / "configuration.md"
SOURCE = toolchain.ROOT / "megamoe_train" / "config.py"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def environment_table() -> str:
    rows = [(f"`{name}`", _default(row.default), row.meaning) for name, row in ENVIRONMENT.items()]
    return table(("variable", "default", "meaning"), rows)


def _default(text: str) -> str:
    return f"`{text}`" if text else "empty"


def field_table() -> str:
    """Fields of MegaMoEConfig: the meaning is the comment at the end of each field's line."""
    source = SOURCE.read_text()
    lines = source.splitlines()
    (body,) = (node.body for node in ast.parse(source).body if getattr(node, "name", "") == "MegaMoEConfig")
    rows = []
    for field in body:
        if isinstance(field, ast.AnnAssign):
            default = f"`{ast.unparse(field.value)}`" if field.value else "required"
            meaning = lines[field.end_lineno - 1].partition("  # ")[2]
            rows.append((f"`{field.target.id}`", f"`{ast.unparse(field.annotation)}`", default, meaning))
    return table(("field", "type", "default", "meaning"), rows)


def rendered(page: str) -> str:
    """The page with what stands between each pair of markers replaced by the table of that name."""
    tables = {"environment": environment_table(), "fields": field_table()}
    for name, text in tables.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        page, found = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.DOTALL)  # noqa: B023
        assert found == 1, f"{PAGE}: {found} places for the table {name!r}, 1 expected"
    return page


def main() -> None:
    page = PAGE.read_text()
    wanted = rendered(page)
    if "--check" in sys.argv[1:]:
        sys.exit(0 if page == wanted else f"{PAGE.name} does not match {SOURCE.name}: run `make docs`")
    PAGE.write_text(wanted)


if __name__ == "__main__":
    main()
