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
    widths = column_widths(rows)
    lines = [_line(row, widths, text_columns) for row in rows]
    return [lines[0], _rule(widths, text_columns), *lines[1:]]


def column_widths(rows: list[list[str]]) -> list[int]:
    """Characters of the longest cell of each column."""
    widths = []
    for column in zip(*rows, strict=True):
        longest = max(map(len, column))
        widths.append(max(MIN_WIDTH, longest))
    return widths


def _line(row: list[str], widths: list[int], text_columns: int) -> str:
    padded = []
    for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
        padded.append(cell.ljust(width) if i < text_columns else cell.rjust(width))
    return _joined(padded)


def _rule(widths: list[int], text_columns: int) -> str:
    """The line below the header; a colon at its end aligns a column to the right."""
    dashes = []
    for i, width in enumerate(widths):
        end = "-" if i < text_columns else ":"
        dashes.append("-" * (width - 1) + end)
    return _joined(dashes)


def _joined(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def plain(text: str) -> str:
    """Text of any origin, with the user's names of paths: it ends no line or table cell, and begins no tag or link."""
    text = ENTITY.sub("&amp;", printable(as_known(text)))
    return text.replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(")


def number(value: float | None, digits: int = 4) -> str:
    if value is None:
        return MISSING
    return f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:+.4f}"
