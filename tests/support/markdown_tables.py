"""Reads the tables of a Markdown page back, as a Git host cuts them into cells."""

from __future__ import annotations

import re

CELL_BORDER = re.compile(r"(?<!\\)\|")  # a pipe after a backslash is text
Table = list[list[str]]


def tables(text: str) -> list[Table]:
    """Every table of a page: rows of cells, the header first, without the rule below it."""
    blocks = re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE)
    return [[cells(line) for i, line in enumerate(block.splitlines()) if i != 1] for block in blocks]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in CELL_BORDER.split(line.strip())[1:-1]]


def table(text: str, *columns: str) -> dict[str, dict[str, str]]:
    """The first table that has all the columns: first cell of a row -> column -> cell."""
    for header, *rows in tables(text):
        if set(columns) <= set(header):
            return {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    raise AssertionError(f"no table of the page has the columns {columns}")


def row(text: str, first: str, *columns: str) -> list[str]:
    """The cells of one row in the order of `columns`."""
    values = table(text, *columns)[first]
    return [values[column] for column in columns]
