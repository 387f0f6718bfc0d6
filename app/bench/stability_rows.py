"""What the trainings of the stability bench gave, a row each: from their folders, or from what earlier calls wrote."""

from __future__ import annotations

import json
from bisect import bisect_right
from pathlib import Path
from typing import Any, cast

from app.core.config import Config, Quant, UserError, load, read_yaml
from app.core.differences import WITHOUT_EFFECT, difference, flatten, shown
from app.core.files import read_json, write_text
from app.core.results import (
    AP,
    AP_COMMONEST,
    AP_FREQUENT,
    CORRECTED_AP,
    SCORED,
    STATES,
    VAL_LOSS,
    Rows,
    candidates,
    column,
    read_rows,
    train_loss,
)
from app.core.scheme import SCHEME, Scheme, find_scheme

Row = dict[str, Any]
BASE = "fp16"  # the arm that the others are compared with; names of other float arms begin with it
LOW_RATE = ", lrf 0.01"  # end of the names of the arms that have their own FP16
FILE_KEYS = {"config", "arms", "rows"}  # of a bench-stability.json
OWN_KEYS = (*WITHOUT_EFFECT, "data.coco_dir", "train.seed")  # may differ between rows of one table
LOSS_DIGITS = 5
OF_CLASSES = (AP_FREQUENT, AP_COMMONEST)  # curves that a row holds as null where no class has enough val objects
CURVES = ("epoch", *OF_CLASSES, "train_loss", "val_loss")  # of the scored state, beside AP, which has three states


def read_arm(arm: str, seed: int, config: Config, out_dir: Path) -> Row | None:
    """The curves of one training so far, [validations] each, and where it last ran.

    Args:
        arm, seed: of the training.
        config: that it should have been trained with.
        out_dir: folder of its variant.

    Returns:
        the row; None before a validation that counts.

    Raises:
        UserError: the folder holds a training of another configuration.
    """
    results_csv = out_dir / "results.csv"
    validated = candidates(read_rows(results_csv)) if results_csv.exists() else []
    if not validated:
        return None
    ignore = (*WITHOUT_EFFECT, "data.coco_dir", "quant.warmup_from")  # folders may have moved
    if differences := difference(read_yaml(out_dir / "config.yaml"), config, ignore=ignore):
        raise UserError(f"{out_dir} was trained with another configuration ({shown(differences)}): take another --run")
    env = read_json(out_dir / "env.json", "bench")
    gpus = env["gpus"] or ["none"]
    return {
        "arm": arm,
        "seed": seed,
        "scheme_sha256": config.quant.scheme.sha256 if config.quant else None,
        **curves(validated),
        "gpu": gpus[0].split(",")[0],
        "torch": env["packages"]["torch"],
        "code_version": env["code_version"],
    }


def curves(validated: Rows) -> Row:
    """What a row holds of the validated epochs of results.csv; OF_CLASSES are those of the scored state."""
    aps: dict[str, list[float]] = {state: [] for state in STATES}
    epochs, train_losses, val_losses = [], [], []
    for row in validated:
        epochs.append(int(row["epoch"]))
        train_losses.append(round(train_loss(row), LOSS_DIGITS))
        val_losses.append(round(row[column(VAL_LOSS, SCORED)], LOSS_DIGITS))
        for state in STATES:
            aps[state].append(row[column(AP, state)])
    return {
        "epoch": epochs,
        "AP": aps,
        **curves_of_classes(validated),
        "train_loss": train_losses,
        "val_loss": val_losses,
        "corrected": validated[-1].get(CORRECTED_AP),
    }


def curves_of_classes(validated: Rows) -> Row:
    """OF_CLASSES of the validated epochs: null where none of them has the number, and without those numbers that only
    some of them have, because the training began before there was the column."""
    found: Row = {}
    for name in OF_CLASSES:
        values = [row[column(name, SCORED)] for row in validated if column(name, SCORED) in row]
        if len(values) in (0, len(validated)):
            found[name] = values or None
    return found


def recipe(base: Config, arms: dict[str, list[str]]) -> dict[str, Any]:
    """What the rows of one table share: the configuration `base` of a qat variant, which the arms start from, the
    settings that each arm adds, and the hash of the scheme of each quantized arm."""
    shared = {}
    for key, value in flatten(base).items():
        section = key.split(".")[0]
        if key not in OWN_KEYS and section not in OWN_KEYS:
            shared[key] = value
    schemes = {arm: scheme_of(base, settings).sha256 for arm, settings in arms.items() if not arm.startswith(BASE)}
    return {"config": shared, "arms": arms, "schemes": schemes}


def scheme_of(base: Config, settings: list[str]) -> Scheme:
    """The scheme of an arm that adds these settings to `base`."""
    beginning = f"{SCHEME}="
    named = [item.removeprefix(beginning) for item in settings if item.startswith(beginning)]
    return find_scheme(named[-1]) if named else cast(Quant, base.quant).scheme


def read_file(path: Path, expected: dict[str, Any]) -> list[Row]:
    """The rows of a file that `write_file` wrote.

    Raises:
        UserError: the file is missing or of something else, or its trainings have another recipe than `expected`.
    """
    other = read_json(path, "bench ARGS=stability")
    if not isinstance(other, dict) or not FILE_KEYS.issubset(other):
        raise UserError(f"--with {path}: not a bench-stability.json")
    then = flatten(load("qat")) | other["config"]  # a key that is new since then had its default
    if differences := difference(then, expected["config"], ignore=OWN_KEYS):
        raise UserError(f"--with {path}: other settings ({shown(differences)})")
    for arm in dict.fromkeys(row["arm"] for row in other["rows"]):
        before, now = other["arms"][arm], expected["arms"].get(arm)
        if now is None:
            raise UserError(f"--with {path}: it has rows of {arm}, unknown to this call: --arms has to name it")
        if before != now:
            raise UserError(f"--with {path}: {arm} was {before}, now it is {now}")
    check_schemes(path, other["rows"], expected["schemes"])
    return other["rows"]


def check_schemes(path: Path, rows: list[Row], schemes: dict[str, str]) -> None:
    """Raises UserError for a row whose scheme had other rules than now. A row without a hash is older than this check
    and passes."""
    for row in rows:
        before, arm = row.get("scheme_sha256"), row["arm"]
        if before is not None and before != schemes[arm]:
            raise UserError(
                f"--with {path}: {arm} (seed {row['seed']}) was trained with other rules of its scheme, "
                f"{before[:8]} instead of {schemes[arm][:8]}: show it with the scheme file of then"
            )


def base_of(arm: str) -> str:
    """The arm that an arm is compared with: FP16 with the same final learning rate, and that one with BASE."""
    low = f"{BASE}{LOW_RATE}"
    return low if arm.endswith(LOW_RATE) and arm != low else BASE


def merge(rows: list[Row], arms: list[str]) -> list[Row]:
    """One row for each arm and seed, the longest there is, in the order of `arms`; of equally long ones the first of
    those that hold the most numbers."""
    longest: dict[tuple[str, int], Row] = {}
    for row in rows:
        key = (row["arm"], row["seed"])
        if key not in longest or amount(row) > amount(longest[key]):
            longest[key] = row
    return sorted(longest.values(), key=lambda row: (arms.index(row["arm"]), row["seed"]))


def amount(row: Row) -> tuple[int, int]:
    """How much a row holds: its last epoch, and how many numbers beside those that every row has."""
    return row["epoch"][-1], sum(name in row for name in OF_CLASSES) + (row["corrected"] is not None)


def write_file(path: Path, common: dict[str, Any], rows: list[Row]) -> None:
    """A recipe and its rows as JSON, one row a line, so that a diff shows what a call has added."""
    parts = [f'"{key}": {json.dumps(value)}' for key, value in common.items()]
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    parts.append(f'"rows": [\n{lines}\n]')
    write_text(path, "{" + ",\n".join(parts) + "}\n")


def up_to(row: Row, epoch: int) -> Row | None:
    """A row as it was at an epoch; None before a validation that counts."""
    n_validations = bisect_right(row["epoch"], epoch)
    if n_validations == 0:
        return None
    if n_validations == len(row["epoch"]):
        return row
    shorter = {**row, "AP": {}, "corrected": None}
    for name in CURVES:
        if row.get(name) is not None:
            shorter[name] = row[name][:n_validations]
    for state, curve in row["AP"].items():
        shorter["AP"][state] = curve[:n_validations]
    return shorter


def all_up_to(rows: list[Row], epoch: int) -> list[Row]:
    """The rows as they were at an epoch, without those that had no validation yet that counts."""
    kept = []
    for row in rows:
        shorter = up_to(row, epoch)
        if shorter is not None:
            kept.append(shorter)
    return kept
