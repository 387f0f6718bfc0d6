"""Values of annotation files, which anybody may have written: what counts as a number, and how a message shows them."""

from __future__ import annotations

from typing import Any

LARGEST_ID = 2**53  # COCOeval keeps ids in float64 arrays, which do not hold larger integers exactly
MAX_SHOWN = 80  # characters of a value in a message
NOT_COCO = "give an instances file in COCO's format (docs/own-detector.md)"


def shown(value: Any) -> str:
    """A value of the file for a message: short, and on one line."""
    try:
        return repr(value)[:MAX_SHOWN]
    except RecursionError:
        return "a deeply nested value"


def whole(value: Any) -> int | None:
    """The whole number from 0 to 2^53 that an int or a float is (NumPy and pandas write 7.0); None for all else."""
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(number, bool) or not isinstance(number, int):
        return None
    return number if 0 <= number <= LARGEST_ID else None


def is_number(value: Any) -> bool:
    """Whether the value is a number of at most 2^53; Python's JSON reader accepts NaN and Infinity, this does not."""
    return isinstance(value, int | float) and abs(value) <= LARGEST_ID
