"""What an ONNX file says of itself. Anybody may have written it: its texts are read under limits and never run."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.core.config import UserError, read_yaml
from app.core.files import printable
from app.core.mounts import only_seen
from app.core.shapes import FileName, Sha256, Shape, misfits

LONGEST_CHARS = 100_000  # of a value: the names of 1,203 classes (LVIS) take 30,000
START: Shape = {"file": FileName, "sha256": Sha256}
N_SHOWN = 60  # characters of a text in a message
UNREADABLE = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)  # all that the two parsers raise


def parse(text: str) -> Any:
    """The value of a text in JSON or as Python prints it: the only reader of foreign metadata.

    Raises:
        UserError: the text is neither, is too long, or is nested too deeply.
    """
    if len(text) > LONGEST_CHARS:
        raise UserError(f"it has {len(text):,} characters, at most {LONGEST_CHARS:,} are read")
    for reader in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings(action="ignore"):  # Python warns of odd literals, and quotes them
                return reader(text)
        except UNREADABLE:
            continue
    raise UserError(f"{shortened(text)} is neither JSON nor a Python value")


def shortened(text: object) -> str:
    """A foreign text for a message: printable, and not longer than a line."""
    shown = printable(str(text)[: N_SHOWN + 1])
    return shown if len(shown) <= N_SHOWN else f"{shown[:N_SHOWN]}..."


def names_of(metadata: Mapping[str, str]) -> list[str] | None:
    """The class names in the order of the classes; None if the metadata have none. Raises a UserError as `as_names`."""
    text = metadata.get("names")
    return None if text is None else as_names(parse(text))


def as_names(value: Any) -> list[str] | None:
    """A list of names, a dict of names by class number, or the text of either -> the list; None for null."""
    if isinstance(value, str):  # str(dict), written as JSON
        value = parse(value)
    if isinstance(value, dict):
        by_number = {str(key): name for key, name in value.items()}
        value = [by_number.get(str(number)) for number in range(len(by_number))]
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{shortened(value)} is no list of class names, and no dict of them by the numbers from 0")
    return list(value)


def read_names(file: Path) -> list[str]:
    """Class names from a file: one a line, a list or dict of them, or a YAML file that has them under `names`.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    is_yaml = file.suffix in (".yaml", ".yml")
    try:
        names = as_names(read_yaml(file).get("names")) if is_yaml else _names_in(_text_of(file))
    except UserError as error:
        raise UserError(f"--names {file}: {error}") from error
    if not names:
        raise UserError(f"--names {file}: no class names in it; write one a line, as in conf/coco.names")
    return names


def _text_of(file: Path) -> str:
    if not file.is_file():
        raise UserError(f"there is no such file{only_seen()}")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"it cannot be read: {error}") from error


def _names_in(text: str) -> list[str] | None:
    if text.lstrip().startswith(("[", "{")):
        return as_names(parse(text))
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line]


def size_of(metadata: Mapping[str, str]) -> tuple[int, int] | None:
    """Height and width in px: '160' in our files, '[160, 160]' in Ultralytics'; None if they are not there or odd."""
    try:
        value = parse(metadata.get("imgsz", "null"))
    except UserError:  # the shape of the input may say it
        return None
    sides = value if isinstance(value, list | tuple) else [value]
    if len(sides) not in (1, 2) or not all(type(side) is int for side in sides):
        return None
    return sides[0], sides[-1]


def start_of(metadata: Mapping[str, str]) -> dict[str, str] | None:
    """File name and sha256 of the checkpoint that the training of a file of ours started from; else None."""
    try:
        facts = parse(metadata.get("start", "null"))
    except UserError:  # of another program
        return None
    return None if misfits(facts, START) else {key: printable(facts[key]) for key in START}
