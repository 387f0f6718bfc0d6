"""results.csv: the rows of a training, one an epoch."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from app.core.files import write_text

Rows = list[dict[str, float]]
WARM_UP = "quant/warm_up"  # column of results.csv: 1 in the validated epochs of a quant warm-up, else empty


def write_rows(path: Path, rows: Rows) -> None:
    """Rows as CSV, atomically; a cell stays empty where a row lacks the key (an epoch that was not validated)."""
    text = io.StringIO()
    names = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    writer = csv.DictWriter(text, fieldnames=list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_rows(path: Path) -> Rows:
    with open(path, encoding="utf-8", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def candidates(rows: Rows) -> Rows:
    """Validated epochs whose scored state is what the training is for: those of a quant warm-up have other bits."""
    return [row for row in rows if "AP/ema_bn" in row and not row.get(WARM_UP)]


def train_loss(row: dict[str, float]) -> float:
    """Sum of the running means of an epoch's loss terms."""
    return sum(value for name, value in row.items() if name.startswith("train/"))
