"""Whether every number of a page stands in a JSON or CSV file of its run, rounded as the page rounds."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

# A number that stands alone: not part of a name such as AP50, w4a16, val2017, conf/smoke.yaml or a hash.
NUMBER = re.compile(r"(?<![\w./-])[+-]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w/-]|\.\w)")


def numbers_without_source(text: str, root: Path) -> list[str]:
    """Numbers of the page that no file below `root` holds."""
    values, words = numbers_in_files(root)
    lost = []
    for token in NUMBER.findall(text):
        written = token.rstrip(",")
        if written not in words and not any(is_rounded(written, value) for value in values):
            lost.append(written)
    return lost


def numbers_in_files(root: Path) -> tuple[set[float], set[str]]:
    """All numbers of the JSON and CSV files below `root`, and the number words inside their strings."""
    values: set[float] = set()
    words: set[str] = set()

    def take(value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                take(key)
                take(item)
        elif isinstance(value, list):
            for item in value:
                take(item)
        elif isinstance(value, str):
            words.update(NUMBER.findall(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            values.add(float(value))

    for path in root.rglob("*.json"):
        take(json.loads(path.read_text()))
    for path in root.rglob("*.csv"):
        with open(path, newline="") as file:
            values.update(float(cell) for row in csv.DictReader(file) for cell in row.values())
    return values, words


def is_rounded(token: str, value: float) -> bool:
    plain = token.replace(",", "")
    if "e" in plain:
        return float(plain) == value
    digits = len(plain.partition(".")[2])
    return math.isfinite(value) and f"{value:.{digits}f}" == f"{float(plain):.{digits}f}"
