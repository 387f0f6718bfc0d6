"""What the trainings of the stability bench gave, a row each: from their folders, or from what earlier calls wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from app.core.config import WITHOUT_EFFECT, Config, UserError, difference, flatten, load, read_yaml, shown
from app.core.files import read_json, write_text
from app.core.results import STATES, candidates, read_rows, train_loss

Row = dict[str, Any]
OWN_KEYS = (*WITHOUT_EFFECT, "data.coco_dir", "train.seed")  # may differ between rows of one table


def read_arm(job: tuple[str, int], config: Config, out_dir: Path) -> Row | None:
    """The curves of one training so far, [validations] each, and where it last ran; None before a validation that
    counts.

    Raises:
        UserError: the folder holds a training of another configuration.
    """
    rows = candidates(read_rows(out_dir / "results.csv")) if (out_dir / "results.csv").exists() else []
    if not rows:
        return None
    ignore = (*WITHOUT_EFFECT, "data.coco_dir", "quant.warmup_from")  # folders may have moved
    if differences := difference(read_yaml(out_dir / "config.yaml"), config, ignore=ignore):
        raise UserError(f"{out_dir} was trained with another configuration ({shown(differences)}): take another --run")
    env = read_json(out_dir / "env.json", "bench")
    gpu = (env["gpus"] or ["none"])[0].split(",")[0]
    return {
        "arm": job[0], "seed": job[1], "epoch": [int(row["epoch"]) for row in rows],
        "AP": {state: [row[f"AP/{state}"] for row in rows] for state in STATES},
        "train_loss": [round(train_loss(row), 5) for row in rows],
        "val_loss": [round(row["val_loss/ema_bn"], 5) for row in rows], "corrected": rows[-1].get("AP/corrected"),
        "gpu": gpu, "torch": env["packages"]["torch"], "code_version": env["code_version"],
    }  # fmt: skip


def recipe(base: Config, arms: dict[str, list[str]]) -> dict[str, Any]:
    """What rows of one table have in common: the configuration that the arms start from, a qat variant's, and what each
    sets beside it."""
    shared = {key: value for key, value in flatten(base).items() if not {key, key.split(".")[0]} & set(OWN_KEYS)}
    return {"config": shared, "arms": arms}


def read_file(path: Path, expected: dict[str, Any]) -> list[Row]:
    """The rows of a file that `write_file` wrote.

    Raises:
        UserError: the file is missing or of something else, or its trainings have another recipe than `expected`.
    """
    other = read_json(path, "bench ARGS=stability")
    if not (isinstance(other, dict) and {"config", "arms", "rows"} <= set(other)):
        raise UserError(f"--with {path}: not a bench-stability.json")
    then = flatten(load("qat")) | other["config"]  # a key that is new since then had its default
    if differences := difference(then, expected["config"], ignore=OWN_KEYS):
        raise UserError(f"--with {path}: other settings ({shown(differences)})")
    for arm in dict.fromkeys(row["arm"] for row in other["rows"]):
        if other["arms"][arm] != (now := expected["arms"].get(arm)):
            raise UserError(f"--with {path}: {arm} was {other['arms'][arm]}, now it is {now}")
    return other["rows"]


def merge(rows: list[Row], arms: list[str]) -> list[Row]:
    """One row for each arm and seed, the longest there is, in the order of `arms`."""
    longest: dict[tuple[str, int], Row] = {}
    for row in rows:
        key = (row["arm"], row["seed"])
        if key not in longest or row["epoch"][-1] > longest[key]["epoch"][-1]:
            longest[key] = row
    return sorted(longest.values(), key=lambda row: (arms.index(row["arm"]), row["seed"]))


def write_file(path: Path, of_all: dict[str, Any], rows: list[Row]) -> None:
    """A recipe and its rows as JSON, one row a line, so that a diff shows what a call has added."""
    parts = [f'"{key}": {json.dumps(value)}' for key, value in of_all.items()]
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    write_text(path, "{" + ",\n".join([*parts, f'"rows": [\n{lines}\n]']) + "}\n")


def up_to(row: Row, epoch: int) -> Row | None:
    """A row as it was at an epoch; None before a validation that counts."""
    n = sum(of <= epoch for of in row["epoch"])
    if n == len(row["epoch"]):
        return row
    curves = {key: row[key][:n] for key in ("epoch", "train_loss", "val_loss")}
    aps = {state: curve[:n] for state, curve in row["AP"].items()}
    return {**row, **curves, "AP": aps, "corrected": None} if n else None
