"""Checks of single values of the configuration, where their type does not say all."""

from __future__ import annotations

import re
from typing import Any

DEVICES = re.compile(r"auto|cpu(,cpu)*|[0-9]{1,4}(,[0-9]{1,4})*")
MODELS = tuple(f"yolov10{size}.yaml" for size in "nsmblx")


class IsPath:
    """Marks a field whose value is a path: --set takes its text as it is, whatever YAML would make of it."""


def path(value: Any) -> Any:
    if isinstance(value, str) and (not value or "\0" in value):
        raise ValueError("give the path of a folder")
    return value


def path_or_none(value: Any) -> Any:
    """The word null means no file, from --set too."""
    return None if value == "null" else path(value)


def device(value: Any) -> str:
    """train.device as text; YAML reads 0 as a number."""
    if not DEVICES.fullmatch(str(value)):
        raise ValueError("choose auto, cpu, or the numbers of GPUs such as 0 or 0,1")
    return str(value)


def model(value: Any) -> str:
    if value not in MODELS:
        raise ValueError(f"choose one of {', '.join(MODELS)}")
    return value
