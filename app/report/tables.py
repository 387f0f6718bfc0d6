"""Markdown tables and numbers: how the report writes them."""

from __future__ import annotations

MISSING = "-"


def markdown_table(cells: list[list[str]], text_columns: int = 1) -> list[str]:
    """Aligned, so that it reads well on a terminal too; all but the first columns are right-aligned."""
    cells = [[plain(cell) for cell in row] for row in cells]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(cells[0]))]
    rule = ["-" * width if i < text_columns else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = []
    for row in [cells[0], rule, *cells[1:]]:
        pairs = enumerate(zip(row, widths, strict=True))
        padded = [cell.ljust(width) if i < text_columns else cell.rjust(width) for i, (cell, width) in pairs]
        lines.append("| " + " | ".join(padded) + " |")
    return lines


def plain(text: str) -> str:
    """Text that cannot end a table cell or begin a tag."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def number(value: float | None, digits: int = 4) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    return MISSING if value is None else f"{value:+.4f}"
