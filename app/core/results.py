"""results.csv: the rows of a training, one an epoch, and the names of its columns."""

from __future__ import annotations

import csv
import io
from itertools import chain
from pathlib import Path

from app.core.files import write_text

Row = dict[str, float]
Rows = list[Row]

STATES = ("raw", "ema", "ema_bn")  # validated weights: as trained, their EMA, the EMA with BatchNorm re-estimated
SCORED = "ema_bn"  # the state that picks best.pt and is exported
AP, AP50, VAL_LOSS = "AP", "AP50", "val_loss"  # numbers of every validated state, see `column`
AP_FREQUENT = "AP_frequent"  # mean AP of the classes with FREQUENT_BOXES val objects or more; absent if none has
FREQUENT_BOXES = 100
AP_COMMONEST = "AP_commonest"  # AP of the class with the most val objects (COCO: person); absent as AP_FREQUENT is
CORRECTED_AP = "AP/corrected"  # in the last row, after quant.correction_epochs
TRAIN_LOSS = "train/"  # beginning of the columns that hold the loss terms of an epoch
WARM_UP = "quant/warm_up"  # 1 in the validated epochs of a quant warm-up, else empty


def column(number: str, state: str) -> str:
    """Column of a number (AP, AP50, AP_FREQUENT, AP_COMMONEST, VAL_LOSS) of a validated state: AP/ema_bn."""
    return f"{number}/{state}"


SCORED_AP = column(AP, SCORED)


def write_rows(path: Path, rows: Rows) -> None:
    """Rows as CSV, atomically; a cell stays empty where a row lacks the key (an epoch that was not validated)."""
    longest_first = sorted(rows, key=len, reverse=True)
    names = dict.fromkeys(chain.from_iterable(longest_first))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_rows(path: Path) -> Rows:
    """What `write_rows` wrote, without the empty cells."""
    rows = []
    with open(path, encoding="utf-8", newline="") as file:
        for cells in csv.DictReader(file):
            rows.append({name: float(cell) for name, cell in cells.items() if cell})
    return rows


def is_validated(row: Row) -> bool:
    return SCORED_AP in row


def candidates(rows: Rows) -> Rows:
    """Validated epochs that may become best.pt: all but those of a quant warm-up, whose weights have other bits."""
    return [row for row in rows if is_validated(row) and not row.get(WARM_UP)]


def train_loss(row: Row) -> float:
    """Sum of the running means of an epoch's loss terms."""
    terms = [value for name, value in row.items() if name.startswith(TRAIN_LOSS)]
    return sum(terms)


def loss_curve(rows: Rows) -> Rows:
    """The columns of losses and APs alone, for loss_curve.csv."""
    beginnings = ("epoch", TRAIN_LOSS, "val/", f"{VAL_LOSS}/", f"{AP}/", f"{AP50}/", f"{AP_FREQUENT}/", WARM_UP)
    curve = []
    for row in rows:
        curve.append({name: value for name, value in row.items() if name.startswith(beginnings)})
    return curve
