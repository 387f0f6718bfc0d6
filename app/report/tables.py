"""Markdown tables and numbers: how the report writes them."""

from __future__ import annotations

import re

from app.core.files import printable
from app.core.mounts import as_known

ENTITY = re.compile(r"&(?=#?\w+;)")
MISSING = "-"
MIN_WIDTH = 3  # characters of a column: a rule needs as many


def markdown_table(cells: list[list[str]], text_columns: int = 1) -> list[str]:
    """Aligned, so that it reads well on a terminal too; all but the first columns are right-aligned."""
    rows = [list(map(plain, row)) for row in cells]
    widths = [max(MIN_WIDTH, *map(len, column)) for column in zip(*rows, strict=True)]
    is_text = [place < text_columns for place in range(len(widths))]
    # A colon at the end of the rule aligns a column to the right.
    rule = ["-" * (width - 1) + ("-" if text else ":") for width, text in zip(widths, is_text, strict=True)]
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        padded = map(_padded, row, widths, is_text)
        lines.append(f"| {' | '.join(padded)} |")
    return lines


def _padded(cell: str, width: int, is_text: bool) -> str:
    return cell.ljust(width) if is_text else cell.rjust(width)


def plain(text: str) -> str:
    """Text of any origin, with the user's names of paths: it ends no line or table cell, and begins no tag or link."""
    text = ENTITY.sub("&amp;", printable(as_known(text)))
    return text.replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(")


def number(value: float | None, digits: int = 4) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    return MISSING if value is None else f"{value:+.4f}"
