"""Keeps the figures of a page instead of drawing them, so that a test reads numbers back from their artists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D

FILE_NAME = re.compile(r"[\w-]+\.(?:png|jpg)")


@contextmanager
def kept_figures() -> Iterator[dict[str, Figure]]:
    """File name -> figure, for all that is saved inside the block; the files themselves stay empty."""
    figures: dict[str, Figure] = {}

    def keep(figure: Figure, path: Path, **_: Any) -> None:
        name = FILE_NAME.search(path.name)
        assert name, path
        figures[name[0]] = figure
        path.write_bytes(b"")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        yield figures


def colour_names(legend: Legend | None) -> dict[str, str]:
    """Colour -> name, of the lines in a legend."""
    return {to_hex(line.get_color()): str(line.get_label()) for line in legend_lines(legend)}


def style_names(legend: Legend | None, colour: str) -> dict[str, str]:
    """Line style -> name, of the lines of one colour in a legend."""
    lines = [line for line in legend_lines(legend) if to_hex(line.get_color()) == colour]
    return {str(line.get_linestyle()): str(line.get_label()) for line in lines}


def legend_lines(legend: Legend | None) -> list[Line2D]:
    """The lines that a legend shows; those that only fill a column are transparent."""
    assert legend is not None
    return [handle for handle in legend.legend_handles if isinstance(handle, Line2D) and handle.get_alpha() != 0]


def curves_of(axes: Axes, colours: dict[str, str], styles: dict[str, str]) -> dict[tuple[str, str], list[float]]:
    """(variant, kind of line) -> its y-data, told by colour and style as a reader tells them."""
    pairs = [(to_hex(line.get_color()), str(line.get_linestyle()), line) for line in axes.lines]
    return {(colours[hue], styles[kind]): y_of(line) for hue, kind, line in pairs if hue in colours and kind in styles}


def x_of(line: Line2D) -> list[float]:
    return np.asarray(line.get_xdata()).tolist()


def y_of(line: Line2D) -> list[float]:
    return np.asarray(line.get_ydata()).tolist()
