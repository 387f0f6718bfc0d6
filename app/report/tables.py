"""Markdown tables and numbers: how the report writes them."""

from __future__ import annotations

MISSING = "-"


def markdown_table(cells: list[list[str]], text_columns: int = 1) -> list[str]:
    """Aligned, so that it reads well on a terminal too; all but the first columns are right-aligned."""
    rows = [[plain(cell) for cell in row] for row in cells]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * width if i < text_columns else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return [_line(row, widths, text_columns) for row in (rows[0], rule, *rows[1:])]


def _line(row: list[str], widths: list[int], text_columns: int) -> str:
    padded = []
    for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
        padded.append(cell.ljust(width) if i < text_columns else cell.rjust(width))
    return "| " + " | ".join(padded) + " |"


def plain(text: str) -> str:
    """Text that cannot end a table cell or begin a tag."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def number(value: float | None, digits: int = 4) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    return MISSING if value is None else f"{value:+.4f}"
